"""What a supervisor does for a running TorchServe, and what `make status` reports.

TorchServe does not notice that its files were deleted or a worker was stopped, and Java keeps the
memory that a flood of large uploads took.
"""

import resource
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

# The frontend holds 150 to 310 MB under load with small images.
_MAX_IDLE_BYTES = 700_000_000
_INTERVAL = 30.0
# Share of a core below which the frontend is idle.
_IDLE_SHARE = 0.05
_COLLECT_TIMEOUT = 60.0
# A worker that a debugger or a terminal stopped may continue.
_STOPPED_SECONDS = 10.0
_MAX_DESCRIPTOR_SHARE = 0.9


class Upkeep:
    """Called in a supervisor's loop."""

    def __init__(self, frontend: psutil.Process) -> None:
        """Args: Java's process."""
        self._frontend = frontend
        self._checked = time.monotonic()
        self._cpu_seconds = self._collected_at = _cpu_seconds(frontend)
        self._stopped: dict[int, float] = {}

    def run(self) -> None:
        """Return memory that is not needed any more, and kill workers that were stopped."""
        with suppress(psutil.NoSuchProcess):
            self._kill_stopped_workers()
            if time.monotonic() >= self._checked + _INTERVAL:
                self._return_memory()

    def _return_memory(self) -> None:
        """Let Java collect its garbage if it is idle, large, and has worked since the last time."""
        now, used = time.monotonic(), _cpu_seconds(self._frontend)
        share = (used - self._cpu_seconds) / (now - self._checked)
        self._checked, self._cpu_seconds = now, used
        if (
            share < _IDLE_SHARE
            and used > self._collected_at + 1
            and self._frontend.memory_info().rss > _MAX_IDLE_BYTES
        ):
            # Java's own command; a runtime without it keeps the memory.
            java = Path(self._frontend.exe())
            command = [str(java.with_name("jcmd")), str(self._frontend.pid), "GC.run"]
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=_COLLECT_TIMEOUT, check=False)
            self._collected_at = self._cpu_seconds = _cpu_seconds(self._frontend)

    def _kill_stopped_workers(self) -> None:
        """Kill workers that stay stopped; TorchServe replaces them."""
        now = time.monotonic()
        stopped = {worker.pid: worker for worker in stopped_workers(self._frontend)}
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}
        for pid, since in self._stopped.items():
            if now > since + _STOPPED_SECONDS:
                stopped[pid].kill()


def stopped_workers(frontend: psutil.Process) -> list[psutil.Process]:
    """Return the workers that were stopped by SIGSTOP or a debugger."""
    states = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return [each for each in frontend.children() if _status(each) in states]


def find_faults(frontend: psutil.Process, folder: Path) -> Iterable[str]:
    """Return what TorchServe itself does not report.

    Args:
        frontend: Java's process.
        folder: its temporary folder.
    """
    if not folder.is_dir():
        yield (
            f"TorchServe's temporary folder {folder} was deleted: a worker that crashes cannot be "
            "replaced."
        )
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


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
