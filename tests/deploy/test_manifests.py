"""Kubernetes', KServe's and KubeRay's manifests against the published schemas.

Kubernetes' are checked as kustomize puts them out.
"""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy.container import entry, limits
from handler.settings import ADDED_BYTES, DECODING_BYTES
from scripts.serve.machine import WORKER_BYTES
from tests.deploy import kserve

KUBERNETES = Path("deploy/kubernetes")
OVERLAYS = ("cpu", "int8", "gpu", "gateway")
VERSION = "1.30"

Manifest = dict[str, Any]
Mistake = Callable[[Manifest], None]


@cache
def _text(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("NOT RUN: kubectl is missing")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def _built(overlay: str) -> dict[tuple[str, str], Manifest]:
    """What an overlay gives a cluster, by kind and name."""
    objects = list(yaml.safe_load_all(_text(KUBERNETES / "overlays" / overlay)))
    found = {(m["kind"], m["metadata"]["name"]): m for m in objects}
    assert len(found) == len(objects)
    return found


def _load(path: Path) -> Manifest:
    manifest: Manifest = yaml.safe_load(path.read_text())
    return manifest


def _deployment(overlay: str = "cpu", name: str = "densenet") -> Manifest:
    return _built(overlay)["Deployment", name]


def _container(manifest: Manifest) -> Manifest:
    container: Manifest = manifest["spec"]["template"]["spec"]["containers"][0]
    return container


MISTAKES: dict[str, Mistake] = {
    "Deployment": lambda m: _container(m).update(readynessProbe={}),
    "Service": lambda m: m["spec"]["ports"][0].update(port="eighty"),
    "HorizontalPodAutoscaler": lambda m: m["spec"].pop("maxReplicas"),
    "PodDisruptionBudget": lambda m: m["spec"].update(maxUnavailable=[1]),
    "NetworkPolicy": lambda m: m["spec"].update(ingres=[]),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_kubernetes_and_a_mistake_in_it_does_not(overlay: str) -> None:
    manifests = _built(overlay)
    assert len(manifests) >= 5
    for (kind, _), manifest in manifests.items():
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        broken = copy.deepcopy(manifest)
        MISTAKES[kind](broken)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, VERSION, strict=True)


def test_the_pod_monitor_fits_prometheus_operator_and_a_mistake_in_it_does_not() -> None:
    schema = json.loads(Path("deploy/schemas/podmonitor.json").read_text())["schema"]
    monitor = yaml.safe_load(_text(KUBERNETES / "monitoring"))
    jsonschema.Draft7Validator(schema).validate(monitor)
    monitor["spec"]["podMetricsEndpoints"][0]["prot"] = "metrics"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(monitor)


def test_the_overlays_differ_in_what_they_are_for() -> None:
    images = {overlay: _container(_deployment(overlay))["image"] for overlay in OVERLAYS[:3]}
    assert images == {
        "cpu": "densenet-torchserve:1.0.0",
        "int8": "densenet-torchserve:1.0.0-int8",
        "gpu": "densenet-torchserve:1.0.0-cuda",
    }
    affinity = _deployment("int8")["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (key, *_) = (
        term["matchExpressions"][0]["key"]
        for term in affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    )
    assert key.endswith("AVX512VNNI")
    assert _container(_deployment("gpu"))["resources"]["limits"]["nvidia.com/gpu"] == "1"
    scaler = _built("gpu")["HorizontalPodAutoscaler", "densenet"]["spec"]
    assert [metric["type"] for metric in scaler["metrics"]] == ["Pods"]


def test_the_gateway_finds_the_pods_and_may_reach_them() -> None:
    gateway, pods = _built("gateway"), _built("cpu")
    deployment = gateway["Deployment", "densenet-gateway"]
    arguments = dict(word[2:].split("=", 1) for word in _container(deployment)["args"])
    service = gateway["Service", "densenet-nodes"]["spec"]
    assert arguments["upstreams"] == f"densenet-nodes:{service['ports'][0]['port']}"
    # One address for each pod, and not one for all of them.
    assert service["clusterIP"] == "None"
    labels = pods["Deployment", "densenet"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels
    own = deployment["spec"]["template"]["metadata"]["labels"]
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = gateway[kind, "densenet-gateway"]["spec"]
        assert (spec.get("selector") or spec["podSelector"])["matchLabels"] == own
    allowed = pods["NetworkPolicy", "densenet"]["spec"]["ingress"][0]["from"]
    assert {"podSelector": {"matchLabels": own}} in allowed
    outwards = gateway["NetworkPolicy", "densenet-gateway"]["spec"]["egress"][0]
    assert outwards["to"] == [{"podSelector": {"matchLabels": labels}}]
    assert outwards["ports"][0]["port"] == service["ports"][0]["port"]
    mounted = {m["name"]: m["mountPath"] for m in _container(deployment)["volumeMounts"]}
    assert arguments["keys"].startswith(mounted["keys"])
    assert arguments["certificate"].startswith(mounted["tls"])


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


def _ray_job() -> tuple[Manifest, Manifest]:
    """The job, and the policy of its network."""
    job, policy = yaml.safe_load_all(Path("deploy/ray/rayjob.yaml").read_text())
    return job, policy


def _ray_pods(job: Manifest) -> dict[str, Manifest]:
    """The templates of the pods that KubeRay makes."""
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
    }


RAY_MISTAKES: dict[str, Mistake] = {
    "a field that is not there": lambda m: m["spec"].update(shutdownAfterJobEnds=True),
    "a text for a number": lambda m: m["spec"].update(backoffLimit="2"),
    "a way of authentication that is not there": lambda m: m["spec"]["rayClusterSpec"][
        "authOptions"
    ].update(mode="tokens"),
    "workers without a name": lambda m: m["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop(
        "groupName"
    ),
}


@pytest.mark.parametrize("mistake", RAY_MISTAKES)
def test_the_ray_job_fits_kuberay_and_a_mistake_in_it_does_not(mistake: str) -> None:
    schema = json.loads(Path("deploy/schemas/rayjob.json").read_text())["schema"]
    job, _ = _ray_job()
    jsonschema.Draft7Validator(schema).validate(job)
    broken = copy.deepcopy(job)
    RAY_MISTAKES[mistake](broken)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(broken)


def test_the_ray_jobs_pods_fit_kubernetes_and_are_fenced_in() -> None:
    """KubeRay's schema is checked without its pods."""
    job, policy = _ray_job()
    kubernetes_validate.validate(policy, VERSION, strict=True)
    chosen = policy["spec"]["podSelector"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": chosen}]
    for name, template in _ray_pods(job).items():
        pod: Manifest = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = name
        kubernetes_validate.validate(pod, VERSION, strict=True)
        # The network's policy is for each of them.
        assert chosen["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]  # noqa: S108
        container["envForm"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, VERSION, strict=True)


def test_all_of_a_ray_cluster_has_the_version_that_is_pinned() -> None:
    job, _ = _ray_job()
    pinned = re.search(
        r"^ray==(\S+)", Path("deploy/ray/requirements.lock").read_text(), re.MULTILINE
    )
    assert pinned is not None
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    images = {pod["spec"]["containers"][0]["image"] for pod in _ray_pods(job).values()}
    assert images == {f"densenet-batch:1.0.0-ray{pinned[1]}"}


def test_what_belongs_together_is_called_the_same() -> None:
    built = _built("cpu")
    deployment = built["Deployment", "densenet"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert built["Service", "densenet"]["spec"]["selector"] == labels
    budget = built["PodDisruptionBudget", "densenet"]
    assert budget["spec"]["selector"]["matchLabels"] == labels
    policy = built["NetworkPolicy", "densenet"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    target = built["HorizontalPodAutoscaler", "densenet"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    ports = {port["name"]: port["containerPort"] for port in _container(deployment)["ports"]}
    (service_port,) = built["Service", "densenet"]["spec"]["ports"]
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
    for file in ("monitoring/prometheus.yaml", "compose/prometheus.yaml"):
        scraped = _load(Path("deploy") / file)["scrape_configs"]
        assert asked == {config["job_name"] for config in scraped}, file

    monitor = yaml.safe_load(_text(KUBERNETES / "monitoring"))["spec"]
    (expression,) = monitor["selector"]["matchExpressions"]
    assert set(expression["values"]) == asked
    for overlay, name, port in (("cpu", "densenet", 8082), ("gateway", "densenet-gateway", 9145)):
        template = _deployment(overlay, name)["spec"]["template"]
        # As the operator does: the job is the value of the pod's label of that name.
        assert monitor["jobLabel"] == expression["key"]
        assert template["metadata"]["labels"][monitor["jobLabel"]] in asked
        (endpoint,) = monitor["podMetricsEndpoints"]
        ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == port
        # Nobody finds the pods a second time, under another job.
        found = template["metadata"].get("annotations", {})
        assert not any("prometheus.io" in name for name in found)


def test_a_pod_has_a_cpu_for_each_thread_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _load(Path("deploy/kserve/runtime.yaml"))["spec"]["containers"][0]
    for container in (_container(_deployment()), _container(_deployment("int8")), runtime):
        asked, limited = (container["resources"][kind]["cpu"] for kind in ("requests", "limits"))
        memory = container["resources"]["limits"]["memory"]
        assert memory.endswith("Gi")
        bound = int(memory[:-2]) << 30
        monkeypatch.setattr("joblib.cpu_count", lambda limited=limited: int(limited))
        monkeypatch.setattr(limits, "most_memory", lambda bound=bound: bound)
        found = limits.fitting(WORKER_BYTES)
        assert asked == limited == str(found.workers * found.threads)


def test_the_grace_period_covers_what_an_ending_pod_does() -> None:
    pod = _deployment()["spec"]["template"]["spec"]
    (command, seconds) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    end = int(seconds) + entry.LONGEST_END
    assert end < pod["terminationGracePeriodSeconds"] <= end + 15


def test_the_dashboard_is_json_that_grafana_takes() -> None:
    dashboard = json.loads(Path("deploy/monitoring/dashboard.json").read_text())
    assert dashboard["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 8


def test_what_a_worker_may_take_is_what_its_settings_say() -> None:
    """`ADDED_BYTES` counts the bodies of one batch."""
    model = yaml.safe_load(Path("handler/model-config.yaml").read_text())
    limit = re.search(
        r"^max_request_size=(\d+)$", Path("config.properties").read_text(), re.MULTILINE
    )
    assert limit is not None
    bodies = model["batchSize"] * int(limit[1])
    assert DECODING_BYTES + bodies < ADDED_BYTES < DECODING_BYTES + bodies + 100e6
