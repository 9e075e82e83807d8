"""Plan workers, threads, concurrent requests and Java's memory within the container's limits.

`scripts.serve.machine` plans workers and threads by CPUs, as for `make start`. This module divides
the memory limit between workers and TorchServe's frontend. nginx limits the number of requests in
the frontend, with a separate limit for large ones.
"""

from dataclasses import dataclass

from deploy.container.serving import ConfigError
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.machine import FrontendPlan, Plan, memory_limit, plan_workers

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
        plan: workers and threads.
        frontend: Java's memory; `queue` is the maximum number of concurrent requests.
        large: maximum number of those with 1 MB or more, or of unknown length.
    """

    plan: Plan
    frontend: FrontendPlan
    large: int


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

    def frontend(count: int, queue: int, large: int) -> FrontendPlan:
        """Return the memory for a number of large requests and for all small ones."""
        in_workers = models * count * _BATCH
        small, copied = models * queue + in_workers, (_COPIES - 1) * in_workers
        bodies = large + (_COPIES - 1) * min(large, in_workers)
        return FrontendPlan(
            queue=small + large,
            heap_bytes=bodies * MAX_REQUEST_BYTES + (small + copied) * _SMALL_BYTES,
            direct_bytes=large * MAX_REQUEST_BYTES + small * _SMALL_BYTES,
        )

    def needed(count: int, queue: int = _QUEUES[-1], large: int = 0) -> int:
        java = frontend(count, queue, large or _MIN_LARGE * count * models)
        workers_bytes = count * models * worker_bytes
        return _OVERHEAD_BYTES + workers_bytes + java.heap_bytes + java.direct_bytes

    count = plan_workers(workers, models, worker_bytes).workers
    while count > 1 and not workers and needed(count) > memory:
        count -= 1
    if needed(count) > memory:
        of = f"{models} models with " if models > 1 else ""
        raise ConfigError(
            f"The container's memory, {memory / 1e9:.2f} GB, does not hold {of}{count} "
            f"worker(s): that takes {needed(count) / 1e9:.2f} GB. "
            + ("Lower WORKERS, or raise the limit." if count > 1 else "Raise the limit.")
        )
    queue = next(each for each in _QUEUES if needed(count, each) <= memory)
    large = _MAX_LARGE
    while needed(count, queue, large) > memory:
        large -= 1
    return Limits(plan_workers(count, models, worker_bytes), frontend(count, queue, large), large)
