"""Measures the stages of a request, and the effect of this project's optimizations.

Forward passes with one thread and with all; decoding of kinds of images; JPEGs with and without
freed memory kept, exact and at reduced DCT scale; workers with and without PyTorch.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.archives import repack, workspace
from benchmarks.images import KINDS, SMALL, jpeg
from benchmarks.load import Body, closed_loop
from benchmarks.report import CORES, table, write_section
from benchmarks.servers import ours
from benchmarks.timing import call_elsewhere, cost, medians
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.allocator import keep_freed_memory
from handler.inference.cores import Cores
from handler.inference.engines import load_engine
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts.build.packing import AT_START

_MAX_PIXELS = 64_000_000
_WARM_UP_SECONDS = 6


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="In each round.")] = 20,
) -> None:
    """Write benchmarks/results/stages.md."""
    with workspace() as (work, archive):
        passes = _forward_passes(archive, work, rounds, repeats)
        decoding = _decoding(rounds, repeats)
        workers = list(_workers(archive, work))
    of_workers = f"{CORES} workers, after {_WARM_UP_SECONDS} s of 16 clients"
    memory = ("largest worker MB (PSS)", "all processes MB", "first answer s")
    write_section(
        *("stages", "Stages of a request", "Stages"),
        f"Medians of {rounds} alternating rounds of {repeats} calls; CPU ms are means, the decoder "
        "process included. Repeat: `make bench-stages`.",
        _table("forward pass of one image", passes),
        _table("decoding and resizing in one thread", decoding),
        table([of_workers, *memory], workers),
    )


def _table(heading: str, found: dict[str, dict[str, float]]) -> list[str]:
    columns = next(iter(found.values()))
    return table([heading, *columns], ([name, *v.values()] for name, v in found.items()))


def _forward_passes(
    archive: Path, work: Path, rounds: int, repeats: int
) -> dict[str, dict[str, float]]:
    with zipfile.ZipFile(archive) as content:
        model = Path(content.extract("model.onnx", work))
        card = ModelCard.from_json(content.read(MODEL_CARD))
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)
    engines = {
        f"{n} thread(s)": load_engine(model, card, Cores(n, n, work / f"cores-{n}"))
        for n in sorted({1, CORES})
    }

    def measure(name: str) -> dict[str, float]:
        return {"ms": cost(lambda: engines[name].run(image).logits, repeats)["ms"]}

    return medians(list(engines), rounds, measure)


def _decoding(rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure kinds of images, and JPEGs without the worker's two optimizations."""
    ways = {kind: (kind, True, True) for kind in KINDS}
    for kind in ("JPEG, 720x720", "JPEG, 12 megapixels"):
        ways[f"{kind}, freed memory given back"] = (kind, True, False)
    ways["JPEG, 12 megapixels, exact"] = ("JPEG, 12 megapixels", False, True)
    return medians(list(ways), rounds, lambda name: _elsewhere(*ways[name], repeats))


def _elsewhere(kind: str, reduced: bool, kept: bool, repeats: int) -> dict[str, float]:
    """Measure in another process, since the allocator's settings are per process."""
    arguments = (kind, "reduced" if reduced else "", "kept" if kept else "", repeats)
    found: dict[str, float] = json.loads(call_elsewhere("benchmarks.stages", "decoded", *arguments))
    return found


def decoded(kind: str, reduced: str, kept: str, repeats: str) -> None:
    """Print the cost of an image, in its own process."""
    if kept:
        keep_freed_memory()
    data, preprocessing = KINDS[kind](), Preprocessing()

    def work() -> None:
        decode(data, preprocessing, PixelBudget(_MAX_PIXELS), reduced=bool(reduced))

    print(json.dumps(cost(work, int(repeats))))


def _workers(archive: Path, work: Path) -> Iterator[tuple[str, float, float, float]]:
    """Measure the server as it is, and with an archive whose workers import PyTorch."""
    other = work / "with-pytorch" / archive.name
    other.parent.mkdir()
    repack(archive, other, lambda name, content: None if name == AT_START.name else content)
    small = Body(jpeg(SMALL))
    for name, which in (("unchanged", archive), ("with PyTorch imported", other)):
        with ours(which, work) as server:
            closed_loop(server.url, small, 16, _WARM_UP_SECONDS)
            yield (name, *server.memory(), server.first_answer)
