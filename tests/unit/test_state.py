"""Recognising processes, and the files that remember them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from scripts import run
from scripts.serve import commands
from scripts.serve.running import find_running, require_running
from scripts.state import living_process, process_of, recall, remember, started
from scripts.terminal import UserError

OLD, NEW = {"pid": 1, "name": "old" * 20_000}, {"pid": 2, "name": "new" * 20_000}


def test_a_step_of_the_clock_changes_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """When somebody sets the clock, the kernel's time of boot moves by as much."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        when = started(process.pid)
        by_the_clock = psutil.Process(process.pid).create_time()
        boot_time = psutil.boot_time()
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time + 3600)
        assert abs(psutil.Process(process.pid).create_time() - by_the_clock) > 3000
        assert living_process(process.pid, when) is not None
        assert started(process.pid) == when
        process.kill()
        process.wait()
        assert living_process(process.pid, when) is None


def test_a_process_is_found_by_whole_words_of_its_command_line(tmp_path: Path) -> None:
    words = ("-f", str(tmp_path / "a folder" / "config.properties"))
    command = [sys.executable, "-c", "input()", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        found = process_of(*words)
        assert found is not None
        assert found.pid == process.pid
        assert process_of(words[1][:-1]) is None, "another folder that begins like it"
        assert process_of(*words, "-g") is None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_of(*words) is None, "a process that has ended, and was not waited for"


@pytest.mark.slow
def test_a_file_is_whole_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    """Once for each line of Python that runs while it is written."""
    path = tmp_path / "state.json"
    remember(path, OLD)
    finished, lines = False, 0
    while not finished:
        lines += 1
        finished = _write_and_die(path, at=lines)
        assert recall(path) in (OLD, NEW)
    assert lines > 20
    assert recall(path) == NEW
    assert path.stat().st_mode & 0o077 == 0


def _write_and_die(path: Path, at: int) -> bool:
    """Whether a process that is killed before so many lines had finished by then."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def tracer(_: FrameType, event: str, __: Any) -> Any:
            nonlocal count
            count += event == "line"
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return tracer

        sys.settrace(tracer)
        remember(path, NEW)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFEXITED(status)


def cut(path: Path) -> None:
    path.write_text('{"pid": 12, "star')


def of_another_version(path: Path) -> None:
    path.write_text('{"pid": 12, "created": 1.5}')


def no_object(path: Path) -> None:
    path.write_text("[1]")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("spoil", [cut, of_another_version, no_object, no_text, a_folder])
@pytest.mark.parametrize(
    "look",
    [
        find_running,
        require_running,
        commands.status_command,
        lambda: commands.scale_command(1),
        commands.stop_command,
        commands.start_command,
        run.main,
    ],
    ids=["find", "require", "status", "scale", "stop", "start", "run"],
)
def test_what_cannot_be_read_is_reported_and_kept(
    spoil: Callable[[Path], None],
    look: Callable[[], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(".run/server.json")
    path.parent.mkdir()
    spoil(path)
    with pytest.raises(UserError, match=r"server\.json"):
        look()
    assert path.exists()


def test_stop_clears_what_a_dead_server_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "torchserve-1"
    temporary.mkdir()
    path = Path(".run/server.json")
    path.parent.mkdir()
    dead = {"pid": 2**22 + 1, "started": "boot/1", "temporary": str(temporary), "model": "m"}
    remember(path, {**dead, "ports": {}, "models": {"m": "0"}})
    assert find_running() is None
    assert path.exists(), "who only looks removes nothing"
    assert temporary.exists()
    commands.stop_command()
    assert "what it left is cleared" in capsys.readouterr().out
    assert not path.exists()
    assert not temporary.exists()
