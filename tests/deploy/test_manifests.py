"""Kubernetes' and KServe's manifests against the published schemas."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy.container import entry, limits
from handler.settings import ADDED_BYTES, DECODING_BYTES
from scripts.serve.machine import FRONTEND_BYTES, WORKER_BYTES
from tests.deploy import kserve

KUBERNETES = Path("deploy/kubernetes")
VERSION = "1.30"
Manifest = dict[str, Any]
Mistake = Callable[[Manifest], None]


def _load(path: Path) -> Manifest:
    manifest: Manifest = yaml.safe_load(path.read_text())
    return manifest


def _container(manifest: Manifest) -> Manifest:
    container: Manifest = manifest["spec"]["template"]["spec"]["containers"][0]
    return container


MISTAKES: dict[str, Mistake] = {
    "deployment": lambda m: _container(m).update(readynessProbe={}),
    "service": lambda m: m["spec"]["ports"][0].update(port="eighty"),
    "autoscaler": lambda m: m["spec"].pop("maxReplicas"),
    "disruption-budget": lambda m: m["spec"].update(maxUnavailable=[1]),
    "network-policy": lambda m: m["spec"].update(ingres=[]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_manifest_fits_kubernetes_and_a_mistake_in_it_does_not(name: str) -> None:
    manifest = _load(KUBERNETES / f"{name}.yaml")
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    broken = copy.deepcopy(manifest)
    MISTAKES[name](broken)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


KSERVE_MISTAKES: dict[str, Mistake] = {
    "runtime": lambda m: m["spec"]["supportedModelFormats"][0].update(autoselect=True),
    "inference-service": lambda m: m["spec"]["predictor"]["model"].pop("modelFormat"),
    "inference-service-grpc": lambda m: m["spec"]["predictor"].update(replicas=2),
}


@pytest.mark.parametrize("name", KSERVE_MISTAKES)
def test_a_manifest_fits_kserve_and_a_mistake_in_it_does_not(name: str) -> None:
    manifest = _load(Path(f"deploy/kserve/{name}.yaml"))
    kserve.validate(manifest)
    broken = copy.deepcopy(manifest)
    KSERVE_MISTAKES[name](broken)
    with pytest.raises(jsonschema.ValidationError):
        kserve.validate(broken)


def test_kserves_containers_fit_kubernetes_too() -> None:
    """KServe's types leave a container's probes and resources to Kubernetes."""
    runtime = _load(Path("deploy/kserve/runtime.yaml"))
    pod: Manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}}
    pod["spec"] = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    kubernetes_validate.validate(pod, VERSION, strict=True)
    pod["spec"]["containers"][0]["readinessProbe"]["periodSeconds"] = "often"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_what_belongs_together_is_called_the_same() -> None:
    deployment = _load(KUBERNETES / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert _load(KUBERNETES / "service.yaml")["spec"]["selector"] == labels
    budget = _load(KUBERNETES / "disruption-budget.yaml")
    assert budget["spec"]["selector"]["matchLabels"] == labels
    policy = _load(KUBERNETES / "network-policy.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    target = _load(KUBERNETES / "autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    ports = {port["name"]: port["containerPort"] for port in _container(deployment)["ports"]}
    (service_port,) = _load(KUBERNETES / "service.yaml")["spec"]["ports"]
    assert service_port["targetPort"] in ports
    allowed = {rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]}
    assert allowed == set(ports.values())


def test_the_alerts_jobs_are_those_that_are_scraped() -> None:
    rules = _load(Path("deploy/monitoring/alerts.yaml"))["groups"][0]["rules"]
    asked = {
        job
        for rule in rules
        for jobs in re.findall(r'job=~?"([^"]+)"', rule["expr"])
        for job in jobs.split("|")
    }
    selectors = [part for rule in rules for part in re.findall(r"\{([^}]*)\}", rule["expr"])]
    assert all("job=" in selector for selector in selectors)
    scraped = _load(Path("deploy/monitoring/prometheus.yaml"))["scrape_configs"]
    assert asked == {config["job_name"] for config in scraped}

    monitor = _load(KUBERNETES / "pod-monitor.yaml")["spec"]
    template = _load(KUBERNETES / "deployment.yaml")["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    # As the operator does: the job is the value of the pod's label of that name.
    assert labels[monitor["jobLabel"]] == "densenet"
    assert labels[monitor["jobLabel"]] in asked
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {
        port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]
    }
    assert ports[endpoint["port"]] == 8082
    # Nobody finds the pods a second time, under another job.
    assert not any("prometheus.io" in name for name in template["metadata"].get("annotations", {}))


@pytest.mark.parametrize(
    "path", [KUBERNETES / "deployment.yaml", Path("deploy/kserve/runtime.yaml")]
)
def test_a_pod_has_a_cpu_for_each_thread_that_computes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _load(path)["spec"]
    (container,) = spec.get("template", {"spec": spec})["spec"]["containers"]
    asked, limited = (container["resources"][kind]["cpu"] for kind in ("requests", "limits"))
    (memory,) = _limits(path)
    monkeypatch.setattr("joblib.cpu_count", lambda: int(limited))
    monkeypatch.setattr(limits, "most_memory", lambda: int(memory))
    found = limits.fitting(WORKER_BYTES)
    assert asked == limited == str(found.workers * found.threads)


def test_the_grace_period_covers_what_an_ending_pod_does() -> None:
    pod = _load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
    (command, seconds) = _container({"spec": {"template": {"spec": pod}}})["lifecycle"]["preStop"][
        "exec"
    ]["command"]
    assert command == "sleep"
    assert int(seconds) + entry.LONGEST_END < pod["terminationGracePeriodSeconds"]


def test_the_dashboard_is_json_that_grafana_takes() -> None:
    dashboard = json.loads(Path("deploy/monitoring/dashboard.json").read_text())
    assert dashboard["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 8


def _limits(path: Path) -> Iterator[float]:
    """Memory limits of the containers, in bytes."""
    manifest = _load(path)
    template = manifest["spec"]["template"]["spec"] if "template" in manifest["spec"] else None
    for container in (template or manifest["spec"])["containers"]:
        limit = container["resources"]["limits"]["memory"]
        assert limit.endswith("Gi")
        yield float(limit[:-2]) * 2**30


def test_a_pod_may_take_what_its_processes_take_at_their_limits() -> None:
    configuration = dict(
        line.split("=", 1)
        for line in Path("deploy/container/config.properties").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    java = sum(
        int(gigabytes) << 30
        for gigabytes in re.findall(r"(?:-Xmx|MaxDirectMemorySize=)(\d+)g", configuration["vmargs"])
    )
    assert java < FRONTEND_BYTES < java + 1e9
    workers = int(configuration["default_workers_per_model"])
    needed = FRONTEND_BYTES + workers * WORKER_BYTES
    for path in (KUBERNETES / "deployment.yaml", Path("deploy/kserve/runtime.yaml")):
        (limit,) = _limits(path)
        assert needed < limit < needed + 1e9, path


def test_what_a_worker_may_take_is_what_its_settings_say() -> None:
    """`ADDED_BYTES` counts the bodies of one batch."""
    model = yaml.safe_load(Path("handler/model-config.yaml").read_text())
    limit = re.search(
        r"^max_request_size=(\d+)$", Path("config.properties").read_text(), re.MULTILINE
    )
    assert limit is not None
    bodies = model["batchSize"] * int(limit[1])
    assert DECODING_BYTES + bodies < ADDED_BYTES < DECODING_BYTES + bodies + 100e6
