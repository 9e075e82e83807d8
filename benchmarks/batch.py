"""`make bench-batch`: batch classification beside a bare loop, and beside `classify` with a server.

The bare loop is the least that there can be: a process a core, which reads, decodes and classifies
one picture after the other with the handler's own stages, and keeps nothing. All are whole runs,
from the start of the program to its end, one after the other in turns.
"""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image
from pyarrow import parquet

from benchmarks.report import CORES, table, write_section
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.samples import CAT
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from scripts.terminal import step

SMALL, LARGE = (720, 720), (4000, 3000)
# Different pictures; more files are further names of the same.
_DIFFERENT = {SMALL: 500, LARGE: 30}
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


def make_pictures(folder: Path, size: tuple[int, int], count: int) -> Path:
    """JPEGs of a photograph's parts, turned and mirrored."""
    folder.mkdir(parents=True)
    photograph = Image.open(CAT).convert("RGB")
    random = np.random.default_rng(1)
    different = min(count, _DIFFERENT[size])
    for number in range(different):
        left, upper = int(random.integers(0, 150)), int(random.integers(0, 100))
        part = photograph.crop((left, upper, left + 300, upper + 200)).resize(size)
        part.save(folder / f"{number:06}.jpg", quality=85)
    for number in range(different, count):
        os.link(folder / f"{number % different:06}.jpg", folder / f"{number:06}.jpg")
    return folder


def bare(archive: Path, pictures: Path) -> None:
    """The loop, once a core."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        program = [sys.executable, "-c", _BARE, folder, str(pictures)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        loops = [
            subprocess.Popen([*program, str(core), str(CORES)], env=environment)
            for core in range(CORES)
        ]
        for loop in loops:
            assert loop.wait() == 0


def batch(archive: Path, pictures: Path, output: Path, *options: str) -> float:
    """The command; returns pictures a second between the first part's end and the last's."""
    program = [sys.executable, "-m", "batch", str(pictures), "--output", str(output)]
    subprocess.run(
        [*program, "--archive", str(archive), *options], check=True, stdout=subprocess.DEVNULL
    )
    files = sorted(output.glob("part-*"), key=lambda file: file.stat().st_mtime)
    ends = [file.stat().st_mtime for file in files]
    rows = [parquet.read_metadata(file).num_rows for file in files]
    return float(sum(rows[1:]) / (ends[-1] - ends[0]))


def served(server: ServerState, pictures: Path, output: Path) -> None:
    """The client's command, eight pictures at a time."""
    program = [sys.executable, "-m", "classification_client", str(pictures)]
    subprocess.run(
        [*program, "--url", server.predictions_url, "--output", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def server_of(archive: Path, folder: Path) -> Iterator[ServerState]:
    """A server of an archive, with a worker a core."""
    server = start(archive, free_ports(), workers=CORES, run_dir=folder)
    try:
        yield server
    finally:
        stop(server, folder)


def compare(
    archive: Path, work: Path, size: tuple[int, int], count: int, rounds: int
) -> list[list[object]]:
    """Return a row with the medians of each way, measured in alternating rounds."""
    images = make_pictures(work / f"{size[0]}", size, count)
    rates: dict[str, list[float]] = defaultdict(list)
    steady: dict[str, list[float]] = defaultdict(list)

    def measure(name: str, run: Callable[[Path], float | None]) -> None:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            started = time.monotonic()
            found = run(Path(folder, "out"))
            rates[name].append(count / (time.monotonic() - started))
            steady[name].append(float("nan") if found is None else found)
        step(f"{size[0]}x{size[1]}, {name}: {rates[name][-1]:.1f} images/s")

    for _ in range(rounds):
        measure("bare loop", lambda _: bare(archive, images))
        for actors in (1, CORES):
            options = ("--actors", str(actors))
            measure(
                f"batch, {actors} actor(s)",
                lambda out, options=options: batch(archive, images, out, *options),  # type: ignore[misc]
            )
        with server_of(archive, work / "run") as server:
            measure("classify, server", lambda out: served(server, images, out.with_suffix(".csv")))
    base = median(rates["bare loop"])
    return [
        [
            *(f"{size[0]}x{size[1]}, {count:,}", name, median(found), median(found) / CORES),
            *(f"{median(found) / base:.3f}", median(steady[name])),
        ]
        for name, found in rates.items()
    ]


@dataclass(frozen=True)
class Memory:
    """What one kind of process had at one moment, in MB."""

    seconds: float
    driver: float
    actors: float
    tasks: float


_COLUMNS: dict[str, Callable[[Memory], float]] = {
    "driver": lambda one: one.driver,
    "all actors": lambda one: one.actors,
    "all tasks": lambda one: one.tasks,
}


def memory(work: Path, count: int) -> list[list[object]]:
    """Return rows: peak memory while many small pictures are classified by a small network."""
    small = from_options(
        name="small", arch="resnet18", weights="random", preprocessing={"resize": 64, "crop": 64}
    )
    archive = build(small, work / "store")
    pictures = make_pictures(work / "small", SMALL, 1)
    (picture,) = pictures.iterdir()
    Image.open(picture).resize((96, 96)).save(picture)
    content = picture.read_bytes()
    for number in range(1, count):
        (pictures / f"{number:06}.jpg").write_bytes(content)
    seen: list[Memory] = []
    done = Event()
    program = [sys.executable, "-m", "batch", str(pictures), "--output", str(work / "small-out")]
    job = psutil.Popen([*program, "--archive", str(archive)], stdout=subprocess.DEVNULL)

    def watch() -> None:
        started = time.monotonic()
        while not done.wait(5):
            seen.append(_memory(job, time.monotonic() - started))

    watcher = Thread(target=watch)
    watcher.start()
    status = job.wait()
    done.set()
    watcher.join()
    assert status == 0
    # The first third is the start, and filling what stays filled.
    thirds = [seen[place * len(seen) // 3 : (place + 1) * len(seen) // 3] for place in range(3)]
    return [
        [name, *(max(values(one) for one in third) for third in thirds)]
        for name, values in _COLUMNS.items()
    ]


def _memory(job: psutil.Popen, seconds: float) -> Memory:
    """Resident, without the object store that all processes map."""
    megabytes = {"driver": _private(job), "actors": 0.0, "tasks": 0.0}
    for child in psutil.Process(job.pid).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::"):
            megabytes["actors" if _ACTOR in title else "tasks"] += _private(child)
    return Memory(seconds, **megabytes)


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
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = build(from_options(arch="densenet121", weights="random"), work / "store")
        rows = compare(archive, work, SMALL, count, rounds)
        rows += compare(archive, work, LARGE, large, rounds)
        resident = memory(work, tiny)
    headings = ("images", "way", "images/s", "per core", "over the bare loop", "steady state")
    lines = [
        (
            f"Whole runs on {CORES} cores, from the start of the programs to their end; medians of "
            f"{rounds} alternating rounds. The steady state leaves out the start and the job's "
            "first part. The bare loop is one process per core with the handler's stages. Repeat: "
            "`make bench-batch`."
        ),
        "",
        *table(headings, rows),
        (
            f"Peak memory in each third of a job of {tiny:,} small images and a small network, in "
            "MB without the object store:"
        ),
        "",
        *table(["process", "first third", "second", "last"], resident),
    ]
    write_section(
        "batch", "Batch classification", "classify-batch, classify and a bare loop", lines
    )
