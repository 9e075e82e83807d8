"""Metrics, dashboard and alert rules, in a real Prometheus that scrapes TorchServe."""

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import requests

from scripts.samples import CAT
from scripts.serve.management import wait_until
from scripts.serve.running import ServerState
from tests.deploy.manifests import manifests
from tests.deploy.prometheus import MONITORING, Query, prometheus

# Seconds.
_DEADLINE = 40.0


@pytest.fixture(scope="module", autouse=True)
def _prometheus() -> None:
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("NOT RUN: Prometheus is missing (on Debian: apt install prometheus)")


@pytest.fixture(scope="module")
def query(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Query a Prometheus that scrapes the shared server every half second."""
    (config,) = manifests(MONITORING / "prometheus.yaml")
    config["global"]["scrape_interval"] = "500ms"
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{running.ports.metrics}"]}]
    with prometheus(config, tmp_path_factory.mktemp("prometheus")) as query:
        yield query


def _predict(running: ServerState, file: bytes, **options: str) -> None:
    requests.post(running.predictions_url, files={"file": file}, data=options, timeout=60)


def test_prometheus_counts_images_by_outcome(query: Query, running: ServerState) -> None:
    def counts() -> list[float]:
        found = []
        for outcome, error in (
            ("recognized", "none"),
            ("unrecognized", "none"),
            ("refused", "NotAnImage"),
        ):
            labels = f'job="densenet", outcome="{outcome}", error_type="{error}"'
            rows = query(f"sum(image_classifier_images_total{{{labels}}})")
            found.append(float(rows[0]["value"][1]) if rows else 0.0)
        return found

    assert wait_until(lambda: len(query('up{job="densenet"} == 1')) == 1, _DEADLINE)
    before = counts()
    for _ in range(3):
        _predict(running, CAT.read_bytes(), threshold="0")
    _predict(running, CAT.read_bytes(), threshold="1")
    _predict(running, b"no image")

    def added() -> list[float]:
        return [now - then for now, then in zip(counts(), before, strict=True)]

    assert wait_until(lambda: added() == [3, 1, 1], _DEADLINE), added()
    for name in ("decode_seconds", "inference_seconds", "batch_images", "best_probability"):
        (row,) = query(f"sum(densenet_{name}_count)")
        assert float(row["value"][1]) > 0


def test_every_query_of_the_dashboard_returns_data(query: Query, running: ServerState) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    waiting = {
        target["expr"].replace("$__rate_interval", "1m")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    assert len(waiting) >= 10

    def all_return_data() -> bool:
        _predict(running, CAT.read_bytes())
        for text in list(waiting):
            rows = query(text)
            if rows and all(row["value"][1] != "NaN" for row in rows):
                waiting.discard(text)
        return not waiting

    assert wait_until(all_return_data, _DEADLINE), waiting


def test_the_alert_rules_pass_their_tests() -> None:
    command = ["promtool", "test", "rules", "alerts.test.yaml"]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
