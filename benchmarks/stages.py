"""Measures the stages of a request, and the effect of this project's optimizations.

Forward passes with one thread and with all; decoding of kinds of images; JPEGs with and without
freed memory kept, exact and at reduced DCT scale; workers with and without PyTorch.
"""

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from benchmarks.archives import repack
from benchmarks.images import KINDS, SMALL, jpeg
from benchmarks.load import Body, closed_loop, require_wrk
from benchmarks.report import CORES, table, write_section
from benchmarks.servers import ours
from benchmarks.timing import Cost, alternate, call_elsewhere, cost, medians
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.allocator import keep_freed_memory
from handler.inference.cores import Cores
from handler.inference.engines import load_engine
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts.build.model_file import from_options
from scripts.build.packing import AT_START
from scripts.build.pipeline import build
from scripts.terminal import step

_MAX_PIXELS = 64_000_000
_WARM_UP_SECONDS = 6


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="In each round.")] = 20,
) -> None:
    """Write benchmarks/results/stages.md."""
    require_wrk()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = build(from_options(arch="densenet121", weights="random"), work / "store")
        passes = _forward_passes(archive, work, rounds, repeats)
        decoding = _decoding(rounds, repeats)
        workers = list(_workers(archive, work))
    of_workers = f"{CORES} workers, after {_WARM_UP_SECONDS} s of 16 clients"
    memory = ("largest worker MB (PSS)", "all processes MB", "first answer s")
    write_section(
        *("stages", "Stages of a request", "Stages"),
        f"Medians of {rounds} alternating rounds of {repeats} calls; CPU ms are means, the decoder "
        "process included. Repeat: `make bench-stages`.",
        table(["forward pass of one image", "ms"], passes.items()),
        table(["decoding and resizing in one thread", "ms", "CPU ms"], decoding),
        table([of_workers, *memory], workers),
    )


def _forward_passes(archive: Path, work: Path, rounds: int, repeats: int) -> dict[str, float]:
    with zipfile.ZipFile(archive) as content:
        model = Path(content.extract("model.onnx", work))
        card = ModelCard.from_json(content.read(MODEL_CARD))
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)

    def way(threads: int) -> Callable[[], float]:
        engine = load_engine(model, card, Cores(threads, threads, work / f"cores-{threads}"))
        return lambda: cost(lambda: engine.run(image).logits, repeats).seconds * 1000

    return medians({f"{n} thread(s)": way(n) for n in sorted({1, CORES})}, rounds)


def _decoding(rounds: int, repeats: int) -> list[tuple[str, float, float]]:
    """Measure kinds of images, and JPEGs without the worker's two optimizations."""
    ways = {kind: (kind, True, True) for kind in KINDS}
    for kind in ("JPEG, 720x720", "JPEG, 12 megapixels"):
        ways[f"{kind}, freed memory given back"] = (kind, True, False)
    ways["JPEG, 12 megapixels, exact"] = ("JPEG, 12 megapixels", False, True)
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for name in alternate(list(ways), rounds):
        one = _elsewhere(*ways[name], repeats)
        found[name].append(one)
        step(f"{name}: {1000 * one.seconds:.1f} ms, {1000 * one.cpu_seconds:.1f} ms of CPU")
    return [
        (
            *(name, 1000 * median(one.seconds for one in costs)),
            1000 * median(one.cpu_seconds for one in costs),
        )
        for name, costs in found.items()
    ]


def _elsewhere(kind: str, reduced: bool, kept: bool, repeats: int) -> Cost:
    """Measure in another process, since the allocator's settings are per process."""
    arguments = [kind, "reduced" if reduced else "", "kept" if kept else "", str(repeats)]
    return Cost(**json.loads(call_elsewhere("benchmarks.stages", "decoded", *arguments)))


def decoded(kind: str, reduced: str, kept: str, repeats: str) -> None:
    """Print the cost of an image, in its own process."""
    if kept:
        keep_freed_memory()
    data, preprocessing = KINDS[kind](), Preprocessing()

    def work() -> None:
        decode(data, preprocessing, PixelBudget(_MAX_PIXELS), reduced=bool(reduced))

    print(json.dumps(asdict(cost(work, int(repeats)))))


def _workers(archive: Path, work: Path) -> Iterator[tuple[str, float, float, float]]:
    """Measure the server as it is, and with an archive whose workers import PyTorch."""
    other = work / "with-pytorch" / archive.name
    other.parent.mkdir()
    repack(archive, other, lambda name, content: None if name == AT_START.name else content)
    small = Body(jpeg(SMALL))
    (work / "small.jpg").write_bytes(small.data)  # for the server's first answer
    for name, which in (("unchanged", archive), ("with PyTorch imported", other)):
        with ours(which, work) as server:
            closed_loop(server.url, small, 16, _WARM_UP_SECONDS)
            yield (name, *server.memory(), server.first_answer)
