"""The image, as far as it goes without building one: lint, pins, and what starts inside it."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from scripts.serve.running import Running, free_ports
from scripts.serve.server import start, stop

CONTAINER = Path("deploy/container")


def _hadolint(dockerfile: Path) -> str:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--no-color", dockerfile], capture_output=True, text=True, check=False
    )
    return done.stdout


def test_the_dockerfile_has_no_finding_and_a_mistake_in_it_has(tmp_path: Path) -> None:
    assert _hadolint(CONTAINER / "Dockerfile") == ""
    broken = tmp_path / "Dockerfile"
    text = (CONTAINER / "Dockerfile").read_text()
    broken.write_text(text.replace("python:3.11.14-slim-bookworm", "python"))
    broken.write_text(broken.read_text() + "RUN apt-get install curl\n")
    assert "DL3008" in _hadolint(broken)


def test_the_image_ends_as_an_ordinary_user_with_files_that_exist() -> None:
    final = (CONTAINER / "Dockerfile").read_text().rsplit("\nFROM ", 1)[1]
    users = re.findall(r"^USER (\S+)", final, re.MULTILINE)
    assert users == ["10001:10001"]
    assert not re.search(r"\b(gcc|build-essential|apt-get)\b", final)
    ignored = Path(".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", final, re.MULTILINE):
        for source in line.split():
            assert source == "model_store/densenet121.mar" or Path(source).is_file()
            assert any(source == k or source.startswith(f"{k}/") for k in kept), source


def test_every_package_of_the_image_is_pinned() -> None:
    locked = {line.split("==")[0] for line in Path("requirements.lock").read_text().splitlines()}
    wanted = [
        line
        for line in (CONTAINER / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(wanted) > 5
    assert set(wanted) <= locked


def _properties(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_containers_configuration_differs_where_it_says_so() -> None:
    here, there = (_properties(p / "config.properties") for p in (Path(), CONTAINER))
    different = {key for key in here | there if here.get(key) != there.get(key)}
    assert different == {
        "inference_address",
        "metrics_address",
        "model_store",
        "metrics_config",
        "default_workers_per_model",
    }
    assert there["management_address"].startswith("http://127.0.0.1:")


@pytest.fixture
def server(archive: Path, tmp_path: Path) -> Iterator[Running]:
    running = start(archive, free_ports(), workers=1, run_dir=tmp_path)
    yield running
    stop(running, tmp_path)


def test_the_probe_is_ready_while_a_worker_is_and_not_without(server: Running) -> None:
    def probe(port: int) -> int:
        return subprocess.run(
            [sys.executable, CONTAINER / "ready.py"],
            env={"MANAGEMENT_PORT": str(port)},
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode

    assert probe(server.ports.management) == 0
    assert probe(server.ports.metrics) == 1


class _SaysReady(BaseHTTPRequestHandler):
    """A management API that calls READY what is no worker, as TorchServe's does after a stream."""

    pids: ClassVar[list[int]]

    def do_GET(self) -> None:
        body = json.dumps([{"workers": [{"pid": p, "status": "READY"} for p in self.pids]}])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_the_probe_believes_processes_and_not_the_management_api() -> None:
    ended = subprocess.Popen(["true"])  # noqa: S607
    with HTTPServer(("127.0.0.1", 0), _SaysReady) as api:
        thread = threading.Thread(target=api.serve_forever)
        thread.start()
        # A zombie, this test, and an id that no process has.
        _SaysReady.pids = [ended.pid, os.getpid(), 2**22 + 1]
        try:
            done = subprocess.run(
                [sys.executable, CONTAINER / "ready.py"],
                env={"MANAGEMENT_PORT": str(api.server_port)},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            api.shutdown()
            thread.join()
            ended.wait()
    assert (done.returncode, done.stderr.strip()) == (1, "not ready: no worker is")
