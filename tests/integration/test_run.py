"""`make run` with a host of the weights; what it does without one is tested with the README."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from scripts.build.weights import Weights
from scripts.samples import CAT
from scripts.serve.running import RUN_DIR, free_ports
from tests.published import publish
from tests.workspace import copy_project

_TIMEOUT = 280


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "clone"
    folder.mkdir()
    copy_project(folder)
    yield folder
    subprocess.run(["make", "stop"], cwd=folder, check=True, capture_output=True)  # noqa: S607


@pytest.fixture
def host(weights: Weights, tmp_path: Path) -> Iterator[str]:
    """The address of a DenseNet-121 file in the official naming, on a server that has it."""
    folder = tmp_path / "host"
    folder.mkdir()
    file = publish(weights, folder)
    serve = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{file.name}"
        server.shutdown()
        thread.join()


def run(clone: Path, url: str) -> tuple[str, list[str], int]:
    """Run it; return what it printed, the models that are served, and the port."""
    ports = free_ports()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.run"],
        cwd=clone,
        env=os.environ
        | {
            "GIVEN_TO": "make run",
            "GIVEN_WEIGHTS_URL": url,
            "GIVEN_PORT": str(ports.inference),
            "GIVEN_MANAGEMENT_PORT": str(ports.management),
            "GIVEN_METRICS_PORT": str(ports.metrics),
            "TORCH_HOME": str(clone / "torch"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=_TIMEOUT,
    )
    assert done.returncode == 0, done.stdout
    served = json.loads((clone / RUN_DIR / "server.json").read_text())["models"]
    return done.stdout, list(served), ports.inference


def test_with_the_weights_densenet_alone_is_served(clone: Path, host: str) -> None:
    printed, served, port = run(clone, host)
    assert served == ["densenet121"]
    assert "efficientnet_lite0" not in printed
    assert "Packages:" not in printed
    url = f"http://127.0.0.1:{port}/predictions/densenet121"
    answer = requests.post(url, files={"file": CAT.read_bytes()}, timeout=60)
    assert answer.headers["x-model-weights"] == "trained"
    assert "warning" not in answer.json()
