"""Two pods of the Deployment behind the gateway: no request fails if a pod does."""

import itertools
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from scripts.container.engine import Engine
from scripts.container.image import Recipe, build_image
from scripts.samples import CAT
from scripts.serve.management import wait_until
from tests.containers.pods import FAULTS, Pods, replicas
from tests.deploy.manifests import KUBERNETES, manifests, template
from tests.deploy.prometheus import MONITORING, Query, prometheus
from tests.gateway.cluster import TIMEOUT, clients

# The first test builds two images.
pytestmark = pytest.mark.timeout(900)
_PROGRAMS = {"kubectl": "kubernetes-client", "nsenter": "util-linux", "ip": "iproute2"}


@pytest.fixture(scope="module")
def second(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another image, such as a new release."""
    name = f"{image}-second"
    folder = tmp_path_factory.mktemp("second")
    (folder / "Dockerfile").write_text(f"FROM {image}\nLABEL release=second\n")
    engine.run("build", "--format", "docker", "-t", name, str(folder))
    yield name
    engine.run_unchecked("image", "rm", "--force", name)


@pytest.fixture(scope="module")
def pods(
    engine: Engine, base: str, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pods]:
    """Two pods behind the gateway, whose image is built from this working tree."""
    if engine.program != "podman":
        pytest.skip("NOT RUN: only podman runs a Deployment (on Debian: apt install podman)")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"NOT RUN: {program} is missing (on Debian: apt install {package})")
    gateway = f"{image}-gateway"
    build_image(engine, [], gateway, base, Recipe(Path("deploy/gateway/Dockerfile")))
    with replicas(engine, image, gateway, tmp_path_factory.mktemp("pods")) as running:
        yield running
    engine.run_unchecked("image", "rm", "--force", gateway)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_request_fails_if_a_container_does(
    pods: Pods, fault: str, second: str, note: list[str]
) -> None:
    for pod in pods.running:
        pods.wait_until_ready(pod)
    before = len(pods.logged())
    with clients(pods, 8) as tally:
        time.sleep(2)
        FAULTS[fault](pods, second)
    logged = pods.logged()[before:]
    # Those that took more than one attempt, or failed.
    unusual = [line for line in logged if line["upstream_status"] != "200"]
    assert tally.failed == 0, (tally.outcomes, tally.examples, unusual)
    answered = tally.outcomes["200"]
    assert answered >= 8
    # The access log on standard output has one line per request.
    assert [line["status"] for line in logged] == [200] * answered
    note.append(f"{fault}: {answered} requests, {tally.failed} failed, {len(unusual)} retried")


def test_a_stopping_gateway_completes_the_requests_in_flight(pods: Pods) -> None:
    photograph = CAT.read_bytes()

    def predict(_: int) -> int:
        return requests.post(f"{pods.url}/predict", data=photograph, timeout=TIMEOUT).status_code

    count = 40
    with ThreadPoolExecutor(count) as pool:
        statuses = [pool.submit(predict, number) for number in range(count)]
        time.sleep(0.3)
        assert not all(status.done() for status in statuses)
        pods.stop_gateway()
    assert [status.result() for status in statuses] == [200] * count
    pods.start_gateway()


@pytest.fixture(scope="module")
def query(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Query a Prometheus that scrapes the pods with the cluster's configuration.

    It gets each pod's labels from the configuration instead of the Kubernetes API.
    """
    if shutil.which("prometheus") is None:
        pytest.skip("NOT RUN: Prometheus is missing (on Debian: apt install prometheus)")
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
    for pod, port in itertools.product(pods.running, container["ports"]):
        own = {"pod_name": pod, "pod_container_port_name": port["name"]}
        labels = {f"__meta_kubernetes_{key}": value for key, value in (common | own).items()}
        target = f"{pods.address(pod)}:{port['containerPort']}"
        scrape["static_configs"].append({"targets": [target], "labels": labels})
    with prometheus(config, tmp_path_factory.mktemp("prometheus")) as query:
        yield query


def _names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["metric"].get("pod", "") for row in rows}


def test_alerts_and_autoscaler_metrics_have_the_names_of_the_pods(query: Query, pods: Pods) -> None:
    names = set(pods.running)
    # The expression of DenseNetDown without its comparison.
    assert wait_until(lambda: _names(query('up{job="densenet"} == 1')) == names, 60)
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
    # The adapter's series and metric queries, and the alert.
    queries = (rule["seriesQuery"], metric, slow)
    with clients(pods, 8):
        found = wait_until(lambda: all(_names(query(text)) == names for text in queries), 90)
    assert found, [query(text) for text in queries]
