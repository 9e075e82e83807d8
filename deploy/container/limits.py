"""Plan workers, threads, concurrent requests and Java's memory within the container's limits.

`scripts.serve.machine` plans workers and threads by CPUs, as for `make start`. This module divides
the memory limit between workers and TorchServe's frontend. nginx limits the number of requests in
the frontend, with a separate limit for large ones.
"""

from dataclasses import dataclass

from deploy.container.serving import ConfigError
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.machine import memory_limit, plan_workers

_MIB = 1 << 20
# Java's memory outside its heap and buffers, nginx, and this program.
_OVERHEAD_BYTES = 350_000_000
# `batchSize` in the archive: requests that TorchServe sends to a worker at once.
_BATCH = 8
# Requests that wait for a worker, per model: the longest queue that fits into the memory.
_QUEUES = (512, 384, 256, 192, 128, 96, 64)
# Copies of a request's body on the heap while a worker processes it: the body, and the message of
# its batch, whose buffer grows by copying into one of twice its size.
_COPIES = 4
# Requests from this size on are large: their length has more than six digits (nginx.conf.jinja).
_SMALL_BYTES = 1_000_000
# Concurrent large requests: minimum per worker, maximum per container.
_MIN_LARGE = 4
_MAX_LARGE = 100


@dataclass(frozen=True)
class Limits:
    """The container's processes, threads, concurrent requests and memory.

    Attributes:
        workers: processes per model.
        threads: CPU threads per worker.
        max_threads: CPU threads that a worker may use while the others are idle.
        requests: maximum number of concurrent requests.
        large: maximum number of those with 1 MB or more, or of unknown length.
        heap_bytes: size of Java's heap.
        direct_bytes: size of Java's buffers outside the heap.
    """

    workers: int
    threads: int
    max_threads: int
    requests: int
    large: int
    heap_bytes: int
    direct_bytes: int

    @property
    def vmargs(self) -> str:
        """Return Java's arguments."""
        heap, direct = self.heap_bytes // _MIB, self.direct_bytes // _MIB
        return f"-Xmx{heap}m -XX:MaxDirectMemorySize={direct}m"


def plan_resources(worker_bytes: int, models: int = 1, workers: int | None = None) -> Limits:
    """Plan the resources within this container's limits of CPU and memory.

    Args:
        worker_bytes: maximum memory of a worker.
        models: number of served models.
        workers: workers per model; by default one per CPU, or fewer if memory is limited.

    Raises:
        ConfigError: the memory limit is too small for `workers`, or for a single one by default.
    """
    memory = memory_limit()

    def java_bytes(count: int, large: int, queue: int) -> tuple[int, int]:
        """Return bytes of heap and buffers for a number of large requests and all small ones."""
        in_workers = models * count * _BATCH
        small, copied = models * queue + in_workers, (_COPIES - 1) * in_workers
        bodies = large + (_COPIES - 1) * min(large, in_workers)
        heap = bodies * MAX_REQUEST_BYTES + (small + copied) * _SMALL_BYTES
        return heap, large * MAX_REQUEST_BYTES + small * _SMALL_BYTES

    def total_bytes(count: int, large: int, queue: int) -> int:
        java = sum(java_bytes(count, large, queue))
        return _OVERHEAD_BYTES + count * models * worker_bytes + java

    def min_bytes(count: int, queue: int = _QUEUES[-1]) -> int:
        return total_bytes(count, _MIN_LARGE * count * models, queue)

    count = plan_workers(workers, models, worker_bytes).workers
    while count > 1 and not workers and min_bytes(count) > memory:
        count -= 1
    if min_bytes(count) > memory:
        of = f"{models} models with " if models > 1 else ""
        raise ConfigError(
            f"The container's memory, {memory / 1e9:.2f} GB, does not hold {of}{count} "
            f"worker(s): that takes {min_bytes(count) / 1e9:.2f} GB. "
            + ("Lower WORKERS, or raise the limit." if count > 1 else "Raise the limit.")
        )
    plan = plan_workers(count, models, worker_bytes)
    queue = next(each for each in _QUEUES if min_bytes(count, each) <= memory)
    large = _MAX_LARGE
    while total_bytes(count, large, queue) > memory:
        large -= 1
    heap, direct = java_bytes(count, large, queue)
    return Limits(
        workers=count,
        threads=plan.threads,
        max_threads=plan.max_threads,
        requests=models * (queue + count * _BATCH) + large,
        large=large,
        heap_bytes=heap,
        direct_bytes=direct,
    )
