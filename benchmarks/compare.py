"""Compares this project with other servers: same images, same engine, one server at a time.

An idle server may take CPU from the others, like LitServe, whose processes poll their queues. Each
round starts, warms up, loads and stops every server, in another order. `--together` keeps all of
them running, to show the size of that error.
"""

import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.accuracy import write_crops
from benchmarks.images import encode, noisy, photograph
from benchmarks.known import PHOTOGRAPHS
from benchmarks.load import Load, closed_loop
from benchmarks.peers.common import session
from benchmarks.report import CORES, table, write_section
from benchmarks.servers import NAMES, OURS, Server, serve
from benchmarks.timing import alternate, call_elsewhere, images_per_second, wait_until_idle
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.build.sources.torchvision import random_source
from scripts.terminal import step, warn

IMAGES: dict[str, Callable[[], bytes]] = {
    "720x720": lambda: encode(photograph(720, 720), quality=90),
    # The size of a phone's photo.
    "12 megapixels": lambda: encode(noisy(photograph(4000, 3000)), quality=85),
}
SAME_ENGINE = (OURS, "mosec", "LitServe")
# flask run starts a thread per request with its own buffers: more threads take all memory.
_MAX_CLIENTS = {"Flask tutorial": 16}
# Java compiles its hot code under load.
_WARM_UP_SECONDS = 6
_BARE_SECONDS = 4.0
# With more clients, requests wait longer than a load of a few seconds.
_MANY, _MANY_FACTOR = 64, 2

Key = tuple[str, str]  # server, precision
Case = tuple[str, int]  # image, clients


class Result:
    """The measurements of a server in a precision, over all rounds.

    Attributes:
        settings: as the tables show them.
        loads: for each image and number of clients, one `Load` per round.
        cpu_ms: likewise, CPU time of all processes per successful answer.
        rounds: memory of the largest worker and of all processes after the loads (PSS in MB), and
            seconds to the first answer.
    """

    def __init__(self) -> None:
        self.settings = ""
        self.loads: dict[Case, list[Load]] = defaultdict(list)
        self.cpu_ms: dict[Case, list[float]] = defaultdict(list)
        self.rounds: list[tuple[float, float, float]] = []

    def middle(self, case: Case, value: str) -> float:
        """Return the median of a value of `Load`; NaN if it was not measured."""
        found = self.loads.get(case)
        return median(getattr(load, value) for load in found) if found else float("nan")


def main(  # options of a command line
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    seconds: Annotated[int, typer.Option(min=2, help="Duration of each load.")] = 6,
    server: Annotated[list[str] | None, typer.Option(help="Only these servers.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Only these precisions.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Numbers of clients.")] = None,
    *,
    together: Annotated[bool, typer.Option(help="Keep all servers running.")] = False,
) -> None:
    """Write benchmarks/results/servers.md."""
    cases = [("720x720", count) for count in clients or (1, 16, 64, 256)]
    if not together:
        cases.append(("12 megapixels", 16))
    keys = [
        (name, kind)
        for kind, name in product(precision or ("float32", "bf16", "int8"), server or NAMES)
        if kind == "float32" or name in SAME_ENGINE
    ]
    results: dict[Key, Result] = {key: Result() for key in keys}
    bare: dict[str, list[float]] = {kind: [] for _, kind in keys}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        work = {kind: Path(folder, kind) for kind in bare}
        for kind in bare:
            prepare(kind, work[kind])

        def start(key: Key) -> AbstractContextManager[Server]:
            return serve(key[0], work[key[1]], key[1])

        started = {key: running.enter_context(start(key)) for key in (keys if together else ())}
        for number, key in enumerate(alternate(keys, rounds)):
            if number % len(keys) == 0 and not together:
                for kind, rates in bare.items():
                    rates.append(_bare(work[kind], kind))
            try:
                with nullcontext(started[key]) if together else start(key) as one:
                    _measure(one, results[key], cases, seconds)
            except RuntimeError as error:
                warn(f"{key[0]}, {key[1]}: {error}")
                continue
            last = {case: loads[-1].rate for case, loads in results[key].loads.items()}
            step(f"{key}: {last}")
    section = "All servers running at the same time" if together else "One server at a time"
    section = ", ".join([section, *(precision or ())])
    parts = _report(results, bare, cases, rounds, together=together)
    write_section("servers", "Comparison with other servers", section, *parts)


def prepare(precision: str, work: Path) -> Path:
    """Write an archive with random weights, and the peers' files; return the archive."""
    work.mkdir(parents=True)
    # A reduced precision needs trained weights; this archive is temporary.
    source = replace(random_source("densenet121"), trained=True)
    photographs, crops = sorted(PHOTOGRAPHS), work / "crops"
    write_crops(photographs, crops)
    # int8 divides one folder between calibration and comparison.
    use = {"int8": {"calibration": crops}, "bf16": {"evaluation": crops}}.get(precision, {})
    wanted = {"type": precision, **use, "agreement": 0}
    archive = build(from_options(arch="densenet121", precision=wanted), work / "store", source)
    with zipfile.ZipFile(archive) as content:
        content.extractall(work)
    torch.save(source.module.state_dict(), work / "weights.pth")
    (work / "small.jpg").write_bytes(IMAGES["720x720"]())
    return archive


