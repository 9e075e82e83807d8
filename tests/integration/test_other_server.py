"""examples/other_server.py, the pipeline behind LitServe, compared with TorchServe."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from scripts.samples import CAT
from scripts.serve.management import wait_until
from scripts.serve.running import ServerState, free_ports

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(archive: Path) -> Iterator[str]:
    port = str(free_ports().inference)
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "examples.other_server", str(archive), port]
    with subprocess.Popen(command) as process:
        try:
            assert wait_until(lambda: _is_healthy(address), 60)
            yield f"{address}/predict"
        finally:
            process.terminate()


def _is_healthy(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_every_request_gets_the_response_that_torchserve_gives(
    url: str, running: ServerState
) -> None:
    image = CAT.read_bytes()
    for content in (
        {"files": {"file": image}, "data": {"topk": 3}},
        {"files": {"a": image, "b": b"no image"}},
        {"json": {"instances": [{"b64": "%"}]}},
        {"json": {"image": "AAAA", "topk": 0}},
    ):
        ours = requests.post(url, timeout=60, **content)
        torchserve = requests.post(running.predictions_url, timeout=60, **content)
        assert (ours.status_code, ours.json()) == (torchserve.status_code, torchserve.json())
