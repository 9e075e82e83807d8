"""The manifests fit the published schemas, and their names, labels and ports agree."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from deploy.container import entry, limits
from handler.settings import ADDED_BYTES, DECODING_BYTES
from scripts.gateway.config import DRAIN_SECONDS
from scripts.serve.machine import WORKER_BYTES
from tests.deploy.manifests import KUBERNETES, Manifest, manifests, overlay, template, validate

RAY_JOB = Path("deploy/ray/rayjob.yaml")
RUNTIME = Path("deploy/kserve/runtime.yaml")
SOURCES = (
    *(KUBERNETES / "overlays" / name for name in ("cpu", "int8", "gpu", "gateway")),
    KUBERNETES / "monitoring",
    *sorted(Path("deploy/kserve").glob("*.yaml")),
    RAY_JOB,
)
# What each kind's schema must find.
MISTAKES: dict[str, Callable[[Manifest], object]] = {
    "Deployment": lambda spec: spec["template"]["spec"]["containers"][0].update(readynessProbe={}),
    "Service": lambda spec: spec["ports"][0].update(port="eighty"),
    "HorizontalPodAutoscaler": lambda spec: spec.pop("maxReplicas"),
    "PodDisruptionBudget": lambda spec: spec.update(maxUnavailable=[1]),
    "NetworkPolicy": lambda spec: spec.update(ingres=[]),
    "PodMonitor": lambda spec: spec["podMetricsEndpoints"][0].update(prot="metrics"),
    "ServingRuntime": lambda spec: spec["supportedModelFormats"][0].update(autoselect=True),
    "InferenceService": lambda spec: spec["predictor"]["model"].pop("modelFormat"),
    "RayJob": lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"),
    "Pod": lambda spec: spec["containers"][0].update(envForm=[]),
}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_manifests_fit_their_schemas_and_a_mistake_does_not(source: Path) -> None:
    found = manifests(source)
    assert found
    for manifest in found:
        validate(manifest)
        MISTAKES[manifest["kind"]](manifest["spec"])
        with pytest.raises(jsonschema.ValidationError):
            validate(manifest)


def _ray_pods() -> dict[str, Manifest]:
    """Return the templates of the pods that KubeRay makes."""
    spec = manifests(RAY_JOB)[0]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
    }


def _runtime_pod() -> Manifest:
    """Return the template of the pod that KServe makes."""
    spec = manifests(RUNTIME)[0]["spec"]
    return {"metadata": {}, "spec": {key: spec[key] for key in ("containers", "volumes")}}


def test_pods_fit_kubernetes_and_have_few_rights() -> None:
    """The schemas of KServe and KubeRay are checked without their pods."""
    gateway = template("gateway", "densenet-gateway")
    templates = _ray_pods() | {"kserve": _runtime_pod(), "pod": template(), "gateway": gateway}
    for name, found in templates.items():
        pod: Manifest = {"apiVersion": "v1", "kind": "Pod", **found}
        pod["metadata"]["name"] = name
        validate(pod)
        (container,) = pod["spec"]["containers"]
        rights = pod["spec"].get("securityContext", {}) | container["securityContext"]
        assert rights["runAsNonRoot"] is True
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        MISTAKES["Pod"](pod["spec"])
        with pytest.raises(jsonschema.ValidationError):
            validate(pod)


def test_only_the_ray_jobs_pods_reach_one_another() -> None:
    _, policy = manifests(RAY_JOB)
    chosen = policy["spec"]["podSelector"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": chosen}]
    for pod in _ray_pods().values():
        assert chosen["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_all_of_a_ray_cluster_has_the_version_that_is_pinned() -> None:
    lock = Path("requirements/ray.lock").read_text()
    (pinned,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    assert manifests(RAY_JOB)[0]["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    images = {pod["spec"]["containers"][0]["image"] for pod in _ray_pods().values()}
    assert images == {f"densenet-batch:2.0.0-ray{pinned}"}


def test_the_overlays_differ_in_what_they_are_for() -> None:
    found = {name: template(name)["spec"] for name in ("cpu", "int8", "gpu")}
    assert {name: spec["containers"][0]["image"] for name, spec in found.items()} == {
        "cpu": "densenet-torchserve:2.0.0",
        "int8": "densenet-torchserve:2.0.0-int8",
        "gpu": "densenet-torchserve:2.0.0-cuda",
    }
    affinity = found["int8"]["affinity"]["nodeAffinity"]
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert required[0]["matchExpressions"][0]["key"].endswith("AVX512VNNI")
    assert found["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    scaler = overlay("gpu")["HorizontalPodAutoscaler", "densenet"]["spec"]
    assert [metric["type"] for metric in scaler["metrics"]] == ["Pods"]


def test_the_gateway_finds_the_pods_and_may_reach_them() -> None:
    gateway = overlay("gateway")
    pod = gateway["Deployment", "densenet-gateway"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    arguments = dict(word[2:].split("=", 1) for word in container["args"])
    service = gateway["Service", "densenet-nodes"]["spec"]
    port = service["ports"][0]["port"]
    # nginx does not apply search domains.
    name = "densenet-nodes.$(NAMESPACE).svc.cluster.local"
    assert arguments["upstreams"] == f"{name}:{port}"
    (variable,) = container["env"]
    assert variable["name"] == "NAMESPACE"
    # The addresses of the pods, not one of the Service.
    assert service["clusterIP"] == "None"
    labels = template()["metadata"]["labels"]
    assert service["selector"] == labels
    own = pod["metadata"]["labels"]
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = gateway[kind, "densenet-gateway"]["spec"]
        assert (spec.get("selector") or spec["podSelector"])["matchLabels"] == own
    allowed = overlay("cpu")["NetworkPolicy", "densenet"]["spec"]["ingress"][0]["from"]
    assert {"podSelector": {"matchLabels": own}} in allowed
    outwards = gateway["NetworkPolicy", "densenet-gateway"]["spec"]["egress"][0]
    assert outwards["to"] == [{"podSelector": {"matchLabels": labels}}]
    assert outwards["ports"][0]["port"] == port
    mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert arguments["keys"].startswith(mounted["keys"])
    assert arguments["certificate"].startswith(mounted["tls"])


def test_objects_that_belong_together_have_the_same_names_labels_and_ports() -> None:
    specs = {kind: m["spec"] for (kind, name), m in overlay("cpu").items() if name == "densenet"}
    labels = specs["Deployment"]["template"]["metadata"]["labels"]
    assert specs["Service"]["selector"] == labels
    for kind, selector in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert specs[kind][selector]["matchLabels"] == labels, kind
    target = specs["HorizontalPodAutoscaler"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "densenet")
    (container,) = specs["Deployment"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (service_port,) = specs["Service"]["ports"]
    assert service_port["targetPort"] in ports
    allowed = {rule["ports"][0]["port"] for rule in specs["NetworkPolicy"]["ingress"]}
    assert allowed == set(ports.values())


def test_the_alerts_select_the_job_that_is_scraped() -> None:
    (alerts,) = manifests(Path("deploy/monitoring/alerts.yaml"))
    expressions = " ".join(rule["expr"] for rule in alerts["groups"][0]["rules"])
    (job,) = set(re.findall(r'job=~?"([^"]+)"', expressions))
    assert all("job=" in selector for selector in re.findall(r"\{([^}]*)\}", expressions))
    for file in ("monitoring/prometheus.yaml", "compose/prometheus.yaml"):
        (config,) = manifests(Path("deploy", file))
        assert [scraped["job_name"] for scraped in config["scrape_configs"]] == [job], file

    (found,) = manifests(KUBERNETES / "monitoring")
    monitor = found["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    pod = template()
    labels = pod["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"] == labels
    # As the operator does: the job is the value of the pod's label with this name.
    assert labels[monitor["jobLabel"]] == job
    ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
    assert ports[endpoint["port"]] == 8082
    # No second job scrapes the pods.
    assert "prometheus.io" not in str(pod["metadata"].get("annotations"))


def test_the_alerts_and_the_dashboard_use_metrics_that_torchserve_offers() -> None:
    (offered,) = manifests(Path("deploy/torchserve/metrics.yaml"))
    names = {"up"}
    for part in ("ts_metrics", "model_metrics"):
        for kind, metrics in offered[part].items():
            for metric in metrics:
                suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
                names |= {metric["name"] + suffix for suffix in suffixes}
    (alerts,) = manifests(Path("deploy/monitoring/alerts.yaml"))
    expressions = [rule["expr"] for rule in alerts["groups"][0]["rules"]]
    dashboard = json.loads(Path("deploy/monitoring/dashboard.json").read_text())
    expressions += [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    used = set(re.findall(r"\b(\w+)[{\[]", " ".join(expressions)))
    assert len(used) > 10
    assert used <= names


def test_a_pod_has_a_cpu_for_each_thread_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in (template(), template("int8"), _runtime_pod()):
        resources = pod["spec"]["containers"][0]["resources"]
        limited = resources["limits"]["cpu"]
        memory = resources["limits"]["memory"]
        assert memory.endswith("Gi")
        most = int(memory[:-2]) << 30
        monkeypatch.setattr("joblib.cpu_count", lambda limited=limited: int(limited))
        monkeypatch.setattr(limits, "memory_limit", lambda most=most: most)
        found = limits.plan_resources(WORKER_BYTES)
        assert resources["requests"]["cpu"] == limited == str(found.workers * found.threads)


@pytest.mark.parametrize(
    ("overlay_name", "name", "drain"),
    [("cpu", "densenet", entry.STOP_SECONDS), ("gateway", "densenet-gateway", DRAIN_SECONDS)],
)
def test_the_grace_period_covers_what_a_terminating_pod_does(
    overlay_name: str, name: str, drain: float
) -> None:
    pod = template(overlay_name, name)["spec"]
    (command, seconds) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    end = int(seconds) + drain
    assert end < pod["terminationGracePeriodSeconds"] <= end + 15


def test_the_dashboard_has_panels_with_unique_ids() -> None:
    dashboard = json.loads(Path("deploy/monitoring/dashboard.json").read_text())
    assert dashboard["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 8


def test_a_workers_memory_covers_the_images_of_one_batch() -> None:
    """`ADDED_BYTES` counts the bodies of one batch."""
    model = yaml.safe_load(Path("handler/model-config.yaml").read_text())
    config = Path("config.properties").read_text()
    (limit,) = re.findall(r"^max_request_size=(\d+)$", config, re.MULTILINE)
    bodies = model["batchSize"] * int(limit)
    assert DECODING_BYTES + bodies < ADDED_BYTES < DECODING_BYTES + bodies + 100e6
