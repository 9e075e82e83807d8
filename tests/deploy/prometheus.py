"""Prometheus with the alert rules of `deploy/monitoring`."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from scripts.serve.running import unused_ports

MONITORING = Path("deploy/monitoring")

Query = Callable[[str], list[dict[str, Any]]]


@contextmanager
def prometheus(config: dict[str, Any], folder: Path) -> Iterator[Query]:
    """Run Prometheus; yield a function that returns the rows of a query, none during the start."""
    rules = {"rule_files": [str((MONITORING / "alerts.yaml").resolve())]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config | rules))
    (port,) = unused_ports(1)
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def query(text: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query"
        try:
            body = requests.get(url, params={"query": text}, timeout=10).json()
        except requests.ConnectionError:
            return []
        assert body["status"] == "success", (text, body)
        rows: list[dict[str, Any]] = body["data"]["result"]
        return rows

    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield query
        finally:
            process.terminate()