def _measure(server: Server, result: Result, cases: Iterable[Case], seconds: int) -> None:
    result.settings = server.settings
    closed_loop(server.url, server.body(IMAGES["720x720"]()), 16, _WARM_UP_SECONDS)
    wait_until_idle(server.name, server.cpu_seconds)
    for image, clients in cases:
        if clients > _MAX_CLIENTS.get(server.name, clients):
            continue
        duration = seconds * (_MANY_FACTOR if clients > _MANY else 1)
        before = server.cpu_seconds()
        load = closed_loop(server.url, server.body(IMAGES[image]()), clients, duration)
        used = server.cpu_seconds() - before
        wait_until_idle(server.name, server.cpu_seconds)
        result.loads[image, clients].append(load)
        result.cpu_ms[image, clients].append(1000 * used / max(1, load.answered))
    result.rounds.append((*server.memory(), server.first_answer))


def _bare(work: Path, precision: str) -> float:
    """Return images per second of the engine alone, in its own process."""
    environment = {"BENCHMARK_FILES": str(work), "BENCHMARK_PRECISION": precision}
    return float(call_elsewhere("benchmarks.compare", "bare", **environment).split()[-1])


def bare() -> None:
    """Print images per second of batches of 8 with all cores."""
    model = session(CORES)
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 224, 224), dtype=np.uint8)
    print(images_per_second(lambda: model.run(["logits"], {"images": images}), 8, _BARE_SECONDS))


def _report(
    results: dict[Key, Result],
    bare: dict[str, list[float]],
    cases: list[Case],
    rounds: int,
    *,
    together: bool,
) -> Iterator[str | list[str]]:
    """Yield paragraphs and tables."""
    images = ", ".join(f"{k} JPEG of {len(make()) / 1e3:,.0f} kB" for k, make in IMAGES.items())
    how = "all servers kept running" if together else "one server running at a time"
    yield (
        f"{images}; random weights, which do not change the speed. Load: wrk in a closed loop on "
        f"the same cores, each client sending again at once, also after a rejection; {how}; "
        f"medians of {rounds} alternating rounds. A rate counts successful responses only. Repeat: "
        f"`make bench`{' with --together' * together}."
    )
    if not together:
        engine = [f"{kind} {median(rates):.1f}" for kind, rates in bare.items()]
        yield f"Engine alone, {CORES} threads, batches of 8, images/s: {', '.join(engine)}."
    headings = [
        f"{count} client{'s' * (count > 1)}, {image}: {'p50 ms' if count == 1 else 'images/s'}"
        for image, count in cases
    ]
    yield table(
        ["server", "precision", *headings],
        (
            [*key, *(result.middle(case, "p50" if case[1] == 1 else "rate") for case in cases)]
            for key, result in results.items()
        ),
    )
    yield from _ratios(results, cases, headings)
    headings = [
        *("server", "precision", "image", "clients", "images/s", "lowest and highest round"),
        *("p50 ms", "p95 ms", "p99 ms", "failed", "CPU ms per image"),
    ]
    yield table(headings, (_row(*one, case) for one in results.items() for case in one[1].loads))
    headings = [
        *("server", "precision", "settings", "largest worker MB (PSS)", "all processes MB"),
        "first answer s",
    ]
    yield table(
        headings,
        (
            [*key, result.settings, *map(median, zip(*result.rounds, strict=True))]
            for key, result in results.items()
            if result.rounds
        ),
    )


def _row(key: Key, result: Result, case: Case) -> list[object]:
    rates = [load.rate for load in result.loads[case]]
    return [
        *(*key, *case, median(rates), f"{min(rates):.1f} to {max(rates):.1f}"),
        *(result.middle(case, name) for name in ("p50", "p95", "p99")),
        *(sum(load.failed for load in result.loads[case]), median(result.cpu_ms[case])),
    ]


def _ratios(
    results: dict[Key, Result], cases: list[Case], headings: list[str]
) -> Iterator[str | list[str]]:
    """Yield how many times as fast this project is as each peer in the same precision."""
    rows = []
    for (name, kind), peer in results.items():
        mine = results.get((OURS, kind))
        if name == OURS or mine is None:
            continue
        ratios = [
            peer.middle(case, "p50") / mine.middle(case, "p50")
            if case[1] == 1
            else mine.middle(case, "rate") / peer.middle(case, "rate")
            for case in cases
        ]
        rows.append([name, kind, *(f"{r:.2f}" if r == r else "" for r in ratios)])  # noqa: PLR0124
    names = [heading.split(":")[0] for heading in headings]
    yield "How many times as fast this project is (latency for 1 client, else images/s):"
    yield table(["compared with", "precision", *names], rows)
