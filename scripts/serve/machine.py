"""How many workers and threads suit this machine."""

from dataclasses import dataclass
from pathlib import Path

import joblib
import psutil

from handler.settings import ADDED_BYTES

# A worker after load was measured at 300 MB with ONNX Runtime; requests add so much at most.
WORKER_BYTES = 300_000_000 + ADDED_BYTES
# What OpenVINO makes of an 8-bit model takes so much more (benchmarks/results/servers.md).
_INT8_BYTES = 390_000_000

# A frontend at its limits: heap and buffers (`vmargs` in config.properties), 2 and 4 GiB, and what
# Java needs beside them.
FRONTEND_BYTES = (6 << 30) + 300_000_000

# Of the memory that is free, so much may be taken.
_MEMORY_SHARE = 0.75

# Where the kernel says how much a container may take and takes, in each version of cgroups; and
# what of that are files, which give way.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_CGROUP = Path("/sys/fs/cgroup")

# More workers than CPUs gain nothing; far more only wait for one another.
_MOST_WORKERS_A_CPU = 4

# So many at most for one picture; what more would give was not measured.
_MOST_THREADS = 8


@dataclass(frozen=True)
class Most:
    """How many workers can run, and what the bound is."""

    workers: int
    reason: str


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


def worker_bytes(precision: str) -> int:
    """The memory that a worker of an archive in this precision may take."""
    return WORKER_BYTES + (_INT8_BYTES if precision == "int8" else 0)


def plan(workers: int | None = None, models: int = 1, each: int = WORKER_BYTES) -> Plan:
    """A worker for each CPU with one thread each; fewer workers with more threads where memory is
    short, or where `workers` says so. Each of several models has as many.

    On two CPUs one worker with both gave 8 % fewer images a second, two workers with both 35 %.

    CPUs are those that affinity and cgroup quota leave to this process, not the machine's.
    """
    cpus = joblib.cpu_count()
    if workers is None:
        workers = max(1, min(cpus, _fit_in_memory(_available(), each) // models))
    threads = max(1, cpus // workers)
    return Plan(workers, threads, max_threads=max(threads, min(cpus, _MOST_THREADS)))


def most_workers(models: int = 1, ending: int = 0, each: int = WORKER_BYTES) -> Most:
    """The most workers for each of so many models.

    Args:
        models: each has as many.
        ending: workers that end before these start, so that their memory counts as free.
        each: bytes of memory that one may take.
    """
    cpus = joblib.cpu_count()
    available = _available() + ending * each
    in_memory = max(1, _fit_in_memory(available, each) // models)
    if in_memory < cpus * _MOST_WORKERS_A_CPU:
        return Most(
            in_memory,
            f"each is given {each / 1e9:.1f} GB of {_MEMORY_SHARE:.0%} of the "
            f"{available / 1e9:.1f} GB of memory that are free",
        )
    return Most(
        cpus * _MOST_WORKERS_A_CPU,
        f"there are {cpus} CPUs, and more than {_MOST_WORKERS_A_CPU} workers a CPU only wait for "
        "one another",
    )


def most_memory() -> int:
    """Bytes that may be taken here: what a container is limited to; without a limit the usual
    share of what is free.
    """
    total = int(psutil.virtual_memory().total)
    found = _container_memory()
    if found is None or found[0] >= total:
        return int(_available() * _MEMORY_SHARE)
    return found[0]


def _available() -> int:
    machine = int(psutil.virtual_memory().available)
    found = _container_memory()
    return machine if found is None else max(0, min(machine, found[0] - found[1]))


def _container_memory() -> tuple[int, int] | None:
    """The container's limit and what is taken of it, in bytes; None where there is no limit."""
    for limit, usage, given_back in _CGROUPS:
        path = _CGROUP / limit
        try:
            most, taken = int(path.read_text()), int((_CGROUP / usage).read_text())
            statistics = path.with_name("memory.stat").read_text().split()
            files = int(statistics[statistics.index(given_back) + 1])
        except (OSError, ValueError):  # another version, or "max"
            continue
        return most, taken - files
    return None


def _fit_in_memory(available: int, each: int) -> int:
    return int(available * _MEMORY_SHARE // each)
