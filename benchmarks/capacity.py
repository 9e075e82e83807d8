"""Reproduces the figures of `docs/capacity.md`: `python -m benchmarks.capacity`.

A worker that takes a batch of n images keeps itself busy for `fixed + each * n` seconds. Both
numbers follow from two measurements of one node of one worker: the time of a single image, and the
images a second at full load. What the model then says of waiting is compared with a third
measurement, in the page.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from scripts.serve.machine import FRONTEND_BYTES, WORKER_BYTES
from scripts.terminal import command, console

BATCH = 8  # batchSize in handler/model-config.yaml
# Of what a worker can do at most; above that waiting grows without bounds.
UTILISATION = 0.7
WORKERS_A_NODE = 16
WORKER_GB = WORKER_BYTES / 1e9
FRONTEND_GB = FRONTEND_BYTES / 1e9
# Of a photo as phones and web pages send it.
REQUEST_BYTES = 500_000
_IMAGES = 20_000


@dataclass(frozen=True)
class Worker:
    """How long a batch takes: seconds a batch, and seconds an image in it."""

    fixed: float
    each: float

    @classmethod
    def measured(cls, single: float, full: float) -> "Worker":
        """Args: seconds of a single image, and images a second with full batches."""
        each = max(0.0, (BATCH / full - single) / (BATCH - 1))
        return cls(single - each, each)

    def seconds(self, images: int) -> float:
        """How long a batch takes."""
        return self.fixed + self.each * images

    @property
    def most(self) -> float:
        """Images a second with full batches."""
        return BATCH / self.seconds(BATCH)


def simulate(worker: Worker, workers: int, rate: float, seed: int = 1) -> NDArray[np.float64]:
    """Images that come at random to one queue, which free workers empty by batches.

    Args:
        worker: how long a batch takes.
        workers: how many there are.
        rate: images a second.
        seed: of the arrivals.

    Returns:
        float64 (20000,), seconds from arrival to answer.
    """
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, _IMAGES))
    free = np.zeros(workers)
    latencies = np.empty(_IMAGES)
    done = 0
    while done < _IMAGES:
        number = int(free.argmin())
        start = max(free[number], arrivals[done])
        waiting = int(np.searchsorted(arrivals, start, side="right")) - done
        size = min(BATCH, max(1, waiting))
        free[number] = start + worker.seconds(size)
        latencies[done : done + size] = free[number] - arrivals[done : done + size]
        done += size
    return latencies


def _plan(worker: Worker, price: float) -> Table:
    table = Table(title=f"up to {WORKERS_A_NODE} workers a node, {UTILISATION:.0%} busy")
    for heading in ("images/s", "workers needed", "nodes", "memory", "network in", "money an hour"):
        table.add_column(heading, justify="right")
    for rate in (10, 1_000, 100_000):
        workers = math.ceil(rate / (UTILISATION * worker.most))
        # One more than needed, so that one may be away; never a single one.
        node = min(WORKERS_A_NODE, workers)
        nodes = math.ceil(workers / node) + 1
        memory = nodes * (node * WORKER_GB + FRONTEND_GB)
        network = rate * REQUEST_BYTES * 8 / 1e9
        table.add_row(
            f"{rate:,}",
            f"{workers:,}",
            f"{nodes:,}",
            f"{memory:,.0f} GB",
            f"{network:,.2f} Gbit/s",
            f"{nodes * node * price:,.2f}",
        )
    return table


def main(
    single: Annotated[float, typer.Option(help="Milliseconds of a single image.")],
    full: Annotated[float, typer.Option(help="Images a second at full load.")],
    price: Annotated[float, typer.Option(help="Money for a CPU for an hour.")] = 0.04,
) -> None:
    """Prints the model, what it says of waiting, and how much to buy."""
    worker = Worker.measured(single / 1000, full)
    console.print(
        f"a batch of n images: {worker.fixed * 1000:.1f} + {worker.each * 1000:.1f} n ms; "
        f"at most {worker.most:.1f} images/s"
    )
    for workers in (1, WORKERS_A_NODE):
        for share in (0.5, 0.7, 0.8, 0.95):
            latencies = simulate(worker, workers, share * worker.most * workers) * 1000
            median, late = np.quantile(latencies, (0.5, 0.95))
            console.print(
                f"{workers:2} worker(s) at {share:.0%}: median {median:.0f} ms, 95 % under "
                f"{late:.0f} ms"
            )
    console.print(_plan(worker, price))


if __name__ == "__main__":
    command(main)
