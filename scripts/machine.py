"""How many workers and threads suit this machine."""

from dataclasses import dataclass

import joblib
import psutil

from handler.settings import ADDED_BYTES

# A worker after load was measured at 300 MB with ONNX Runtime; requests add so much at most.
WORKER_BYTES = 300_000_000 + ADDED_BYTES

# A frontend at its limits: heap and buffers (`vmargs` in config.properties), 2 and 4 GiB, and what
# Java needs beside them.
FRONTEND_BYTES = (6 << 30) + 300_000_000

# So many at most for one picture; what more would give was not measured.
_MOST_THREADS = 8


@dataclass(frozen=True)
class Plan:
    """How many processes and threads serve.

    Attributes:
        workers: worker processes.
        threads: CPU threads that are each worker's own.
        max_threads: CPU threads that a worker may use while the others are idle.
    """

    workers: int
    threads: int
    max_threads: int


def plan(workers: int | None = None, models: int = 1) -> Plan:
    """A worker for each CPU with one thread each; fewer workers with more threads where memory is
    short, or where `workers` says so. Each of several models has as many.

    On two CPUs one worker with both gave 8 % fewer images a second, two workers with both 35 %.

    CPUs are those that affinity and cgroup quota leave to this process, not the machine's.
    """
    cpus = joblib.cpu_count()
    if workers is None:
        fit_in_memory = int(psutil.virtual_memory().available * 0.75 // WORKER_BYTES)
        workers = max(1, min(cpus, fit_in_memory // models))
    threads = max(1, cpus // workers)
    return Plan(workers, threads, max_threads=max(threads, min(cpus, _MOST_THREADS)))
