"""Two pods of the Deployment behind the gateway: no client sees what happens to them."""

import itertools
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

from scripts.container.engine import Engine
from scripts.container.image import Recipe, build_image
from scripts.serve.management import poll
from scripts.serve.running import unused_ports
from tests.containers.pods import FAULTS, Pods, replicas
from tests.deploy.manifests import KUBERNETES, manifests, template
from tests.gateway.cluster import clients

MONITORING = Path("deploy/monitoring")
# Seconds: the first test waits for two images to be built.
pytestmark = pytest.mark.timeout(900)
_PROGRAMS = {"kubectl": "kubernetes-client", "nsenter": "util-linux", "ip": "iproute2"}


@pytest.fixture(scope="module")
def second(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another image, as a new release would be."""
    name = f"{image}-second"
    folder = tmp_path_factory.mktemp("second")
    (folder / "Dockerfile").write_text(f"FROM {image}\nLABEL release=second\n")
    engine.run("build", "--format", "docker", "-t", name, str(folder))
    yield name
    engine.tried("image", "rm", "--force", name)


@pytest.fixture(scope="module")
def pods(
    engine: Engine, base: str, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pods]:
    """Two pods behind the gateway, whose image is built anew, for all tests here."""
    if engine.program != "podman":
        pytest.skip("NOT RUN: a Deployment is played by podman (on Debian: apt install podman)")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"NOT RUN: {program} is missing (on Debian: apt install {package})")
    gateway = f"{image}-gateway"
    build_image(engine, [], gateway, base, Recipe(Path("deploy/gateway/Dockerfile")))
    with replicas(engine, image, gateway, tmp_path_factory.mktemp("pods"), "test") as running:
        yield running
    engine.tried("image", "rm", "--force", gateway)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_client_sees_what_happens_to_a_container(pods: Pods, fault: str, second: str) -> None:
    for pod in pods.pods:
        pods.wait_until_ready(pod)

    def counted() -> float:
        return pods.counted().get('{path="/predict",status="200"}', 0.0)

    before = counted()
    with clients(pods, 8) as tally:
        time.sleep(2)
        FAULTS[fault](pods, second)
    logs = pods.engine.tried("logs", "--tail", "40", pods.gateway).stdout
    assert tally.failed == 0, (tally.outcomes, tally.examples, logs)
    assert tally.outcomes["200"] >= 8
    # The gateway's metrics count what clients saw.
    assert poll(lambda: counted() >= before + tally.outcomes["200"], 30)


Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def query(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Queries a Prometheus that scrapes the pods by the cluster's own configuration.

    The labels that Kubernetes' API would give each pod are written into it.
    """
    if shutil.which("prometheus") is None:
        pytest.skip("NOT RUN: Prometheus is missing (on Debian: apt install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    (config,) = manifests(MONITORING / "prometheus-kubernetes.yaml")
    (scrape,) = config["scrape_configs"]
    assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    scrape["scrape_interval"] = "1s"
    deployed = template()
    (container,) = deployed["spec"]["containers"]
    common = {"namespace": "default", "pod_container_name": container["name"]}
    for key, value in deployed["metadata"]["labels"].items():
        common[f"pod_label_{re.sub('[^a-zA-Z0-9]', '_', key)}"] = value
    scrape["static_configs"] = []
    for pod, port in itertools.product(pods.pods, container["ports"]):
        own = {"pod_name": pod.name, "pod_container_port_name": port["name"]}
        labels = {f"__meta_kubernetes_{key}": value for key, value in (common | own).items()}
        target = f"{pods.address(pod)}:{port['containerPort']}"
        scrape["static_configs"].append({"targets": [target], "labels": labels})
    config["rule_files"] = [str((MONITORING / "alerts.yaml").resolve())]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = unused_ports(1)
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def ask(text: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query"
        try:
            body = requests.get(url, params={"query": text}, timeout=10).json()
        except requests.ConnectionError:
            return []
        assert body["status"] == "success", (text, body)
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield ask
        finally:
            process.terminate()


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

    (alerts,) = manifests(MONITORING / "alerts.yaml")
    rules = {rule["alert"]: rule["expr"] for rule in alerts["groups"][0]["rules"]}
    slow = rules["DenseNetQueueSlow"].replace("> 0.5", ">= 0").replace("[5m]", "[1m]")
    (scaler,) = manifests(KUBERNETES / "base" / "autoscaler.yaml")
    (rule,) = yaml.safe_load((KUBERNETES / "monitoring" / "prometheus-adapter.yaml").read_text())
    assert rule["name"]["as"] == scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    metric = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="default"')
    metric = metric.replace("<<.GroupBy>>", "pod")
    # What the adapter finds metrics by, what it makes of them, and what the alert makes.
    queries = (rule["seriesQuery"], metric, slow)
    with clients(pods, 8):
        found = poll(lambda: all(_names(query(text)) == names for text in queries), 90)
    assert found, [query(text) for text in queries]
