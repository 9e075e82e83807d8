"""What each precision gives: speed as served, beside peers in the same, and memory.

The weights are random, which changes no speed; `benchmarks.accuracy` measures what is lost. All
servers run throughout; each round asks one after the other, so that a noisy minute hits all.
"""

import os
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import write_report
from benchmarks.pictures import encode, noisy, photograph
from benchmarks.servers import Server, request_body, start_ours, start_peer
from benchmarks.timing import in_turn
from benchmarks.trained import random_model
from benchmarks.wrk import closed_loop, require_wrk
from handler.settings import PRECISIONS
from scripts.build.archive import build, recipe
from scripts.build.lower_precision import chosen
from scripts.build.weights import load as load_weights
from scripts.terminal import command, step, warn

PEERS = ("mosec", "LitServe")
OURS = "this project"
WARM_UP_SECONDS = 8
PICTURES = {
    "small": encode(photograph(720, 720), quality=90),
    "large": encode(noisy(photograph(4000, 3000)), quality=85),
}

# What multiplies small numbers natively, as /proc/cpuinfo calls it.
_INSTRUCTIONS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
)

# Each ratio's name, and the least it should be where the processor has the instructions.
GOALS = {
    "int8 over float32, 720x720, 16 clients": 1.8,
    "bf16 over float32, 720x720, 16 clients": 1.5,
    "int8 over float32, 12 megapixels, 16 clients": 1.25,
    "float32's median over int8's, 1 client": 1.0,
    "float32's median over bf16's, 1 client": 1.0,
}


@dataclass(frozen=True)
class Sample:
    """What one round of load gave: images a second, and latencies in ms."""

    rate: float
    p50: float
    p99: float
    failures: int


Key = tuple[str, str, str, int]  # server, precision, picture, clients


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=2, help="Load on each server a round.")] = 6,
    peers: Annotated[bool, typer.Option(help="Compare with other servers too.")] = True,  # noqa: FBT002
) -> None:
    """Measures the precisions and writes benchmarks/results/precision.md."""
    require_wrk()
    model = random_model()
    samples: dict[Key, list[Sample]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = {precision: Path(folder) / precision for precision in PRECISIONS}
        archives = {name: _prepare(name, model, folder) for name, folder in work.items()}
        servers: dict[tuple[str, str], Server] = {}
        for precision in PRECISIONS:
            # Peers read it as they start.
            os.environ["BENCHMARK_PRECISION"] = precision
            for name in (OURS, *PEERS) if peers else (OURS,):
                try:
                    server = (
                        start_ours(archives[precision], work[precision])
                        if name == OURS
                        else start_peer(name, work[precision])
                    )
                except RuntimeError as error:
                    warn(f"Left out: {name} in {precision}: {error}")
                    continue
                stack.callback(server.stop)
                step(f"{name}, {precision}: first answer after {server.first_answer:.1f} s")
                servers[name, precision] = server
        for server in servers.values():
            _load(server, PICTURES["small"], 16, WARM_UP_SECONDS)
        for (name, precision), server in in_turn(list(servers.items()), rounds):
            loads = [("small", 16), ("small", 1)] + [("large", 16)] * (name == OURS)
            for picture, clients in loads:
                found = _load(server, PICTURES[picture], clients, seconds)
                samples.setdefault((name, precision, picture, clients), []).append(found)
                step(f"{name}, {precision}, {picture}, {clients}: {found.rate:.1f}/s")
        _write(servers, samples)


def _prepare(precision: str, model: Path, work: Path) -> Path:
    """The archive, and its files for the peers."""
    work.mkdir(parents=True)
    lower = chosen(
        precision,
        model / "train" if precision == "int8" else None,
        None if precision == "float32" else model / "test",
        max_loss=100,
    )
    weights = load_weights(model / "weights.pth")
    packed = recipe(weights, precision, model / "classes.txt", lower=lower)
    archive = build(packed, work / "store")
    with zipfile.ZipFile(archive) as content:
        content.extractall(work)
    (work / "small.jpg").write_bytes(PICTURES["small"])  # what each server is first asked
    return archive


def _load(server: Server, picture: bytes, clients: int, seconds: int) -> Sample:
    """Closed loop: each client waits for its answer and asks again."""
    found = closed_loop(server.url, request_body(server, picture), clients, seconds)
    rate = found["count"] / found["seconds"]
    return Sample(rate, found["p50"], found["p99"], int(found["failures"]))


def _write(
    servers: dict[tuple[str, str], Server],
    samples: dict[Key, list[Sample]],
) -> None:
    def middle(name: str, precision: str, picture: str, clients: int, value: str) -> float:
        found = samples.get((name, precision, picture, clients), [])
        return median(getattr(s, value) for s in found) if found else float("nan")

    def rate(precision: str, picture: str = "small") -> float:
        return middle(OURS, precision, picture, 16, "rate")

    def alone(precision: str) -> float:
        return middle(OURS, precision, "small", 1, "p50")

    ratios = (
        rate("int8") / rate("float32"),
        rate("bf16") / rate("float32"),
        rate("int8", "large") / rate("float32", "large"),
        alone("float32") / alone("int8"),
        alone("float32") / alone("bf16"),
    )
    lines = [
        (
            f"The processor has {', '.join(_instructions()) or 'none of the instructions'}. The "
            "model is a DenseNet-121 with random weights, which change no speed. Load: wrk, "
            "closed loop, on the same cores as the servers; medians of alternating rounds. Peers "
            "run this project's engine of the same precision. Made by `make bench-precision`."
        ),
        "",
        "| ratio | goal | here |",
        "|---|---|---|",
    ]
    for (name, goal), value in zip(GOALS.items(), ratios, strict=True):
        lines.append(f"| {name} | {goal} | {value:.2f} |")
    for peer in PEERS:
        for precision in PRECISIONS:
            value = rate(precision) / middle(peer, precision, "small", 16, "rate")
            if not np.isnan(value):
                lines.append(f"| over {peer}, both in {precision} | 1.0 | {value:.2f} |")
    lines += [
        "",
        (
            "| server | precision | 16 clients: images/s | p99 ms | 1 client: p50 ms "
            "| 12 megapixels, 16 clients: images/s | failed | largest worker MB (PSS) "
            "| first answer s |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, precision), server in servers.items():
        mine = [found for key, found in samples.items() if key[:2] == (name, precision)]
        failed = sum(sample.failures for found in mine for sample in found)
        large = middle(name, precision, "large", 16, "rate")
        lines.append(
            f"| {name} | {precision} | {middle(name, precision, 'small', 16, 'rate'):.1f} "
            f"| {middle(name, precision, 'small', 16, 'p99'):.0f} "
            f"| {middle(name, precision, 'small', 1, 'p50'):.1f} "
            f"| {'' if np.isnan(large) else f'{large:.1f}'} | {failed} "
            f"| {server.memory()[0] / 1e6:.0f} | {server.first_answer:.1f} |"
        )
    write_report("precision", "Precision", lines)


def _instructions() -> list[str]:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return []
    return [name for name in _INSTRUCTIONS if name in flags]


if __name__ == "__main__":
    command(main)
