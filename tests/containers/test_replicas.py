"""Two pods of the Deployment behind the gateway: what happens to them no client sees."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from benchmarks.cluster import clients
from benchmarks.pods import FAULTS, Pods, replicas
from benchmarks.replicas import GATEWAY, another, run
from scripts.container.engine import Engine
from scripts.container.image import build_image
from scripts.gateway.waiting import HOLD
from scripts.samples import CAT
from scripts.serve.management import poll
from scripts.serve.running import unused_ports

KUBERNETES = Path("deploy/kubernetes")
# Seconds: the first test waits for two images to be built.
pytestmark = pytest.mark.timeout(900)
_PROGRAMS = {"kubectl": "kubernetes-client", "nsenter": "util-linux", "ip": "iproute2"}


@pytest.fixture(scope="module")
def second(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another image, as a new release would be."""
    name = f"{image}-second"
    another(engine, image, name, tmp_path_factory.mktemp("second"))
    yield name
    engine.tried("image", "rm", "--force", name)


@pytest.fixture(scope="module")
def gateway_image(engine: Engine, base: str, image: str) -> Iterator[str]:
    """The gateway's image, built anew."""
    tag = f"{image}-gateway"
    build_image(engine, [], tag, base, GATEWAY)
    yield tag
    engine.tried("image", "rm", "--force", tag)


@pytest.fixture(scope="module")
def pods(
    engine: Engine, image: str, gateway_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pods]:
    """Two pods behind the gateway, for all tests here."""
    if engine.program != "podman":
        pytest.skip("NOT RUN: a Deployment is played by podman (on Debian: apt install podman)")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"NOT RUN: {program} is missing (on Debian: apt install {package})")
    folder = tmp_path_factory.mktemp("pods")
    with replicas(engine, image, gateway_image, folder, "test") as running:
        yield running


@pytest.mark.parametrize("fault", FAULTS)
def test_what_happens_to_a_container_no_client_sees(
    pods: Pods, fault: str, image: str, second: str, note: list[str]
) -> None:
    # Each fault once; what one of them left is over.
    for pod in pods.pods:
        pods.wait_until_ready(pod)
    tally, times = run(pods, FAULTS[fault], (image, second), seconds=1.0)
    logs = pods.engine.tried("logs", "--tail", "40", pods.gateway).stdout
    assert times == 1
    assert tally.failed == 0, (tally.outcomes, tally.examples, logs)
    assert tally.outcomes["200"] >= 8
    note.append(
        f"{fault}: {tally.outcomes.total()} requests, {tally.failed} failed, "
        f"slowest {max(tally.seconds):.1f} s"
    )
    assert max(tally.seconds) < HOLD + 30


def test_the_gateway_counts_what_clients_saw(pods: Pods) -> None:
    label = '{path="/predict",status="200"}'

    def counted() -> float:
        return pods.counted().get(label, 0.0)

    before = counted()
    with clients(pods, 2) as tally:
        assert poll(lambda: tally.outcomes["200"] >= 3, 60)
    assert poll(lambda: counted() >= before + tally.outcomes["200"], 30)


Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def query(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Asks a Prometheus that scrapes the pods by the cluster's own configuration.

    What Kubernetes' API would tell of each pod is told here by labels of the same names.
    """
    if shutil.which("prometheus") is None:
        pytest.skip("NOT RUN: Prometheus is missing (on Debian: apt install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(Path("deploy/monitoring/prometheus-kubernetes.yaml").read_text())
    (scrape,) = config["scrape_configs"]
    assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    scrape["scrape_interval"] = "1s"
    scrape["static_configs"] = [
        {"targets": [f"{pods.address(pod)}:{port['containerPort']}"], "labels": labels}
        for pod in pods.pods
        for port, labels in _meta(pods, pod.name)
    ]
    config["rule_files"] = [str(Path("deploy/monitoring/alerts.yaml").resolve())]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = unused_ports(1)
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [  # noqa: S607
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield lambda text: _query(port, text)
        finally:
            process.terminate()


def _meta(pods: Pods, name: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Each port of a pod, with what the API says of it: name, labels, container."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / "cpu")],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    (deployment,) = (m for m in yaml.safe_load_all(done.stdout) if m["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    for container in template["spec"]["containers"]:
        for port in container["ports"]:
            yield (
                port,
                {
                    "__meta_kubernetes_namespace": "default",
                    "__meta_kubernetes_pod_name": name,
                    "__meta_kubernetes_pod_container_name": container["name"],
                    "__meta_kubernetes_pod_container_port_name": port["name"],
                    **{
                        f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9]', '_', key)}": value
                        for key, value in template["metadata"]["labels"].items()
                    },
                },
            )
    assert pods.url


def _query(port: int, text: str) -> list[dict[str, Any]]:
    try:
        answer = requests.get(
            f"http://127.0.0.1:{port}/api/v1/query", params={"query": text}, timeout=10
        )
    except requests.ConnectionError:
        return []
    body = answer.json()
    assert body["status"] == "success", (text, body)
    result: list[dict[str, Any]] = body["data"]["result"]
    return result


def _names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["metric"].get("pod", "") for row in rows}


def test_the_alerts_and_the_autoscaler_see_the_pods_by_their_names(
    query: Query, pods: Pods
) -> None:
    names = {pod.name for pod in pods.pods}
    # As the alert asks, but for the comparison: DenseNetDown names each pod.
    assert poll(lambda: _names(query('up{job=~"densenet|densenet-gateway"} == 1')) == names, 60)
    (row, *_) = query('up{job="densenet"}')
    assert row["metric"]["namespace"] == "default"
    assert row["metric"]["container"] == "torchserve"

    rules = yaml.safe_load(Path("deploy/monitoring/alerts.yaml").read_text())["groups"][0]["rules"]
    slow = next(rule["expr"] for rule in rules if rule["alert"] == "DenseNetQueueSlow")
    slow = slow.replace("> 0.5", ">= 0").replace("[5m]", "[1m]")
    scaler = yaml.safe_load((KUBERNETES / "base" / "autoscaler.yaml").read_text())["spec"]
    asked = scaler["metrics"][0]["pods"]["metric"]["name"]
    (rule,) = yaml.safe_load((KUBERNETES / "monitoring" / "prometheus-adapter.yaml").read_text())
    assert rule["name"]["as"] == asked
    metric = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="default"')
    metric = metric.replace("<<.GroupBy>>", "pod")

    deadline = time.monotonic() + 90
    with clients(pods, 8):
        while True:
            # What the adapter finds metrics by, what it makes of them, and what the alert makes.
            found = [_names(query(text)) for text in (rule["seriesQuery"], metric, slow)]
            if found == [names] * 3:
                break
            assert time.monotonic() < deadline, found
            time.sleep(1)


def test_the_pods_run_what_the_manifest_says(pods: Pods) -> None:
    inspected = pods.engine.inspect("container", pods.pods[0].container)
    assert inspected["HostConfig"]["ReadonlyRootfs"] is True
    assert inspected["Config"]["User"].startswith("10001")
    assert inspected["HostConfig"]["Memory"] == 8 << 30
    answer = requests.post(f"{pods.url}/predict", files={"file": CAT.read_bytes()}, timeout=60)
    assert (answer.status_code, answer.json()["success"]) == (200, True)
