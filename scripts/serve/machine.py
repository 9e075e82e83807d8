"""Plan workers, threads, the queue and Java's memory for this machine or container."""

from dataclasses import dataclass
from pathlib import Path

import joblib
import psutil

from handler.settings import ADDED_BYTES, MAX_REQUEST_BYTES

# A loaded worker was measured at 300 MB with ONNX Runtime; requests add up to ADDED_BYTES.
WORKER_BYTES = 300_000_000 + ADDED_BYTES
# Additional memory of a worker that runs an int8 model with OpenVINO; see
# benchmarks/results/servers.md.
_INT8_BYTES = 390_000_000

_MIB = 1 << 20

# Memory of the frontend without heap and buffers: 150 to 310 MB under load with small images.
_JAVA_BYTES = 300_000_000
# Java's heap without queued requests.
_HEAP_BYTES = 512 * _MIB
# Limits of the buffers outside the heap, which hold requests while they are received and forwarded.
# 4 GiB hold 200 concurrent uploads of 20 MB.
_MIN_DIRECT_BYTES, _MAX_DIRECT_BYTES = 256 * _MIB, 4096 * _MIB
# Limits of the queue length. On two cores, a queue of 512 requests takes 17 s.
_MIN_QUEUE, MAX_QUEUE = 16, 512

# Share of the free memory that workers may take.
_MEMORY_SHARE = 0.75

# Memory cgroups of versions 2 and 1: prefix of the path in /proc/self/cgroup, mount point, files of
# limit and usage, and the key in memory.stat of cached files, which the kernel can reclaim.
_CGROUPS = (
    ("0::", "", "memory.max", "memory.current", "inactive_file"),
    (":memory:", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")

# More workers than CPUs add no throughput; many more only compete for the CPUs.
_MAX_WORKERS_PER_CPU = 4

# Maximum threads per image; more were not measured.
_MAX_THREADS = 8


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


@dataclass(frozen=True)
class FrontendPlan:
    """The queue and the memory of TorchServe's frontend.

    Attributes:
        queue: requests that may wait for a worker, per model.
        heap_bytes: Java's heap, which can hold a full queue of requests of the maximum size.
        direct_bytes: Java's buffers outside the heap.
    """

    queue: int
    heap_bytes: int
    direct_bytes: int

    @property
    def vmargs(self) -> str:
        """Return Java's memory options."""
        heap, direct = self.heap_bytes // _MIB, self.direct_bytes // _MIB
        return f"-Xmx{heap}m -XX:MaxDirectMemorySize={direct}m"


def plan_frontend(plan: Plan, models: int, bytes_per_worker: int) -> FrontendPlan:
    """Return the plan with the longest queue, up to `MAX_QUEUE`, that fits into the free memory.

    TorchServe limits the number of queued requests, not their size, so each counts as 20 MB. In the
    gateway and the container, nginx limits the number of large ones.

    Args:
        plan: the workers.
        models: number of models, each with its own queue.
        bytes_per_worker: memory that a worker may take.
    """
    left = memory_limit() - plan.workers * models * bytes_per_worker - _JAVA_BYTES
    direct = min(max(left // 3, _MIN_DIRECT_BYTES), _MAX_DIRECT_BYTES)
    queue = (left - direct - _HEAP_BYTES) // (models * MAX_REQUEST_BYTES)
    queue = min(max(queue, _MIN_QUEUE), MAX_QUEUE)
    return FrontendPlan(queue, _HEAP_BYTES + queue * models * MAX_REQUEST_BYTES, direct)


def worker_bytes(precision: str) -> int:
    """Return the memory, in bytes, that a worker may take with a model in this precision."""
    return WORKER_BYTES + (_INT8_BYTES if precision == "int8" else 0)


def plan_workers(
    workers: int | None = None, models: int = 1, bytes_per_worker: int = WORKER_BYTES
) -> Plan:
    """Return how many workers and threads use all CPUs within the free memory.

    The default is one worker per CPU with one thread each. Measured on two CPUs, one worker with
    two threads classified 8 % fewer images per second, and two workers with two threads each 35 %
    fewer. If memory is short, there are fewer workers with more threads each. Only CPUs that
    affinity and cgroup quota allow are counted.

    Args:
        workers: overrides the number of workers per model.
        models: number of models, each with as many workers.
        bytes_per_worker: memory that a worker may take.
    """
    cpus = joblib.cpu_count()
    if workers is None:
        workers = max(1, min(cpus, _workers_in_memory(_available(), bytes_per_worker) // models))
    threads = max(1, cpus // workers)
    return Plan(workers, threads, max_threads=max(threads, min(cpus, _MAX_THREADS)))


def max_workers(
    models: int = 1, stopping: int = 0, bytes_per_worker: int = WORKER_BYTES
) -> tuple[int, str]:
    """Return the maximum number of workers per model, and the reason for it.

    Args:
        models: number of models, each with as many workers.
        stopping: number of workers that stop before these start; their memory counts as free.
        bytes_per_worker: memory that a worker may take.
    """
    cpus = joblib.cpu_count()
    available = _available() + stopping * bytes_per_worker
    in_memory = max(1, _workers_in_memory(available, bytes_per_worker) // models)
    if in_memory < cpus * _MAX_WORKERS_PER_CPU:
        return in_memory, (
            f"each needs {bytes_per_worker / 1e9:.1f} GB of {_MEMORY_SHARE:.0%} of the "
            f"{available / 1e9:.1f} GB of memory that are free"
        )
    return cpus * _MAX_WORKERS_PER_CPU, (
        f"there are {cpus} CPUs, and more than {_MAX_WORKERS_PER_CPU} workers per CPU only wait "
        "for one another"
    )


def memory_limit() -> int:
    """Return the memory, in bytes, that the server may take.

    This is the container's limit or, without one, `_MEMORY_SHARE` of the free memory.
    """
    total = int(psutil.virtual_memory().total)
    found = _container_memory()
    if found is None or found[0] >= total:
        return int(_available() * _MEMORY_SHARE)
    return found[0]


def _available() -> int:
    """Return the lower of the machine's and the container's free memory, in bytes."""
    machine = int(psutil.virtual_memory().available)
    found = _container_memory()
    return machine if found is None else max(0, min(machine, found[0] - found[1]))


def _container_memory() -> tuple[int, int] | None:
    """Return the lowest memory limit of this process's cgroups and the usage under it, in bytes.

    A container's cgroup is mounted as the root; a systemd service (`MemoryMax=`) has a subfolder.
    None if there is no limit.
    """
    found = []
    for prefix, mount, limit, usage, cached_files in _CGROUPS:
        root = _CGROUP / mount
        own = root / _own_cgroup(prefix)
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            try:
                maximum, used = (int((folder / name).read_text()) for name in (limit, usage))
                statistics = (folder / "memory.stat").read_text().split()
                cached = int(statistics[statistics.index(cached_files) + 1])
            except (OSError, ValueError):  # another cgroup version, or the limit is "max"
                continue
            found.append((maximum, used - cached))
    return min(found, default=None)


def _own_cgroup(prefix: str) -> str:
    """Return the path of this process's cgroup below its mount; "" if it is unknown."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(prefix)[2].lstrip("/") for line in lines if prefix in line), "")


def _workers_in_memory(available: int, bytes_per_worker: int) -> int:
    return int(available * _MEMORY_SHARE // bytes_per_worker)
