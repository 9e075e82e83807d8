"""Find faults that TorchServe does not detect, for supervisors and `make status`.

These are suspended workers, long outages, and a lack of file descriptors or disk space.
"""

import resource
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

# Seconds after which a suspended worker is killed; a debugger or terminal may continue it before.
_STOPPED_SECONDS = 10.0
_MAX_DESCRIPTOR_SHARE = 0.9
_MIN_FREE_BYTES = 200 << 20
# TorchServe replaces a crashed worker within 6 s; a large model takes a minute to load.
OUTAGE_SECONDS = 120.0
_OUTAGE_INTERVAL = 5.0


class Upkeep:
    """Kills workers that stay suspended; a supervisor calls `run` in its loop."""

    def __init__(self, frontend: psutil.Process) -> None:
        """Take the frontend's process."""
        self._frontend = frontend
        self._stopped: dict[int, float] = {}

    def run(self) -> None:
        """Kill workers that were suspended for `_STOPPED_SECONDS`; TorchServe replaces them."""
        now = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            stopped = {worker.pid: worker for worker in stopped_workers(self._frontend)}
            self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}
            for pid, since in self._stopped.items():
                if now > since + _STOPPED_SECONDS:
                    stopped[pid].kill()


class Outage:
    """Measures how long a model has had no ready worker; a supervisor calls `check` in its loop."""

    def __init__(self) -> None:
        self._checked = self._ready = time.monotonic()

    def check(self, is_ready: Callable[[], bool]) -> str | None:
        """Return a message if the outage is longer than `OUTAGE_SECONDS`."""
        now = time.monotonic()
        if now < self._checked + _OUTAGE_INTERVAL:
            return None
        self._checked = now
        if is_ready():
            self._ready = now
        if now < self._ready + OUTAGE_SECONDS:
            return None
        return f"A model has had no ready worker for {now - self._ready:.0f} s."


def stopped_workers(frontend: psutil.Process) -> list[psutil.Process]:
    """Return the workers that are suspended by SIGSTOP or a debugger."""
    states = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    with suppress(psutil.NoSuchProcess):  # the frontend has just exited
        return [each for each in frontend.children() if _status(each) in states]
    return []


def find_faults(frontend: psutil.Process, folders: Iterable[Path]) -> Iterable[str]:
    """Yield messages about faults that TorchServe does not report.

    Args:
        frontend: the frontend's process.
        folders: folders to which the server and the gateway write.
    """
    stopped = [str(worker.pid) for worker in stopped_workers(frontend)]
    if stopped:
        yield (
            f"Workers were stopped and do not respond: {', '.join(stopped)}. Continue them with "
            "kill -CONT, or kill them, and TorchServe replaces them."
        )
    with suppress(psutil.Error, AttributeError):  # AttributeError: not Linux
        used, (limit, _) = frontend.num_fds(), frontend.rlimit(resource.RLIMIT_NOFILE)
        if used > _MAX_DESCRIPTOR_SHARE * limit:
            yield (
                f"TorchServe uses {used} of {limit} file descriptors: further connections will "
                "hang. Raise the limit (ulimit -n), or put the gateway in front."
            )
    full = [str(folder) for folder in folders if _free_bytes(folder) < _MIN_FREE_BYTES]
    if full:
        yield (
            f"The disk is full: less than {_MIN_FREE_BYTES >> 20} MiB are free in "
            f"{', '.join(full)}. Logs and large uploads fail."
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else _MIN_FREE_BYTES


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
