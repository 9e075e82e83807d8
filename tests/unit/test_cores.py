"""How workers share the cores, with real processes."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler.inference.cores import Cores

SHARE, ALL = 1, 4

# Another worker, of process id 7: busy, or idle after it was busy, until its standard input ends.
OTHER = """
import os, sys
from pathlib import Path
from handler.inference.cores import Cores
os.getpid = lambda: 7
cores = Cores(1, 4, Path(sys.argv[1]))
with cores.busy(queue_not_empty=False):
    if sys.argv[2] == "busy":
        print("busy", flush=True)
        sys.stdin.read()
print("idle", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "busy"


def other_worker(lock_file: Path, state: str = "busy") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(lock_file), state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{state}\n"
    return process


@pytest.mark.timeout(30)
@pytest.mark.parametrize("own", [7, 8], ids=["equal process ids, as of two containers", "others"])
def test_a_single_busy_worker_uses_all_cores_and_otherwise_its_share(
    own: int, lock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: own)
    cores = Cores(SHARE, ALL, lock_file)
    with cores.busy(queue_not_empty=False):
        assert cores.available() == ALL
        with other_worker(lock_file) as other:
            # A worker that becomes busy at this moment must not find its byte locked by a look.
            with monkeypatch.context() as looking:
                looking.setattr(fcntl, "lockf", lambda *_: pytest.fail("a lock was taken"))
                assert cores.available() == SHARE
            other.communicate()
        assert cores.available() == ALL


def test_a_killed_worker_does_not_count_as_busy(lock_file: Path) -> None:
    cores = Cores(SHARE, ALL, lock_file)
    with other_worker(lock_file) as other, cores.busy(queue_not_empty=False):
        assert cores.available() == SHARE
        other.kill()
        other.wait()
        assert cores.available() == ALL


def test_a_worker_keeps_to_its_share_while_requests_wait_for_idle_workers(lock_file: Path) -> None:
    cores = Cores(SHARE, ALL, lock_file)
    with other_worker(lock_file, "idle") as other:
        with cores.busy(queue_not_empty=True):
            assert cores.available() == SHARE
        with cores.busy(queue_not_empty=False):
            assert cores.available() == ALL
        other.communicate()
    with cores.busy(queue_not_empty=True):
        assert cores.available() == ALL, "there is nobody else to do the work"
    assert Cores(ALL, SHARE, lock_file).available() == ALL, "fewer cores than the share"


@pytest.mark.parametrize("faster", [SHARE, ALL])
def test_a_single_worker_keeps_the_faster_number_of_threads(
    faster: int, lock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    cores, used = Cores(SHARE, ALL, lock_file), []
    for image in range(30):
        with cores.busy(queue_not_empty=False), cores.threads() as threads:
            used.append(threads)
            # Once in a while something else makes the better one slower.
            clock += 1 if threads == faster and image % 5 else 2
    assert set(used[:14]) == {SHARE, ALL}
    assert set(used[14:]) == {faster}
    with other_worker(lock_file) as other:
        with cores.busy(queue_not_empty=False), cores.threads() as threads:
            assert threads == SHARE
        other.communicate()
