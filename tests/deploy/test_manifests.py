"""The manifests match the published schemas, and their names, labels and ports agree."""

import json
import re
from pathlib import Path

import pytest
import yaml

from deploy.container import entry, limits
from handler.settings import ADDED_BYTES, DECODING_BYTES
from scripts.gateway.config import DRAIN_SECONDS
from scripts.serve.machine import WORKER_BYTES
from tests.deploy.manifests import KUBERNETES, Manifest, manifests, overlay, template, validate
from tests.deploy.prometheus import MONITORING

RAY_JOB = Path("deploy/ray/rayjob.yaml")
RUNTIME = Path("deploy/kserve/runtime.yaml")
SOURCES = (
    *(KUBERNETES / "overlays" / name for name in ("cpu", "int8", "gpu", "gateway")),
    KUBERNETES / "monitoring",
    *sorted(Path("deploy/kserve").glob("*.yaml")),
    RAY_JOB,
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_manifests_match_their_schemas(source: Path) -> None:
    found = manifests(source)
    assert found
    for manifest in found:
        validate(manifest)


def _ray_pods() -> dict[str, Manifest]:
    """Return the pod templates of the RayJob."""
    spec = manifests(RAY_JOB)[0]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
    }


def _runtime_pod() -> Manifest:
    """Return the pod template of the KServe runtime."""
    spec = manifests(RUNTIME)[0]["spec"]
    return {"metadata": {}, "spec": {key: spec[key] for key in ("containers", "volumes")}}


def test_pods_match_their_schema_and_run_without_privileges() -> None:
    """The schemas of KServe and KubeRay do not cover their pods."""
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


def test_only_the_ray_jobs_pods_can_connect_to_each_other() -> None:
    _, policy = manifests(RAY_JOB)
    chosen = policy["spec"]["podSelector"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": chosen}]
    for pod in _ray_pods().values():
        assert chosen["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_ray_cluster_has_the_pinned_version() -> None:
    lock = Path("requirements/ray.lock").read_text()
    (pinned,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    assert manifests(RAY_JOB)[0]["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    images = {pod["spec"]["containers"][0]["image"] for pod in _ray_pods().values()}
    assert images == {f"densenet-batch:2.0.0-ray{pinned}"}


def test_the_overlays_have_their_own_images_and_hardware() -> None:
    found = {name: template(name)["spec"] for name in ("cpu", "int8", "gpu")}
    assert {name: spec["containers"][0]["image"] for name, spec in found.items()} == {
        "cpu": "densenet-torchserve:2.0.0",
        "int8": "densenet-torchserve:2.0.0-int8",
        "gpu": "densenet-torchserve:2.0.0-cuda",
    }
    affinity = json.dumps(found["int8"]["affinity"])
    assert "requiredDuringSchedulingIgnoredDuringExecution" in affinity
    assert 'AVX512VNNI"' in affinity
    assert found["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    scaler = overlay("gpu")["HorizontalPodAutoscaler", "densenet"]["spec"]
    assert [metric["type"] for metric in scaler["metrics"]] == ["Pods"]


def test_the_gateway_resolves_the_pods_and_may_connect_to_them() -> None:
    gateway = overlay("gateway")
    pod = template("gateway", "densenet-gateway")
    (container,) = pod["spec"]["containers"]
    arguments = dict(word[2:].split("=", 1) for word in container["args"])
    service = gateway["Service", "densenet-nodes"]["spec"]
    port = service["ports"][0]["port"]
    # nginx does not apply search domains.
    name = "densenet-nodes.$(NAMESPACE).svc.cluster.local"
    assert arguments["upstreams"] == f"{name}:{port}"
    (variable,) = container["env"]
    assert variable["name"] == "NAMESPACE"
    # A headless Service resolves to the addresses of the pods.
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


def test_names_labels_and_ports_of_the_deployment_agree() -> None:
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


def _alerts() -> str:
    """Return the expressions of all alerts."""
    (alerts,) = manifests(MONITORING / "alerts.yaml")
    return "\n".join(rule["expr"] for rule in alerts["groups"][0]["rules"])


def test_the_alerts_select_the_job_that_is_scraped() -> None:
    expressions = _alerts()
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
    # The operator takes the job from the pod's label with this name.
    assert labels[monitor["jobLabel"]] == job
    ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
    assert ports[endpoint["port"]] == 8082
    # No second job scrapes the pods.
    assert "prometheus.io" not in str(pod["metadata"].get("annotations"))


def test_the_alerts_and_the_dashboard_use_existing_metrics() -> None:
    (offered,) = manifests(Path("deploy/torchserve/metrics.yaml"))
    names = {"up"}
    for part in ("ts_metrics", "model_metrics"):
        for kind, metrics in offered[part].items():
            for metric in metrics:
                suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
                names |= {metric["name"] + suffix for suffix in suffixes}
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 8
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = set(re.findall(r"\b(\w+)[{\[]", "\n".join([*drawn, _alerts()])))
    assert len(used) > 10
    assert used <= names


def test_a_pod_has_one_cpu_per_inference_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in (template(), template("int8"), _runtime_pod()):
        resources = pod["spec"]["containers"][0]["resources"]
        cpus, memory = resources["limits"]["cpu"], resources["limits"]["memory"]
        monkeypatch.setattr("joblib.cpu_count", lambda cpus=cpus: int(cpus))
        gibibytes = int(memory.removesuffix("Gi"))
        monkeypatch.setattr(limits, "memory_limit", lambda size=gibibytes: size << 30)
        plan = limits.plan_resources(WORKER_BYTES).plan
        assert resources["requests"]["cpu"] == cpus == str(plan.workers * plan.threads)


@pytest.mark.parametrize(
    ("overlay_name", "name", "drain"),
    [("cpu", "densenet", entry.STOP_SECONDS), ("gateway", "densenet-gateway", DRAIN_SECONDS)],
)
def test_the_grace_period_covers_the_drain(overlay_name: str, name: str, drain: float) -> None:
    pod = template(overlay_name, name)["spec"]
    (command, seconds) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    end = int(seconds) + drain
    assert end < pod["terminationGracePeriodSeconds"] <= end + 15


def test_a_workers_memory_covers_the_images_of_one_batch() -> None:
    """`ADDED_BYTES` counts the bodies of one batch."""
    model = yaml.safe_load(Path("handler/model-config.yaml").read_text())
    config = Path("config.properties").read_text()
    (limit,) = re.findall(r"^max_request_size=(\d+)$", config, re.MULTILINE)
    bodies = model["batchSize"] * int(limit)
    assert DECODING_BYTES + bodies < ADDED_BYTES < DECODING_BYTES + bodies + 100e6
