"""What the watch makes of a node's processes and answers, with the clock in its own hands."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from scripts.gateway import health
from scripts.gateway.health import DEAD_WORKERS, HUNG, SILENT, STUCK, Health


class Node:
    """A node as the watch sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.answers = True
        self.living, self.status = 1, "READY"
        self.cpu = 0.0
        self.share = 0.0
        self.killed: list[Any] = []
        frontend = SimpleNamespace(children=lambda recursive=False: [])  # noqa: ARG005
        running = SimpleNamespace(process=lambda: frontend)
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


def test_a_node_whose_answers_stay_away_is_taken_out_though_its_workers_are_ready(
    node: Node, seen: Health
) -> None:
    node.answers, node.share = False, 1.0
    assert node.look(SILENT + 3, seen) == []
    assert seen.failures >= 2
    # Busy is ready.
    assert seen.ready


def test_workers_that_hang_are_ended_soon_and_busy_ones_late(node: Node, seen: Health) -> None:
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


def test_an_answer_to_anybody_is_a_sign_of_life(node: Node, seen: Health, tmp_path: Any) -> None:
    node.answers = False
    (tmp_path / "logs").mkdir()
    for number in range(20):
        (tmp_path / "logs" / "requests.log").write_text("x" * number)
        assert node.look(2, seen) == []
    assert seen.failures == 0


def test_a_frontend_that_calls_dead_workers_ready_is_ended(node: Node, seen: Health) -> None:
    node.living = 0
    assert node.look(DEAD_WORKERS - 2, seen) == []
    assert not seen.ready
    (said,) = node.look(3, seen)
    assert "dead workers" in said
    assert node.killed


def test_a_worker_that_is_being_replaced_gets_its_time(node: Node, seen: Health) -> None:
    node.living, node.status = 0, "UNLOADED"
    assert node.look(120, seen) == []
    assert not seen.ready
    assert seen.failures == 120


def test_the_server_of_make_run_is_not_ended(node: Node, seen: Health) -> None:
    node.living = 0
    assert node.look(120, seen, own=False) == []
    assert node.killed == []


# As the handler does: a child that computes until the kernel ends it, then the next one.
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


@pytest.fixture
def worker(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that is told to start a decoder, and to wait for its end, line by line."""
    program = tmp_path / "model_service_worker.py"
    program.write_text(_WORKER)
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def _tell(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    assert worker.stdout.readline()


def test_work_in_a_process_that_ended_counts_and_that_process_is_no_worker(
    worker: "subprocess.Popen[str]",
) -> None:
    """Else the share of a worker falls with each end of its decoder, and it seems to hang."""
    running: Any = SimpleNamespace(process=psutil.Process)
    seen = [health._cpu_seconds(running)]
    for _ in range(2):
        _tell(worker)
        assert health._pids(running) == {worker.pid}
        seen.append(health._cpu_seconds(running))
        _tell(worker)
        seen.append(health._cpu_seconds(running))
        assert health._pids(running) == {worker.pid}
    assert all(after > before - 0.1 for before, after in itertools.pairwise(seen)), seen
    # Two decoders of 0.6 s by the kernel's ticks, which a busy machine takes for more than it was.
    assert seen[-1] - seen[0] > 0.4, seen


def test_a_frontend_that_ends_while_it_is_looked_at_has_no_workers() -> None:
    def children(**_: object) -> list[psutil.Process]:
        raise psutil.NoSuchProcess(1)

    running: Any = SimpleNamespace(process=lambda: SimpleNamespace(children=children))
    assert health._pids(running) == set()
    assert health._cpu_seconds(running) == 0.0
