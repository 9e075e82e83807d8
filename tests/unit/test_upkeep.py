"""What a supervisor does for a running server, with stand-ins for Java and a worker."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from scripts.serve import server, upkeep
from scripts.serve.management import wait_until
from scripts.serve.running import STATE, Ports, ServerState
from scripts.serve.upkeep import Upkeep, find_faults, stopped_workers

PROGRAM = "import subprocess, sys; subprocess.run(['sleep', '60']); sys.stdin.read()"


@pytest.fixture
def frontend() -> Iterator[psutil.Process]:
    """A process with one child."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE) as process:
        found = psutil.Process(process.pid)
        try:
            assert wait_until(lambda: len(found.children()) == 1, 10)
            yield found
        finally:
            with suppress(psutil.NoSuchProcess):
                for child in found.children():
                    child.kill()
            process.kill()


@pytest.mark.parametrize("continues", [False, True])
def test_a_worker_is_killed_only_if_it_stays_stopped(
    continues: bool, frontend: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    (worker,) = frontend.children()
    care = Upkeep(frontend)
    worker.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: stopped_workers(frontend) == [worker], 10)
    care.run()
    if continues:
        worker.send_signal(signal.SIGCONT)
        assert wait_until(lambda: not stopped_workers(frontend), 10)
    care.run()
    assert worker.is_running()
    monkeypatch.setattr(upkeep, "_STOPPED_SECONDS", 0)
    care.run()
    if continues:
        assert worker.is_running()
    else:
        assert wait_until(lambda: not frontend.children(), 10)


def test_faults_that_torchserve_does_not_report_are_named(
    frontend: psutil.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path, tmp_path / "deleted"]
    assert list(find_faults(frontend, folders)) == []
    (worker,) = frontend.children()
    worker.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: bool(stopped_workers(frontend)), 10)
    monkeypatch.setattr(upkeep, "_MIN_FREE_BYTES", 1 << 60)
    used = frontend.num_fds()
    frontend.rlimit(psutil.RLIMIT_NOFILE, (used, used))
    faults = "\n".join(find_faults(frontend, folders))
    assert str(worker.pid) in faults
    assert f"TorchServe uses {used} of {used} file descriptors" in faults
    assert "The disk is full: " in faults
    assert f"are free in {tmp_path}. Logs and large uploads fail." in faults
    for process in (worker, frontend):
        process.kill()
    psutil.wait_procs([frontend], timeout=10)
    Upkeep(frontend).run()  # a frontend that exited is no error


def test_a_long_outage_is_reported_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outage = upkeep.Outage()
    for seconds, is_ready, reported in (
        (100, False, False),
        (10, True, False),
        (100, False, False),
        (30, False, True),
    ):
        now += seconds
        message = outage.check(lambda ready=is_ready: ready)  # type: ignore[misc]
        assert bool(message) == reported
    assert message == "A model has had no ready worker for 130 s."


@pytest.mark.parametrize("fault", ["files", "workers"])
def test_a_supervised_server_that_cannot_recover_exits_for_its_supervisor(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "workers":
        (tmp_path / STATE).touch()
        monkeypatch.setattr(upkeep, "OUTAGE_SECONDS", 0)
        monkeypatch.setattr(upkeep, "_OUTAGE_INTERVAL", 0)
        monkeypatch.setattr(server, "ready_per_model", lambda _: [0])
    running = ServerState(1, str(tmp_path), Ports(), {"pets": ""}, "pets")
    alive = [True]
    monkeypatch.setattr(ServerState, "process", lambda _: alive or None)
    monkeypatch.setattr(server, "Upkeep", MagicMock())
    monkeypatch.setattr(server, "stop", lambda *_: alive.clear())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert server.supervise(running) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    reason = {"files": "were deleted", "workers": "A model has had no ready worker for"}[fault]
    assert reason in capsys.readouterr().out
