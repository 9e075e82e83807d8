"""`make status`: what it shows, and what makes it fail."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import run
from scripts.serve import commands, management
from scripts.serve.running import STATE, Ports, ServerState
from scripts.terminal import UserError

Status = Callable[..., int]


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerState:
    """A server whose worker is a child of this test's parent."""
    (tmp_path / STATE).touch()
    state = ServerState(os.getppid(), str(tmp_path), Ports(), {"pets": ""}, "pets", workers=2)
    monkeypatch.setattr(commands, "require_running", lambda: state)
    monkeypatch.setattr(commands, "find_faults", lambda *_: [])
    monkeypatch.setattr(commands, "is_worker_alive", lambda pid, _: pid > 1)
    return state


@pytest.fixture
def status(running: ServerState, monkeypatch: pytest.MonkeyPatch) -> Status:
    """Run the command for workers in these states, each with a process."""

    def run(*states: str, wanted: int = 2, dead: int = 0) -> int:
        workers = [
            {"id": str(9000 + number), "pid": os.getpid() if number >= dead else 1, "status": state}
            for number, state in enumerate(states)
        ]
        model: dict[str, Any] = {
            "modelName": running.model,
            "modelVersion": "1.0",
            "minWorkers": wanted,
            "workers": workers,
            "jobQueueStatus": {"pendingRequests": 0, "remainingCapacity": 64},
        }
        monkeypatch.setattr(commands, "model_status", lambda _: model)
        return commands.status_command()

    return run


def test_status_succeeds_and_shows_versions_if_all_workers_can_answer(
    status: Status, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks only for packages that every installation has."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", Path("requirements/run.lock").read_text(), re.M))
    monkeypatch.setattr(commands, "version", pinned.__getitem__)
    assert status("READY", wanted=1) == 0
    printed = capsys.readouterr().out
    assert "WARNING" not in printed
    assert f"Versions: torchserve {pinned['torchserve']}, onnxruntime" in printed


def test_status_fails_if_fewer_workers_can_answer_than_are_wanted(
    status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    for states, wanted, dead, message in (
        ((), 0, 0, "pets: 0 of 1 worker(s) can answer. Start some: make scale WORKERS=2"),
        ((), 2, 0, "pets: 0 of 2 worker(s) can answer."),
        (("READY", "UNLOADING"), 2, 0, "pets: 1 of 2 worker(s) can answer."),
        (("READY",), 1, 1, "pets: 0 of 1 worker(s) can answer."),
    ):
        assert status(*states, wanted=wanted, dead=dead) == 1
        assert message in capsys.readouterr().out


def test_status_fails_and_scale_does_not_wait_if_the_servers_files_are_gone(
    running: ServerState, status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(running.temporary, STATE).unlink()
    assert status("READY", "READY") == 1
    assert "were deleted: a worker that crashes cannot be replaced" in capsys.readouterr().out
    with pytest.raises(UserError, match="were deleted: a worker that crashes"):
        management.scale(running, 3)


def test_status_fails_for_faults_of_the_operating_system(
    status: Status, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "find_faults", lambda *_: ["The disk is full."])
    monkeypatch.setattr(ServerState, "process", lambda _: object())
    monkeypatch.setattr(commands, "stopped_workers", lambda _: [])
    assert status("READY", "READY") == 1
    assert "The disk is full." in capsys.readouterr().out


def test_run_replaces_a_server_whose_files_are_gone(
    running: ServerState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_running", lambda: running)
    monkeypatch.setattr(run, "ready_per_model", lambda _: [2])
    monkeypatch.setattr(run, "sha256", lambda _: "")
    stopped: list[ServerState] = []
    for name in ("check_start", "start"):
        monkeypatch.setattr(run, name, lambda *_, **__: running)
    monkeypatch.setattr(run, "stop", stopped.append)
    run._serve([tmp_path / "pets.mar"], Ports(), None, grpc=False)
    assert not stopped
    Path(running.temporary, STATE).unlink()
    run._serve([tmp_path / "pets.mar"], Ports(), None, grpc=False)
    assert stopped == [running]
