"""What one server gives as workers, pictures and requests grow; a plot of each."""

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib as mpl
import numpy as np
import psutil
import requests
import typer
from PIL import Image

from benchmarks.bench import closed_loop
from benchmarks.machine import RESULTS, write_report
from benchmarks.servers import free_port
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.samples import CAT
from scripts.serve.management import scale
from scripts.serve.running import Ports, Running
from scripts.serve.server import start, stop
from scripts.terminal import command, step

mpl.use("Agg")

MEGAPIXELS = (0.1, 0.5, 1, 2, 4, 8, 12, 24, 50)
IMAGES = (1, 2, 4, 8, 16)
CLIENTS = 16


def picture(megapixels: float) -> bytes:
    """A JPEG of a photograph, 4 to 3, with a camera's noise."""
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(megapixels * 1e6 / width)
    with Image.open(CAT.parent / "astronaut.png") as photograph:
        large = photograph.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 1)).astype(np.float32)
    pixels = (np.asarray(large) + noise).clip(0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def form(count: int) -> tuple[bytes, str]:
    """A form with so many pictures of half a megapixel, and its content type."""
    one = picture(0.5)
    files = {f"image{i}": (f"{i}.jpg", one, "image/jpeg") for i in range(count)}
    request = requests.Request("POST", "http://localhost", files=files).prepare()
    assert isinstance(request.body, bytes)
    return request.body, request.headers["Content-Type"]


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=2)] = 4,
) -> None:
    """Measures; writes benchmarks/results/scaling.md and scaling.png."""
    cores = psutil.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = build(recipe(untrained()), work / "store")
        running = start(archive, Ports(*(free_port() for _ in range(5))), run_dir=work / "run")
        try:
            small = (picture(0.5), "image/jpeg")

            def load(body: tuple[bytes, str], clients: int) -> float:
                return _rate(running, work, body, clients, seconds)

            load(small, CLIENTS)
            pictures = {mp: picture(mp) for mp in MEGAPIXELS}
            sizes = _alternate(
                rounds, MEGAPIXELS, lambda mp: load((pictures[mp], small[1]), CLIENTS)
            )
            forms = {count: form(count) for count in IMAGES}
            many = _alternate(rounds, IMAGES, lambda n: n * load(forms[int(n)], 4))

            def with_workers(count: float) -> float:
                scale(running, int(count))
                return load(small, CLIENTS)

            # Scaling keeps the threads that were decided at the start: one for each worker.
            workers = _alternate(rounds, tuple(range(1, cores + 1)), with_workers)
        finally:
            stop(running, work / "run")
    tables = {
        "workers": workers,
        "megapixels of a JPEG": sizes,
        "images in a request": many,
    }
    lines = [
        (
            f"Images a second, medians of {rounds} alternating rounds; {CLIENTS} clients, 4 where "
            "requests hold several images; half a megapixel unless said. Made by "
            "`make bench-scaling`."
        ),
        "",
    ]
    for name, values in tables.items():
        lines += [f"| {name} | " + " | ".join(f"{x:g}" for x in values) + " |"]
        lines += ["|---" * (len(values) + 1) + "|"]
        lines += ["| images/s | " + " | ".join(f"{v:.1f}" for v in values.values()) + " |", ""]
    lines += ["![the same as plots](scaling.png)"]
    write_report("scaling", "Scaling", lines)
    _chart(tables)


def _alternate(
    rounds: int, points: tuple[float, ...], measure: Callable[[float], float]
) -> dict[float, float]:
    """Every point once a round; the median of each."""
    found: dict[float, list[float]] = {point: [] for point in points}
    for _ in range(rounds):
        for point, rates in found.items():
            rates.append(measure(point))
            step(f"{point:g}: {rates[-1]:.1f}/s")
    return {point: median(rates) for point, rates in found.items()}


def _rate(
    running: Running, work: Path, body: tuple[bytes, str], clients: int, seconds: int
) -> float:
    (work / "body").write_bytes(body[0])
    environment = {
        **os.environ,
        "BENCHMARK_BODY": str(work / "body"),
        "BENCHMARK_TYPE": body[1],
    }
    found = closed_loop(running.predictions_url, environment, clients, seconds)
    if found["failures"]:
        step(f"{found['failures']:.0f} requests failed")
    return found["count"] / found["seconds"]


def _chart(tables: dict[str, dict[float, float]]) -> None:
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(tables), figsize=(12, 3.5), layout="constrained")
    for axes, (name, values) in zip(all_axes, tables.items(), strict=True):
        axes.plot(list(values), list(values.values()), marker="o")
        axes.set_xlabel(name)
        axes.set_ylabel("images a second")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(RESULTS / "scaling.png", dpi=100)


if __name__ == "__main__":
    command(main)
