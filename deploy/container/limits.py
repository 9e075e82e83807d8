"""How many workers, threads and requests, and how much memory for Java, fit the container's limits.

`scripts.serve.machine` chooses workers and threads per CPU, as for `make start`. Here the memory
limit is shared between workers and TorchServe's frontend. nginx limits the requests that the
frontend holds, and counts large ones separately.
"""

from dataclasses import dataclass

from deploy.container.serving import StartError
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.machine import most_memory, plan

_MIB = 1 << 20
# Java outside its heap and buffers, nginx, and this program.
_OVERHEAD_BYTES = 350_000_000
# `batchSize` in the archive: requests that TorchServe sends a worker at once.
_BATCH = 8
# `job_queue_size`: requests that wait for a worker, per model.
QUEUE = 64
# A request at a worker takes its body on the heap, and the batch's message, whose buffer grows by
# copying into one of twice its size.
_COPIES = 4
# Requests below are small: their length has six digits or fewer (nginx.conf.jinja).
_SMALL_BYTES = 1_000_000
# Large requests at once: at least, per worker; and at most.
_MIN_LARGE = 4
_MAX_LARGE = 100


@dataclass(frozen=True)
class Limits:
    """What the container runs.

    Attributes:
        workers: processes per model.
        threads: CPU threads of each worker.
        max_threads: CPU threads that a worker may use while the others are idle.
        requests: that the container takes at once.
        large: how many of them may have 1 MB or more, or an unknown length.
        heap_bytes: Java's heap.
        direct_bytes: Java's buffers outside the heap.
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
        """Java's arguments."""
        heap, direct = self.heap_bytes // _MIB, self.direct_bytes // _MIB
        return f"-Xmx{heap}m -XX:MaxDirectMemorySize={direct}m"


def fit_limits(worker_bytes: int, models: int = 1, workers: int | None = None) -> Limits:
    """Return what fits this container's limits of CPU and memory.

    Args:
        worker_bytes: memory that a worker may take.
        models: how many are served.
        workers: per model; None for as many as are useful and fit.

    Raises:
        StartError: the memory limit is too small for these workers, or for a single one.
    """
    memory = most_memory()

    def java_bytes(count: int, large: int) -> tuple[int, int]:
        """Return heap and buffers for so many large requests beside all small ones."""
        small = _requests(count, models) * _SMALL_BYTES
        bodies = large + (_COPIES - 1) * min(large, models * count * _BATCH)
        return bodies * MAX_REQUEST_BYTES + _COPIES * small, large * MAX_REQUEST_BYTES + small

    def needed(count: int, large: int) -> int:
        return _OVERHEAD_BYTES + count * models * worker_bytes + sum(java_bytes(count, large))

    def least(count: int) -> int:
        return needed(count, _MIN_LARGE * count * models)

    fitting = plan(workers, models, worker_bytes).workers
    while fitting > 1 and not workers and least(fitting) > memory:
        fitting -= 1
    if least(fitting) > memory:
        of = f"{models} models with " if models > 1 else ""
        raise StartError(
            f"The container's memory, {memory / 1e9:.2f} GB, does not hold {of}{fitting} "
            f"worker(s): that takes {least(fitting) / 1e9:.2f} GB. "
            + ("Lower WORKERS, or raise the limit." if fitting > 1 else "Raise the limit.")
        )
    chosen = plan(fitting, models, worker_bytes)
    large = _MAX_LARGE
    while needed(fitting, large) > memory:
        large -= 1
    heap, direct = java_bytes(fitting, large)
    return Limits(
        workers=fitting,
        threads=chosen.threads,
        max_threads=chosen.max_threads,
        requests=_requests(fitting, models) + large,
        large=large,
        heap_bytes=heap,
        direct_bytes=direct,
    )


def _requests(workers: int, models: int) -> int:
    """Return the most that wait and that workers have."""
    return models * (QUEUE + workers * _BATCH)
