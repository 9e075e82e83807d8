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

from deploy.container import ready
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


@pytest.mark.parametrize("stage", ["ray", "server"])
def test_the_image_ends_as_an_ordinary_user_with_files_that_exist(stage: str) -> None:
    stages = (CONTAINER / "Dockerfile").read_text().split("\nFROM ")
    final = stages[{"ray": -2, "server": -1}[stage]]
    assert final.startswith("${BASE} AS ray\n") == (stage == "ray")
    users = re.findall(r"^USER (\S+)", final, re.MULTILINE)
    assert users == ["10001:10001"]
    assert not re.search(r"\b(gcc|build-essential|pip)\b", final)
    ignored = Path(".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", final, re.MULTILINE):
        for source in (part.rstrip("/") for part in line.split()):
            if source == "model_store":
                assert "model_store/densenet121.mar" in kept
                continue
            assert Path(source).exists(), source
            assert any(source == k or source.startswith(f"{k}/") for k in kept), source


def test_every_package_of_the_images_is_pinned_as_for_running() -> None:
    def pins(path: Path) -> set[str]:
        found = re.findall(r"^([a-z0-9.-]+==[^ ]+)", path.read_text(), re.MULTILINE)
        return set(found)

    # The tests' group has what the image's gRPC needs and no other part of the project does.
    known = pins(Path("requirements.lock")) | pins(Path("tests/requirements.lock"))
    known_to_ray = known | pins(Path("batch/requirements.lock"))
    for folder, others in ((CONTAINER, known), (Path("deploy/ray"), known_to_ray)):
        image = pins(folder / "requirements.lock")
        wanted = [
            line.split("[")[0]
            for line in (folder / "requirements.in").read_text().splitlines()
            if line and not line.startswith("#")
        ]
        assert len(wanted) > 5
        assert set(wanted) <= {pin.split("==")[0] for pin in image}
        names = {pin.split("==")[0] for pin in others}
        # Ray's head needs what nothing else here does.
        assert {pin for pin in image if pin.split("==")[0] in names} <= others
        assert folder != CONTAINER or image <= others


def _properties(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_containers_configuration_differs_where_it_says_so() -> None:
    here, there = (_properties(p / "config.properties") for p in (Path(), CONTAINER))
    different = {key for key in here | there if here.get(key) != there.get(key)}
    assert different == {
        "inference_address",  # nginx is before it
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


def test_it_is_ready_while_a_worker_is_and_not_without(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGEMENT_PORT", str(server.ports.management))
    assert ready.why_not_ready() is None
    monkeypatch.setenv("MANAGEMENT_PORT", str(server.ports.metrics))
    assert ready.why_not_ready() is not None


def test_the_command_says_what_the_first_process_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe() -> int:
        command = [sys.executable, "-m", "deploy.container.ready"]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert probe() == 1
    ready.folder().mkdir()
    ready.note().touch()
    assert probe() == 0


class _SaysReady(BaseHTTPRequestHandler):
    """A management API that calls READY what is no worker, as TorchServe's does after a stream."""

    pids: ClassVar[list[int]]

    def do_GET(self) -> None:
        workers = [{"pid": pid, "status": "READY"} for pid in self.pids]
        models = {"models": [{"modelName": "densenet121"}]}
        body = json.dumps(models if self.path == "/models" else [{"workers": workers}])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_processes_are_believed_and_not_the_management_api(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = subprocess.Popen(["true"])  # noqa: S607
    with HTTPServer(("127.0.0.1", 0), _SaysReady) as api:
        thread = threading.Thread(target=api.serve_forever)
        thread.start()
        monkeypatch.setenv("MANAGEMENT_PORT", str(api.server_port))
        # A zombie, this test, and an id that no process has.
        _SaysReady.pids = [ended.pid, os.getpid(), 2**22 + 1]
        try:
            reason = ready.why_not_ready()
        finally:
            api.shutdown()
            thread.join()
            ended.wait()
    assert reason == "no worker is ready for densenet121"
