"""What the supervisor makes of a node's processes and answers, by a clock of the test's own."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from scripts.gateway import health
from scripts.gateway.health import DEAD_WORKERS, HUNG, SILENT, STUCK, Health


class Node:
    """A node as the supervisor sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.answers = True
        self.living, self.status = 1, "READY"
        self.cpu = 0.0
        self.share = 0.0
        self.killed: list[Any] = []
        running = SimpleNamespace(process=lambda: SimpleNamespace(children=lambda **_: []))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(health, "find_running", lambda _: running)
        monkeypatch.setattr(health, "ready_workers", lambda *_, **__: self.living)
        monkeypatch.setattr(
            health,
            "model_status",
            lambda *_, **__: {
                "workers": [{"status": self.status}],
                "jobQueueStatus": {"pendingRequests": 1},
            },
        )
        monkeypatch.setattr(health, "_cpu_seconds", lambda _: self.cpu)
        monkeypatch.setattr(health, "_kill", self.killed.append)
        monkeypatch.setattr(health, "_Question", self._question)

    def _question(self, _: object, cpu_before: float) -> SimpleNamespace:
        return SimpleNamespace(
            since=self.now, cpu_before=cpu_before, answered=self.answers, lost=False
        )

    def look(self, seconds: float, seen: Health, *, own: bool = True) -> list[str]:
        """Looks once a second; returns what was ended."""
        ended = []
        for _ in range(round(seconds)):
            self.now += 1
            self.cpu += self.share
            ended.append(seen.look(own=own))
        return [text for text in ended if text]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(monkeypatch)


@pytest.fixture
def seen(node: Node, tmp_path: Any) -> Health:
    """Looked at a few times while all was well."""
    seen = Health(tmp_path)
    assert node.look(5, seen) == []
    assert (seen.failures, seen.ready) == (0, True)
    return seen


def test_a_node_without_answers_is_unhealthy_though_its_workers_are_ready(
    node: Node, seen: Health
) -> None:
    node.answers, node.share = False, 1.0
    assert node.look(SILENT + 3, seen) == []
    assert seen.failures >= 2
    # Busy is ready.
    assert seen.ready


def test_hung_workers_are_killed_soon_and_busy_ones_late(node: Node, seen: Health) -> None:
    node.answers = False
    (said,) = node.look(HUNG + 2, seen)
    assert "idle" in said
    assert seen.ended is not None
    assert seen.ended[1] is False
    node.share = 0.9
    assert node.look(HUNG + 10, seen) == []
    (said,) = node.look(STUCK - HUNG, seen)
    assert "at work" in said
    assert seen.ended[1] is True


def test_an_answer_to_anybody_is_a_sign_of_life(node: Node, seen: Health, tmp_path: Path) -> None:
    node.answers = False
    (tmp_path / "logs").mkdir()
    for number in range(20):
        (tmp_path / "logs" / "requests.log").write_text("x" * number)
        assert node.look(2, seen) == []
    assert seen.failures == 0


def test_a_frontend_that_calls_dead_workers_ready_is_killed(node: Node, seen: Health) -> None:
    node.living = 0
    assert node.look(DEAD_WORKERS - 2, seen) == []
    assert not seen.ready
    (said,) = node.look(3, seen)
    assert "dead workers" in said
    assert node.killed


@pytest.mark.parametrize(
    ("status", "own"), [("UNLOADED", True), ("READY", False)], ids=["being replaced", "of make run"]
)
def test_a_frontend_is_not_killed(status: str, own: bool, node: Node, seen: Health) -> None:  # noqa: FBT001
    node.living, node.status = 0, status
    assert node.look(120, seen, own=own) == []
    assert node.killed == []
    assert (seen.ready, seen.failures) == (False, 120)


# As the handler does: on a line of input it starts a child that computes for 0.6 s, and prints a
# line; on the next one it waits for the child's end, and prints another.
_WORKER = """
import subprocess, sys
compute = (
    "import signal; signal.setitimer(signal.ITIMER_PROF, 0.6);"
    "print('computing', flush=True)\\nwhile True: pass"
)
for _ in sys.stdin:
    child = subprocess.Popen([sys.executable, "-c", compute], stdout=subprocess.PIPE)
    child.stdout.readline()
    print("started", flush=True)
    sys.stdin.readline()
    child.wait()
    print("ended", flush=True)
"""


@pytest.mark.timeout(60)
def test_the_work_of_a_decoder_counts_after_its_end_and_it_is_no_worker(tmp_path: Path) -> None:
    """Else the share of a worker falls with each end of its decoder, and it seems to hang."""
    program = tmp_path / "model_service_worker.py"
    program.write_text(_WORKER)
    running: Any = SimpleNamespace(process=psutil.Process)
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        used = [health._cpu_seconds(running)]
        for _ in ("starts", "ends"):
            worker.stdin.write(b"\n")
            worker.stdin.flush()
            assert worker.stdout.readline()
            assert health._pids(running) == {worker.pid}
            used.append(health._cpu_seconds(running))
        worker.kill()
    # A decoder of 0.6 s by the kernel's ticks, which a busy machine takes for more than it was.
    assert used[2] - used[0] > 0.2
    assert used[2] > used[1] - 0.1


def test_a_frontend_that_ends_while_it_is_looked_at_has_no_workers() -> None:
    def children(**_: object) -> list[psutil.Process]:
        raise psutil.NoSuchProcess(1)

    running: Any = SimpleNamespace(process=lambda: SimpleNamespace(children=children))
    assert health._pids(running) == set()
    assert health._cpu_seconds(running) == 0.0
