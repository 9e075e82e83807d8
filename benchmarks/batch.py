"""Compares batch classification with a bare loop, and with `classify` and a server.

The bare loop is the minimum: one process per core reads, decodes and classifies image by image with
the handler's stages, and keeps no results. All are whole runs, from start to exit, in turns.
"""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image
from pyarrow import parquet

from benchmarks.archives import workspace
from benchmarks.report import CORES, table, write_section
from benchmarks.servers import Server, ours
from benchmarks.timing import medians
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.samples import CAT

SMALL, LARGE = (720, 720), (4000, 3000)
_BARE_LOOP, _SERVED = "bare loop", "classify, server"
_WATCH_SECONDS = 5
_ACTOR = "MapWorker(MapBatches(Model))"

_BARE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from batch.stages import Choices, Classifier, Decoder
decoder, classifier = Decoder(Path(sys.argv[1])), Classifier(Path(sys.argv[1]), Choices())
for path in sorted(Path(sys.argv[2]).iterdir())[int(sys.argv[3])::int(sys.argv[4])]:
    (answer,) = classifier.results([decoder.pixels(path.read_bytes())])
"""


def make_images(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEGs of parts of a photograph."""
    folder.mkdir(parents=True)
    photograph = Image.open(CAT).convert("RGB")
    random = np.random.default_rng(1)
    for number in range(count):
        left, upper = int(random.integers(0, 150)), int(random.integers(0, 100))
        part = photograph.crop((left, upper, left + 300, upper + 200)).resize(size)
        part.save(folder / f"{number:06}.jpg", quality=85)
    return folder


def bare(archive: Path, images: Path) -> None:
    """Run the loop, once per core."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        program = [sys.executable, "-c", _BARE, folder, str(images)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        loops = [
            subprocess.Popen([*program, str(core), str(CORES)], env=environment)
            for core in range(CORES)
        ]
        for loop in loops:
            assert loop.wait() == 0


def batch(archive: Path, images: Path, output: Path, *options: str) -> float:
    """Run `classify-batch`; return images per second after the first part."""
    program = [sys.executable, "-m", "batch", str(images), "--output", str(output)]
    subprocess.run(
        [*program, "--archive", str(archive), *options], check=True, stdout=subprocess.DEVNULL
    )
    files = sorted(output.glob("part-*"), key=lambda file: file.stat().st_mtime)
    ends = [file.stat().st_mtime for file in files]
    rows = [parquet.read_metadata(file).num_rows for file in files]
    return float(sum(rows[1:]) / (ends[-1] - ends[0]))


def served(server: Server, images: Path, output: Path) -> None:
    """Run the client's command, with eight concurrent requests."""
    program = [sys.executable, "-m", "classification_client", str(images)]
    subprocess.run(
        [*program, "--url", server.url, "--output", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def compare(
    archive: Path, work: Path, size: tuple[int, int], count: int, rounds: int
) -> list[list[object]]:
    """Return a row with the medians of each way, measured in alternating rounds."""
    images = make_images(work / f"{size[0]}", size, count)
    actors = {f"batch, {n} actor(s)": n for n in (1, CORES)}

    def measure(way: str) -> dict[str, float]:
        with (
            tempfile.TemporaryDirectory(dir=work) as folder,
            ours(archive, work, workers=CORES) if way == _SERVED else nullcontext() as server,
        ):
            out, steady = Path(folder, "out"), float("nan")
            started = time.monotonic()
            if server is not None:
                served(server, images, out.with_suffix(".csv"))
            elif way == _BARE_LOOP:
                bare(archive, images)
            else:
                steady = batch(archive, images, out, "--actors", str(actors[way]))
            return {"rate": count / (time.monotonic() - started), "steady": steady}

    found = medians([_BARE_LOOP, *actors, _SERVED], rounds, measure)
    base = found[_BARE_LOOP]["rate"]
    return [
        [
            *(f"{size[0]}x{size[1]}, {count:,}", way, values["rate"], values["rate"] / CORES),
            *(f"{values['rate'] / base:.3f}", values["steady"]),
        ]
        for way, values in found.items()
    ]


def memory(work: Path, count: int) -> list[list[object]]:
    """Return rows: peak memory while a small network classifies many small images."""
    small = from_options(
        name="small", arch="resnet18", weights="random", preprocessing={"resize": 64, "crop": 64}
    )
    archive = build(small, work / "store")
    images = make_images(work / "small", SMALL, 1)
    (image,) = images.iterdir()
    Image.open(image).resize((96, 96)).save(image)
    content = image.read_bytes()
    for number in range(1, count):
        (images / f"{number:06}.jpg").write_bytes(content)
    seen: list[dict[str, float]] = []
    program = [sys.executable, "-m", "batch", str(images), "--output", str(work / "small-out")]
    job = psutil.Popen([*program, "--archive", str(archive)], stdout=subprocess.DEVNULL)
    while job.poll() is None:
        seen.append(_memory(job))
        time.sleep(_WATCH_SECONDS)
    assert job.returncode == 0
    # The first third has the start and the filling of buffers.
    thirds = [seen[place * len(seen) // 3 : (place + 1) * len(seen) // 3] for place in range(3)]
    return [[name, *(max(one[name] for one in third) for third in thirds)] for name in seen[0]]


def _memory(job: psutil.Popen) -> dict[str, float]:
    """Return the resident memory in MB by kind of process, without the shared object store."""
    megabytes = {"driver": _private(job), "all actors": 0.0, "all tasks": 0.0}
    for child in psutil.Process(job.pid).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::"):
            megabytes["all actors" if _ACTOR in title else "all tasks"] += _private(child)
    return megabytes


def _private(process: psutil.Process) -> float:
    try:
        info = process.memory_info()
    except psutil.Error:
        return 0.0
    return float((info.rss - info.shared) / 1e6)


def main(
    count: Annotated[int, typer.Option(help="Images of 720x720 per run.")] = 1000,
    large: Annotated[int, typer.Option(help="Images of 12 megapixels per run.")] = 150,
    rounds: Annotated[int, typer.Option(help="Alternating rounds.")] = 3,
    tiny: Annotated[int, typer.Option(help="Images whose memory is watched.")] = 50_000,
) -> None:
    """Write benchmarks/results/batch.md."""
    with workspace() as (work, archive):
        rows = compare(archive, work, SMALL, count, rounds)
        rows += compare(archive, work, LARGE, large, rounds)
        resident = memory(work, tiny)
    headings = ("images", "way", "images/s", "per core", "over the bare loop", "steady state")
    write_section(
        *("batch", "Batch classification", "classify-batch, classify and a bare loop"),
        f"Whole runs on {CORES} cores, from start to exit of the programs; medians of {rounds} "
        "alternating rounds. The steady state leaves out the start and the job's first part. The "
        "bare loop is one process per core with the handler's stages. Repeat: `make bench-batch`.",
        table(headings, rows),
        f"Peak memory in each third of a job of {tiny:,} small images and a small network, in MB "
        "without the object store:",
        table(["process", "first third", "second", "last"], resident),
    )
