"""Plans how many workers and threads run on this machine."""

from dataclasses import dataclass
from pathlib import Path

import joblib
import psutil

from handler.settings import ADDED_BYTES

# A loaded worker was measured at 300 MB with ONNX Runtime; requests add up to ADDED_BYTES.
WORKER_BYTES = 300_000_000 + ADDED_BYTES
# A worker of a model that OpenVINO runs in 8 bits takes more (benchmarks/results/servers.md).
_INT8_BYTES = 390_000_000

# The frontend at its limits: 2 GiB of heap, 4 GiB of buffers (`vmargs` in config.properties) and
# the rest of Java's memory.
FRONTEND_BYTES = (6 << 30) + 300_000_000

# Share of the free memory that workers may take.
_MEMORY_SHARE = 0.75

# Memory limit and usage of a container, in each version of cgroups, and the key in memory.stat of
# cached files, which the kernel drops when memory is short.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_CGROUP = Path("/sys/fs/cgroup")

# More workers than CPUs add no throughput; far more of them only wait for one another.
_MAX_WORKERS_PER_CPU = 4

# Threads for one image; the effect of more was not measured.
_MAX_THREADS = 8


@dataclass(frozen=True)
class WorkerLimit:
    """The maximum number of workers, and the reason for it."""

    workers: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """The number of workers and threads.

    Attributes:
        workers: worker processes per model.
        threads: CPU threads of each worker.
        max_threads: CPU threads that a worker may use while the others are idle.
    """

    workers: int
    threads: int
    max_threads: int


def worker_bytes(precision: str) -> int:
    """Return the memory, in bytes, that a worker may take with a model in this precision."""
    return WORKER_BYTES + (_INT8_BYTES if precision == "int8" else 0)


def plan_workers(
    workers: int | None = None, models: int = 1, bytes_per_worker: int = WORKER_BYTES
) -> Plan:
    """Return how many workers and threads use all CPUs within the free memory.

    The default is one worker per CPU with one thread each. Measured on two CPUs, one worker with
    two threads classified 8 % fewer images per second, and two workers with two threads each 35 %
    fewer. If memory is short there are fewer workers, with more threads each. The CPUs are those
    that affinity and cgroup quota leave to this process, not the machine's.

    Args:
        workers: overrides the number of workers per model.
        models: each has as many workers.
        bytes_per_worker: memory that one may take.
    """
    cpus = joblib.cpu_count()
    if workers is None:
        workers = max(1, min(cpus, _workers_in_memory(_available(), bytes_per_worker) // models))
    threads = max(1, cpus // workers)
    return Plan(workers, threads, max_threads=max(threads, min(cpus, _MAX_THREADS)))


def max_workers(
    models: int = 1, stopping: int = 0, bytes_per_worker: int = WORKER_BYTES
) -> WorkerLimit:
    """Return the maximum number of workers per model.

    Args:
        models: each has as many workers.
        stopping: workers that stop before these start, so that their memory counts as free.
        bytes_per_worker: memory that one may take.
    """
    cpus = joblib.cpu_count()
    available = _available() + stopping * bytes_per_worker
    in_memory = max(1, _workers_in_memory(available, bytes_per_worker) // models)
    if in_memory < cpus * _MAX_WORKERS_PER_CPU:
        return WorkerLimit(
            in_memory,
            f"each needs {bytes_per_worker / 1e9:.1f} GB of {_MEMORY_SHARE:.0%} of the "
            f"{available / 1e9:.1f} GB of memory that are free",
        )
    return WorkerLimit(
        cpus * _MAX_WORKERS_PER_CPU,
        f"there are {cpus} CPUs, and more than {_MAX_WORKERS_PER_CPU} workers per CPU only wait "
        "for one another",
    )


def memory_limit() -> int:
    """Return the memory, in bytes, that the server may take.

    That is the container's limit; without one, the usual share of the free memory.
    """
    total = int(psutil.virtual_memory().total)
    found = _container_memory()
    if found is None or found[0] >= total:
        return int(_available() * _MEMORY_SHARE)
    return found[0]


def _available() -> int:
    """Return the free memory, in bytes, of the machine and within the container's limit."""
    machine = int(psutil.virtual_memory().available)
    found = _container_memory()
    return machine if found is None else max(0, min(machine, found[0] - found[1]))


def _container_memory() -> tuple[int, int] | None:
    """Return the container's memory limit and usage, in bytes; None if there is no limit."""
    for limit, usage, cached_files in _CGROUPS:
        path = _CGROUP / limit
        try:
            maximum, used = int(path.read_text()), int((_CGROUP / usage).read_text())
            statistics = path.with_name("memory.stat").read_text().split()
            cached = int(statistics[statistics.index(cached_files) + 1])
        except (OSError, ValueError):  # another version of cgroups, or the limit is "max"
            continue
        return maximum, used - cached
    return None


def _workers_in_memory(available: int, bytes_per_worker: int) -> int:
    return int(available * _MEMORY_SHARE // bytes_per_worker)
