"""What one server gives as workers, pictures and requests grow; a plot of each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import matplotlib as mpl
import typer

from benchmarks.machine import CORES, RESULTS, write_report
from benchmarks.pictures import SMALL, form, jpeg
from benchmarks.served import served
from benchmarks.timing import medians
from benchmarks.wrk import Body, closed_loop, require_wrk
from scripts.serve.management import scale
from scripts.serve.running import Running
from scripts.terminal import command, step

mpl.use("Agg")

MEGAPIXELS = (0.1, 0.5, 1, 2, 4, 8, 12, 24, 50)
IMAGES = (1, 2, 4, 8, 16)
CLIENTS = 16


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=2)] = 4,
) -> None:
    """Measures; writes benchmarks/results/scaling.md and scaling.png."""
    require_wrk()
    with served(workers=None) as running:
        small = Body(jpeg(SMALL))

        def rates(points: Sequence[float], measure: Callable[[float], float]) -> dict[float, float]:
            return medians(
                {point: partial(measure, point) for point in points},
                rounds,
                lambda point, rate: f"{point:g}: {rate:.1f}/s",
            )

        def load(body: Body, clients: int = CLIENTS) -> float:
            return _rate(running, body, clients, seconds)

        load(small)
        pictures = {megapixels: Body(jpeg(megapixels)) for megapixels in MEGAPIXELS}
        sizes = rates(MEGAPIXELS, lambda megapixels: load(pictures[megapixels]))
        forms = {count: form(count) for count in IMAGES}
        many = rates(IMAGES, lambda count: count * load(forms[int(count)], 4))

        def with_workers(count: float) -> float:
            scale(running, int(count))
            return load(small)

        # Scaling keeps the threads that were decided at the start: one for each worker.
        workers = rates(range(1, CORES + 1), with_workers)
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


def _rate(running: Running, body: Body, clients: int, seconds: int) -> float:
    found = closed_loop(running.predictions_url, body, clients, seconds)
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
