"""How workers share the cores, with real processes."""

import subprocess
import sys
from pathlib import Path

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


def other_worker(meeting_place: Path, state: str = "busy") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(meeting_place), state],
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
