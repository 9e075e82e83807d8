"""What a request's stages cost, and what this project's own choices in them are worth.

Each table is the same work done in several ways, in turn: a forward pass with one thread and with
all, pictures decoded with and without freed memory kept, large JPEGs exact and at a fraction of
their size, a server whose workers do without PyTorch and one whose workers import it.
"""

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from benchmarks.bench import closed_loop
from benchmarks.machine import write_report
from benchmarks.scaling import picture
from benchmarks.servers import CORES, start_ours
from handler.allocator import keep_freed_memory
from handler.cores import Cores
from handler.engines import load_engine
from handler.images import PixelBudget, decode
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts.build.archive import AT_START, build, recipe
from scripts.build.weights import untrained
from scripts.terminal import command, step

SMALL, LARGE = 0.5, 12.0  # megapixels
_MAX_PIXELS = 64_000_000
_WARM_UP_SECONDS = 6


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="In each round.")] = 20,
) -> None:
    """Measures, and writes benchmarks/results/stages.md."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = build(recipe(untrained()), work / "store")
        passes = _forward_passes(archive, work, rounds, repeats)
        decoding = _decoding(rounds, repeats)
        workers = list(_workers(archive, work))
    write_report(
        "stages",
        "A request's stages",
        [
            (
                f"Medians of {rounds} alternating rounds of {repeats} times. Made by "
                "`make bench-stages`."
            ),
            "",
            "| forward pass of one image | ms |",
            "|---|---|",
            *(f"| {name} | {1000 * seconds:.1f} |" for name, seconds in passes.items()),
            "",
            "| decoding and resizing in one thread | ms |",
            "|---|---|",
            *(f"| {name} | {1000 * seconds:.1f} |" for name, seconds in decoding.items()),
            "",
            (
                f"| {CORES} workers, after {_WARM_UP_SECONDS} s of 16 clients | a worker MB (PSS) "
                "| all processes MB | first answer s |"
            ),
            "|---|---|---|---|",
            *workers,
        ],
    )


def _in_turn(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each gives, asked one after the other in each round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            found[name].append(measure())
            step(f"{name}: {1000 * found[name][-1]:.1f} ms")
    return {name: median(seconds) for name, seconds in found.items()}


def _typical(work: Callable[[], object], repeats: int) -> float:
    """The median time of a call, in seconds, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times[2:])


def _forward_passes(archive: Path, work: Path, rounds: int, repeats: int) -> dict[str, float]:
    with zipfile.ZipFile(archive) as content:
        model = Path(content.extract("model.onnx", work))
        card = ModelCard.from_json(content.read(MODEL_CARD))
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)

    def way(threads: int) -> Callable[[], float]:
        engine = load_engine(model, card, Cores(threads, threads, work / f"cores-{threads}"))
        return lambda: _typical(lambda: engine.logits(image), repeats)

    return _in_turn({f"{n} thread(s)": way(n) for n in sorted({1, CORES})}, rounds)


def _decoding(rounds: int, repeats: int) -> dict[str, float]:
    ways = {
        f"{megapixels:g} megapixels, {'reduced' if reduced else 'exact'}, freed memory "
        f"{'kept' if kept else 'given back'}": (megapixels, reduced, kept)
        for megapixels, reduced in ((SMALL, True), (LARGE, True), (LARGE, False))
        for kept in (True, False)
    }
    return _in_turn(
        {
            name: lambda arguments=arguments: _elsewhere(*arguments, repeats)  # type: ignore[misc]
            for name, arguments in ways.items()
        },
        rounds,
    )


_PROGRAM = "import sys; from benchmarks.stages import decoded; decoded(*map(float, sys.argv[1:]))"


def _elsewhere(megapixels: float, reduced: bool, kept: bool, repeats: int) -> float:  # noqa: FBT001
    """In a process of its own: what the allocator keeps is the process's."""
    arguments = [str(float(n)) for n in (megapixels, reduced, kept, repeats)]
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    seconds: float = json.loads(result.stdout)
    return seconds


def decoded(megapixels: float, reduced: float, kept: float, repeats: float) -> None:
    """Prints the seconds that a picture takes; runs in a process of its own."""
    if kept:
        keep_freed_memory()
    data, preprocessing = picture(megapixels), Preprocessing()

    def work() -> None:
        decode(data, preprocessing, PixelBudget(_MAX_PIXELS), reduced=bool(reduced))

    print(json.dumps(_typical(work, int(repeats))))


def _workers(archive: Path, work: Path) -> Iterator[str]:
    """This project's server as it is, and from an archive that leaves PyTorch's import alone."""
    other = work / "with-pytorch" / archive.name
    other.parent.mkdir()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            if entry.filename != AT_START.name:
                new.writestr(entry, old.read(entry))
    (work / "small.jpg").write_bytes(picture(SMALL))
    environment = {
        "BENCHMARK_BODY": str(work / "small.jpg"),
        "BENCHMARK_TYPE": "image/jpeg",
    }
    for name, which in (("as it is", archive), ("with PyTorch imported", other)):
        server = start_ours(which, work)
        try:
            closed_loop(server.url, environment, 16, _WARM_UP_SECONDS)
            worker, everything = server.memory()
        finally:
            server.stop()
        yield (
            f"| {name} | {worker / 1e6:.0f} | {everything / 1e6:.0f} | {server.first_answer:.1f} |"
        )


if __name__ == "__main__":
    command(main)
