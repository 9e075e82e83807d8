"""The handler's metrics, the dashboard and the alerts, in a real Prometheus."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from scripts.gateway.gateway import Gateway
from scripts.samples import CAT
from scripts.serve.running import unused_ports
from tests.gateway import faults
from tests.gateway.conftest import Client

MONITORING = Path("deploy/monitoring")
DEADLINE = 40.0

Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module", autouse=True)
def _prometheus() -> None:
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("NOT RUN: Prometheus is missing (on Debian: apt install prometheus)")


@pytest.fixture(scope="module")
def query(
    cluster: Gateway, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Query]:
    """Asks a Prometheus that reads this cluster's nodes every half second."""
    assert cluster.process() is not None
    place = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = "500ms"
    config["rule_files"] = [str((MONITORING / "alerts.yaml").resolve())]
    targets = [f"127.0.0.1:{server.ports.metrics}" for server in faults.servers_of(folder)]
    of_job = {config["job_name"]: config for config in config["scrape_configs"]}
    of_job["densenet"]["static_configs"] = [{"targets": targets}]
    gateway = f"127.0.0.1:{cluster.options.metrics_port}"
    of_job["densenet-gateway"]["static_configs"] = [{"targets": [gateway]}]
    (place / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = unused_ports(1)
    with (
        (place / "log").open("w") as log,
        subprocess.Popen(
            [  # noqa: S607
                "prometheus",
                f"--config.file={place / 'prometheus.yaml'}",
                f"--storage.tsdb.path={place / 'data'}",
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


def _query(port: int, text: str) -> list[dict[str, Any]]:
    answer = requests.get(
        f"http://127.0.0.1:{port}/api/v1/query", params={"query": text}, timeout=10
    )
    body = answer.json()
    assert body["status"] == "success", (text, body)
    result: list[dict[str, Any]] = body["data"]["result"]
    return result


def _eventually(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            if value := check():
                return value
        except requests.ConnectionError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_what_clients_sent_is_what_prometheus_counts(query: Query, client: Client) -> None:
    """404 is nginx's own answer, as 502 and 504 are."""

    def counts() -> list[float]:
        found = []
        for metric, labels in (
            ("images", 'outcome="recognized", error_type="none"'),
            ("images", 'outcome="unrecognized", error_type="none"'),
            ("images", 'outcome="refused", error_type="NotAnImage"'),
            ("gateway_requests", 'job="densenet-gateway", path="/predict", status="200"'),
            ("gateway_requests", 'job="densenet-gateway", path="other", status="404"'),
        ):
            rows = query(f"sum(densenet_{metric}_total{{{labels}}})")
            found.append(float(rows[0]["value"][1]) if rows else 0.0)
        return found

    _eventually(lambda: len(query('up{job=~"densenet|densenet-gateway"} == 1')) == 3)
    # Known before it happens, so that the first one is an increase.
    of_predict = 'path="/predict", status=~"502|503|504"'
    _eventually(lambda: len(query(f"densenet_gateway_requests_total{{{of_predict}}}")) == 3)
    # What earlier tests asked is counted first: nginx writes its log once a second.
    before = None
    while before != (before := counts()):
        time.sleep(3)
    for _ in range(3):
        client.predict()
    client.ask("POST", "/predict", data=b"no image")
    client.ask("POST", "/predict?threshold=1", data=CAT.read_bytes())
    for number in range(3):
        client.ask("GET", f"/nowhere/{number}")
    _eventually(lambda: [a - b for a, b in zip(counts(), before, strict=True)] == [3, 1, 1, 4, 3])
    for name in ("decode_seconds", "inference_seconds", "batch_images", "best_probability"):
        (row,) = query(f"sum(densenet_{name}_count)")
        assert float(row["value"][1]) > 0


def test_the_gateways_metrics_are_for_this_machine_only(cluster: Gateway, client: Client) -> None:
    written = (client.folder / "nginx.conf").read_text()
    assert f"listen 127.0.0.1:{cluster.options.metrics_port};" in written
    assert client.ask("GET", "/metrics").status_code == 404


def test_every_query_of_the_dashboard_gives_data(query: Query, client: Client) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    waiting = {
        target["expr"].replace("$__rate_interval", "1m")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    assert len(waiting) >= 10

    def all_give_data() -> bool:
        client.predict()
        for text in list(waiting):
            rows = query(text)
            if rows and all(row["value"][1] != "NaN" for row in rows):
                waiting.discard(text)
        return not waiting

    _eventually(all_give_data)


def test_the_alert_rules_do_what_their_tests_say() -> None:
    command = ["promtool", "test", "rules", "alerts.test.yaml"]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
