"""What a node's processes and answers say of it; nothing of what its frontend says of itself counts
alone, which calls workers READY that are dead, hang, or work for ever at one request.
"""

import threading
import time
from pathlib import Path

import psutil
import requests

from scripts.serve.management import model_status, ready_workers
from scripts.serve.running import Running, find_running, worker_processes

# Seconds without any answer, while a question waits for one, after which a node
SILENT = 3.0  # is asked no more, if there are others
HUNG = 8.0  # has its workers ended, if they did nothing meanwhile
STUCK = 25.0  # has them ended in any case; eight pictures of the most costly kind take 16
# Seconds without an answer from the frontend's management after which it is ended.
FRONTEND_HUNG = 30.0
# Seconds for which it may call dead workers READY; it replaces a killed one within 6.
DEAD_WORKERS = 15.0
# An idle node is asked so often, in seconds; one that others wait for at once.
_ASK_IDLE = 5.0
# Of a CPU: less is nothing.
_IDLE_SHARE = 0.02
_CHECK_TIMEOUT = 2.0
# Longer than a request takes whose worker is killed.
_STEADY = 3.0
# The question is the page, which a worker answers without looking at a picture.
_QUESTION = {"Accept": "text/html"}


class Health:
    """One node, looked at again and again.

    Attributes:
        failures: looks after which it did not seem able to answer, one after the other.
        ready: whether it can answer, however busy it is.
        ended: when its workers were last ended here, by the monotonic clock, and whether they had
            been at work; None for never.
    """

    def __init__(self, run_dir: Path) -> None:
        """Args: run_dir of the node, see `scripts.serve.server`."""
        self.run_dir = run_dir
        self.failures = 0
        self.ready = False
        self.ended: tuple[float, bool] | None = None
        self._answered = time.monotonic()
        self._managed = self._alive = time.monotonic()
        self._log: tuple[int, int] | None = None
        self._asked: _Question | None = None
        self._pids: set[int] = set()
        self._changed = time.monotonic()

    def steady(self) -> bool:
        """Whether none of its workers has ended for some seconds."""
        running = find_running(self.run_dir)
        if running is None or _pids(running) != self._pids:
            return False
        return time.monotonic() - self._changed > _STEADY

    def look(self, *, own: bool) -> str:
        """Looks once, and ends what hangs.

        Args:
            own: whether a frontend that hangs may be ended, since somebody starts it again.

        Returns:
            what was ended and why, in words; "" for nothing.
        """
        running = find_running(self.run_dir)
        if running is None or ready_workers(running, timeout=_CHECK_TIMEOUT) == 0:
            self.ready = False
            self.failures += 1
            self._asked = None
            return self._end_frontend(running) if own and running is not None else ""
        now = time.monotonic()
        self._managed = self._alive = now
        pids = _pids(running)
        if pids != self._pids:
            self._pids, self._changed = pids, now
        silent = self._silence(running, now)
        self.ready = silent < STUCK
        self.failures = self.failures + 1 if silent >= SILENT else 0
        return self._end_workers(running, silent) if silent >= HUNG else ""

    def _silence(self, running: Running, now: float) -> float:
        """For how long a question has waited while nothing was answered; 0.0 for not at all."""
        log = self._requests_log()
        asked = self._asked
        if log != self._log or (asked is not None and asked.answered):
            self._log, self._answered, self._asked = log, now, None
            return 0.0
        if asked is not None and asked.lost:
            asked = self._asked = None
        if asked is None:
            waited = now - self._answered
            if waited >= _ASK_IDLE or _others_wait(running):
                self._asked = _Question(running, _cpu_seconds(running))
            return 0.0
        return now - asked.since

    def _requests_log(self) -> tuple[int, int] | None:
        """A line is written for every request that a worker answered."""
        try:
            status = (self.run_dir / "logs" / "requests.log").stat()
        except OSError:
            return None
        return status.st_ino, status.st_size

    def _end_workers(self, running: Running, silent: float) -> str:
        assert self._asked is not None
        busy = _cpu_seconds(running) - self._asked.cpu_before > _IDLE_SHARE * silent
        if busy and silent < STUCK:
            return ""
        self.ended = (time.monotonic(), busy)
        self._asked = None
        for worker in worker_processes(running):
            for process in _with_children(worker):
                _kill(process)
        doing = "at work" if busy else "idle"
        return f"no answer for {silent:.0f} s, its workers were {doing} and have been ended"

    def _end_frontend(self, running: Running) -> str:
        """Ends a frontend that will not come back: one whose workers are being replaced will."""
        now = time.monotonic()
        try:
            workers = model_status(running, timeout=_CHECK_TIMEOUT)["workers"]
        except (requests.RequestException, OSError, ValueError):
            silent, limit = now - self._managed, FRONTEND_HUNG
            why = "the frontend gave no answer"
        else:
            self._managed = now
            if not workers or any(worker["status"] != "READY" for worker in workers):
                self._alive = now
            silent, limit = now - self._alive, DEAD_WORKERS
            why = "the frontend called dead workers ready"
        frontend = running.process()
        if silent < limit or frontend is None:
            return ""
        for process in _with_children(frontend):
            _kill(process)
        self._managed = self._alive = now
        return f"{why} for {silent:.0f} s and has been ended"


class _Question:
    """A request for the page, on its way in a thread of its own."""

    def __init__(self, running: Running, cpu_before: float) -> None:
        self.since = time.monotonic()
        self.cpu_before = cpu_before
        self.answered = False
        self.lost = False
        self._running = running
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        try:
            answer = requests.get(
                self._running.predictions_url,
                headers={**_QUESTION, **self._running.authorization("inference")},
                timeout=2 * STUCK,
            )
        except (requests.RequestException, OSError, ValueError):
            self.lost = True
            return
        self.answered = answer.ok
        self.lost = not answer.ok


def _others_wait(running: Running) -> bool:
    try:
        return bool(model_status(running, _CHECK_TIMEOUT)["jobQueueStatus"]["pendingRequests"] > 0)
    except (requests.RequestException, OSError, ValueError):
        return True


def _pids(running: Running) -> set[int]:
    """Of the workers, without the processes in which they decode: those come and go."""
    return {worker.pid for worker in worker_processes(running)}


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    """The processes that it started, and theirs, and itself; none where it has ended."""
    try:
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _cpu_seconds(running: Running) -> float:
    """What the workers have computed so far, in the processes too in which they decode.

    Those end again and again; what the ended ones used is counted with their worker, so that this
    does not fall as long as the workers live.
    """
    total = 0.0
    for worker in worker_processes(running):
        for process in _with_children(worker):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
