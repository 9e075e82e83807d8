"""How many workers, threads and how much memory for Java the container's limits hold.

Workers and threads for a number of CPUs are those of `make start` (`scripts.serve.machine`). What
is decided here is how a limit to memory is shared between workers and frontend.
"""

from dataclasses import dataclass

from deploy.container.serving import Refused
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.machine import most_memory, plan

_MIB = 1 << 20
# What Java needs beside its heap and its buffers, and the first process and nginx beside Java.
_BESIDE_BYTES = 350_000_000
# Requests that TorchServe hands to a worker at once: `batchSize` in the archive.
_BATCH = 8
# Requests that wait for a worker of a model: at most, and where memory is short.
_LONGEST_QUEUE = 64
_SHORTEST_QUEUE = 4
# Heap for each request that waits or is in a worker's hands: its body, and a fourth of that.
_HEAP_EACH = MAX_REQUEST_BYTES * 5 // 4
# Bodies on their way in are outside the heap, twice as much.
_JAVA_PARTS = 3


@dataclass(frozen=True)
class Limits:
    """What the container runs.

    Attributes:
        workers: processes of each model.
        threads: CPU threads that are each worker's own.
        max_threads: CPU threads that a worker may use while the others are idle.
        queue: requests that may wait for a worker, of each model.
        heap_bytes: Java's heap.
        direct_bytes: Java's buffers outside the heap.
        requests: that the container takes at once; their bodies fit into the buffers.
    """

    workers: int
    threads: int
    max_threads: int
    queue: int
    heap_bytes: int
    direct_bytes: int

    @property
    def requests(self) -> int:
        return self.direct_bytes // MAX_REQUEST_BYTES

    def vmargs(self) -> str:
        """Java's arguments."""
        return (
            f"-Xmx{self.heap_bytes // _MIB}m -XX:MaxDirectMemorySize={self.direct_bytes // _MIB}m"
        )


def fitting(each: int, models: int = 1, workers: int | None = None) -> Limits:
    """What fits into this container's limits to CPUs and memory.

    Args:
        each: bytes that a worker may take.
        models: how many are served.
        workers: for each model; None for as many as suit and fit.

    Raises:
        Refused: the limit to memory does not hold the workers asked for, or not even one.
    """
    memory = most_memory()
    fit = plan(workers, models, each).workers
    while fit > 1 and not workers and _needed(fit, models, each) > memory:
        fit -= 1
    needed = _needed(fit, models, each)
    if needed > memory:
        of = f"{models} models with " if models > 1 else ""
        raise Refused(
            f"The container's memory, {memory / 1e9:.2f} GB, does not hold {of}{fit} worker(s): "
            f"that takes {needed / 1e9:.2f} GB. "
            + ("Lower WORKERS, or raise the limit." if fit > 1 else "Raise the limit.")
        )
    chosen = plan(fit, models, each)
    java = memory - _BESIDE_BYTES - fit * models * each
    heap = min(java // _JAVA_PARTS, _heap(_LONGEST_QUEUE, fit, models))
    queue = heap // models // _HEAP_EACH - fit * _BATCH
    return Limits(
        workers=fit,
        threads=chosen.threads,
        max_threads=chosen.max_threads,
        queue=min(queue, _LONGEST_QUEUE),
        heap_bytes=heap,
        direct_bytes=heap * (_JAVA_PARTS - 1),
    )


def _heap(queue: int, workers: int, models: int) -> int:
    """Bytes of heap that so many requests take at most."""
    return models * (queue + workers * _BATCH) * _HEAP_EACH


def _needed(workers: int, models: int, each: int) -> int:
    """Bytes that a container takes at the least."""
    java = _JAVA_PARTS * _heap(_SHORTEST_QUEUE, workers, models)
    return _BESIDE_BYTES + java + workers * models * each
