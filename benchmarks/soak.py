"""Thousands of ordinary requests of mixed sizes: `make soak`."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks.pictures import encode
from benchmarks.served import outcome, served, worker_memory
from scripts.samples import sample_photographs
from scripts.serve.running import Running
from scripts.terminal import UserError, command, console, step

CLIENTS = 8
SETTLED = 500
MAX_GROWTH = 0.05


def soak(running: Running, count: int) -> float:
    """Sends so many requests.

    Returns:
        the growth of a worker's memory after the first 500, as a fraction.

    Raises:
        AssertionError: a request failed, or memory grew.
    """
    pictures = list(sample_photographs())
    pictures += [encode(Image.effect_noise((w, w * 3 // 4), 50)) for w in (2000, 4000)]
    order = np.random.default_rng(1).integers(len(pictures), size=count)
    with ThreadPoolExecutor(CLIENTS) as pool:

        def send(numbers: list[int]) -> Counter[str]:
            return Counter(pool.map(lambda number: outcome(running, pictures[number]), numbers))

        outcomes = send(order[:SETTLED].tolist())
        before = worker_memory(running)
        outcomes += send(order[SETTLED:].tolist())
    growth = worker_memory(running) / before - 1
    console.print(
        f"soak: {count} requests of {len(pictures)} pictures, a worker's memory "
        f"{before / 1e6:.0f} MB after {SETTLED}, {growth:+.1%} at the end"
    )
    assert set(outcomes) == {"200"}, f"failed: {dict(outcomes)}"
    assert growth < MAX_GROWTH, f"memory grew by {growth:.1%}"
    return growth


def main(
    count: Annotated[int, typer.Option("--requests", min=SETTLED + 1)] = 5_000,
) -> None:
    """Thousands of ordinary requests of mixed sizes."""
    try:
        with served() as running:
            soak(running, count)
    except AssertionError as failure:
        raise UserError(str(failure)) from failure
    step("The server held")


if __name__ == "__main__":
    command(main)
