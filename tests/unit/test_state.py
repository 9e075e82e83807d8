"""Recognizing processes, and state files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import run
from scripts.serve import commands
from scripts.serve.running import find_running, require_running
from scripts.state import process_by_arguments, write_state
from scripts.terminal import UserError

OLD, NEW = {"pid": 1, "name": "old" * 20_000}, {"pid": 2, "name": "new" * 20_000}


def test_a_process_is_found_by_whole_words_of_its_command_line(tmp_path: Path) -> None:
    words = ("-f", str(tmp_path / "a folder" / "config.properties"))
    command = [sys.executable, "-c", "input()", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        found = process_by_arguments(*words)
        assert found is not None
        assert found.pid == process.pid
        assert process_by_arguments(words[1][:-1]) is None, "another folder that begins like it"
        assert process_by_arguments(*words, "-g") is None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_by_arguments(*words) is None, "a process that exited and was not waited for"


# Forks for each line, since starting Python each time would take minutes.
_KILLED_AT_EACH_LINE = """
import json, os, sys
from pathlib import Path
from scripts import state

def trace(frame, event, argument):
    global seen
    if frame.f_code.co_filename != state.__file__:
        return None
    seen += event == "line"
    if seen == wanted:
        os._exit(9)
    return trace

path, new = Path(sys.argv[1]), json.loads(sys.argv[2])
before, seen, wanted, status = path.read_bytes(), 0, 0, 9
while status:
    path.write_bytes(before)
    wanted += 1
    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        state.write_state(path, new)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps(state.read_state(path)))
"""


def test_a_state_file_is_complete_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_state(path, OLD)
    command = [sys.executable, "-c", _KILLED_AT_EACH_LINE, str(path), json.dumps(NEW)]
    found = [json.loads(line) for line in subprocess.check_output(command).splitlines()]
    assert found.count(OLD) > 5
    assert found[-1] == NEW
    assert all(values in (OLD, NEW) for values in found)
    assert path.stat().st_mode & 0o077 == 0


@pytest.fixture
def state_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a state file that does not exist yet."""
    monkeypatch.chdir(tmp_path)
    Path(".run").mkdir()
    return Path(".run/server.json")


@pytest.mark.parametrize(
    "content",
    [b'{"pid": 12, "star', b'{"pid": 12, "created": 1.5}', b"[1]", b"\xff\xfe\x00", None],
    ids=["cut off", "of another version", "no object", "not text", "a folder"],
)
def test_an_unreadable_state_file_is_reported_and_kept(
    content: bytes | None, state_file: Path
) -> None:
    if content is None:
        state_file.mkdir()
    else:
        state_file.write_bytes(content)
    for command in (
        *(find_running, require_running, commands.status_command, commands.stop_command),
        *(lambda: commands.scale_command(1), commands.start_command, run.main),
    ):
        with pytest.raises(UserError, match=r"server\.json"):
            command()
        assert state_file.exists()


def test_stop_deletes_the_files_of_a_crashed_server(
    state_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "torchserve-1"
    temporary.mkdir()
    # Another process has its id now.
    dead = {"pid": os.getpid(), "temporary": str(temporary), "model": "m"}
    write_state(state_file, {**dead, "ports": {}, "models": {"m": "0"}})
    assert find_running() is None
    assert state_file.exists(), "reading the state deletes nothing"
    assert temporary.exists()
    commands.stop_command()
    assert "its temporary files are deleted" in capsys.readouterr().out
    assert not state_file.exists()
    assert not temporary.exists()
