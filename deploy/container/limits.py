"""How many workers, threads and how much memory for Java the container's limits hold.

Workers and threads for a number of CPUs are those of `make start` (`scripts.serve.machine`). What
is decided here is how a limit to memory is shared between workers and frontend. What the frontend
holds is bounded by nginx, which counts large requests for themselves.
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
# Requests that wait for a worker of a model (`job_queue_size`).
QUEUE = 64
# What a request takes of the heap in a worker's hands: its body, and the batch's message, a buffer
# that grows by copying into one of twice its size.
_COPIES = 4
# Requests below are small; their length has fewer digits (nginx.conf).
SMALL_BYTES = 1_000_000
# Larger ones at once: at least for each worker, and at most.
_LEAST_LARGE = 4
_MOST_LARGE = 100


@dataclass(frozen=True)
class Limits:
    """What the container runs.

    Attributes:
        workers: processes of each model.
        threads: CPU threads that are each worker's own.
        max_threads: CPU threads that a worker may use while the others are idle.
        requests: that the container takes at once.
        large: how many of them may be larger than `SMALL_BYTES`, or of unknown length.
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
    large = _MOST_LARGE
    while _heap(large, fit, models) + _direct(large, fit, models) > java:
        large -= 1
    return Limits(
        workers=fit,
        threads=chosen.threads,
        max_threads=chosen.max_threads,
        requests=_requests(fit, models) + large,
        large=large,
        heap_bytes=_heap(large, fit, models),
        direct_bytes=_direct(large, fit, models),
    )


def _requests(workers: int, models: int) -> int:
    """That wait and that are in the workers' hands, at most."""
    return models * (QUEUE + workers * _BATCH)


def _heap(large: int, workers: int, models: int) -> int:
    """Bytes of heap that so many large requests take beside all small ones."""
    in_hand = min(large, models * workers * _BATCH)
    bodies = large + (_COPIES - 1) * in_hand
    return bodies * MAX_REQUEST_BYTES + _COPIES * _requests(workers, models) * SMALL_BYTES


def _direct(large: int, workers: int, models: int) -> int:
    """The same outside the heap: bodies on their way in."""
    return large * MAX_REQUEST_BYTES + _requests(workers, models) * SMALL_BYTES


def _needed(workers: int, models: int, each: int) -> int:
    """Bytes that a container takes at the least."""
    large = _LEAST_LARGE * workers * models
    java = _heap(large, workers, models) + _direct(large, workers, models)
    return _BESIDE_BYTES + java + workers * models * each
