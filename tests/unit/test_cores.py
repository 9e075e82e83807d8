"""How workers share the cores, with real processes."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler.cores import Cores

SHARE, ALL = 1, 4

# Another worker: busy, or there and idle, until its standard input ends.
OTHER = """
import sys
from contextlib import nullcontext
from pathlib import Path
from handler.cores import Cores
cores = Cores(1, 4, Path(sys.argv[1]))
with cores.busy(crowded=False) if sys.argv[2] == "busy" else nullcontext():
    print(sys.argv[2], flush=True)
    sys.stdin.read()
"""


def other_worker(lock_file: Path, state: str = "busy", prelude: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + OTHER, str(lock_file), state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{state}\n"
    return process


def test_a_worker_alone_takes_all_cores_and_keeps_to_its_share_beside_another(
    tmp_path: Path,
) -> None:
    cores = Cores(SHARE, ALL, tmp_path / "busy")
    with cores.busy(crowded=False):
        assert cores.available() == ALL
        with other_worker(tmp_path / "busy") as other:
            assert cores.available() == SHARE
            other.communicate()
        assert cores.available() == ALL


@pytest.mark.timeout(30)
def test_workers_of_two_containers_can_have_equal_process_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the file, and neither waits for the other."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    cores = Cores(SHARE, ALL, tmp_path / "busy")
    prelude = "import os\nos.getpid = lambda: 7\n"
    with cores.busy(crowded=False), other_worker(tmp_path / "busy", prelude=prelude) as other:
        assert cores.available() == SHARE
        other.communicate()


def test_a_look_at_the_others_takes_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts or becomes busy at that moment would find its byte taken."""
    cores = Cores(SHARE, ALL, tmp_path / "busy")
    with other_worker(tmp_path / "busy") as other:
        with cores.busy(crowded=False):
            monkeypatch.setattr(fcntl, "lockf", lambda *_: pytest.fail("a lock was taken"))
            assert cores.available() == SHARE
            monkeypatch.undo()
        other.communicate()


def test_a_killed_worker_does_not_count_as_busy(tmp_path: Path) -> None:
    cores = Cores(SHARE, ALL, tmp_path / "busy")
    with other_worker(tmp_path / "busy") as other:
        other.kill()
        other.wait()
        with cores.busy(crowded=False):
            assert cores.available() == ALL


def test_a_worker_keeps_to_its_share_while_requests_wait_for_others_too(tmp_path: Path) -> None:
    cores = Cores(SHARE, ALL, tmp_path / "busy")
    with other_worker(tmp_path / "busy", "idle") as other:
        with cores.busy(crowded=True):
            assert cores.available() == SHARE
        with cores.busy(crowded=False):
            assert cores.available() == ALL
        other.communicate()
    with cores.busy(crowded=True):
        assert cores.available() == ALL, "there is nobody else to do the work"


def test_fewer_cores_than_the_share_do_not_take_any_away(tmp_path: Path) -> None:
    assert Cores(4, 1, tmp_path / "busy").available() == 4
