"""Serves the same pictures with this project and with its peers, side by side on this machine.

All servers run throughout; each round asks one after the other, so that a noisy minute hits all.
Beside them stands the bare engine: ONNX Runtime in one process, batches of 8, all cores, nothing
to decode and nobody to answer.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated
from urllib.parse import urlsplit

import matplotlib as mpl
import numpy as np
import torch
import typer

from benchmarks.machine import CORES, RESULTS, write_report
from benchmarks.peers.common import session
from benchmarks.pictures import encode, noisy, photograph
from benchmarks.servers import Server, request_body, start_ours, start_peer, start_stock
from benchmarks.timing import images_a_second, in_turn, wait_until_quiet
from benchmarks.wrk import Body, closed_loop, environment, require_wrk
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.terminal import command, step, warn

mpl.use("Agg")

PEERS = ("Flask tutorial", "Flask, gunicorn", "mosec", "LitServe", "BentoML")
OURS = "this project"
STOCK = "TorchServe image_classifier"

# Clients at once in the closed loop.
CLIENTS = (1, 16, 64)
# Share of the bare engine's rate that the open loop asks for, and its users.
OPEN_SHARE, OPEN_USERS = 0.6, 64
BARE_SECONDS = 4.0
# Java compiles its hot code under load; the other servers need less.
WARM_UP_SECONDS = 8
# Answers a request in a thread or a process of its own: 64 at once only make a backlog.
UNBATCHED = ("Flask tutorial", "Flask, gunicorn")

# Each ratio's name, and the least (or most) it should be.
GOALS = {
    "720x720, 16 clients: over the bare engine": 0.90,
    f"720x720, 16 clients: over {STOCK}": 2.3,
    "720x720, 16 clients: over Flask tutorial": 3.0,
    "720x720, 16 clients: over mosec": 1.0,
    "12 megapixels, 16 clients: over the bare engine": 0.65,
    f"12 megapixels, 16 clients: over {STOCK}": 5.0,
    "12 megapixels, 16 clients: over mosec": 2.3,
    "1 client: median latency over the bare engine's at batch 1 (at most)": 1.35,
    "64 clients over 16": 0.95,
}


@dataclass(frozen=True)
class Sample:
    """What one round of load gave: rates in images a second, latencies in ms."""

    rate: float
    p50: float
    p95: float
    p99: float
    failures: int
    cpu_ms: float


Key = tuple[str, str, str]  # server, picture, load
Load = tuple[Server, str, int]  # server, picture, clients


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=3, help="Load on each server a round.")] = 6,
) -> None:
    """Compares this project with its peers; writes benchmarks/results/."""
    require_wrk()
    samples: dict[Key, list[Sample]] = {}
    bare: dict[int, list[float]] = {1: [], 8: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        archive = _prepare(work)
        servers = list(_start(archive, work, stack))
        for server in servers:
            _load(server, work, "small", 16, WARM_UP_SECONDS)
        plan: list[int | Load] = [*bare, *_plan(servers)]
        for one in in_turn(plan, rounds):
            if isinstance(one, int):
                bare[one].append(_bare(one))
                continue
            server, picture, clients = one
            sample = _load(server, work, picture, clients, seconds)
            samples.setdefault((server.name, picture, str(clients)), []).append(sample)
            step(f"{server.name}, {picture}, {clients} clients: {sample.rate:.1f}/s")
        rate = OPEN_SHARE * median(bare[8])
        for server in servers:
            if server.name in UNBATCHED:
                continue
            sample = _open_load(server, work, "small", rate, 2 * seconds)
            samples[server.name, "small", "open"] = [sample]
        _write(servers, samples, bare, rate, _picture_sizes(work))


def _prepare(work: Path) -> Path:
    """Pictures, weights and archive into the folder that the servers read."""
    os.environ["BENCHMARK_FILES"] = str(work)
    weights = untrained()
    archive = build(recipe(weights), work / "store")
    with zipfile.ZipFile(archive) as content:
        (work / "model.onnx").write_bytes(content.read("model.onnx"))
    (work / "index_to_name.json").write_bytes(Path("handler/index_to_name.json").read_bytes())
    torch.save(weights.state_dict, work / "weights.pth")
    (work / "small.jpg").write_bytes(encode(photograph(720, 720), quality=90))
    # A photograph of a telephone's size.
    (work / "large.jpg").write_bytes(encode(noisy(photograph(4000, 3000)), quality=85))
    return archive


def _picture_sizes(work: Path) -> str:
    small, large = ((work / f"{name}.jpg").stat().st_size for name in ("small", "large"))
    return f"720x720 JPEG of {small / 1e3:.0f} kB, 4000x3000 JPEG of {large / 1e6:.1f} MB"


def _start(archive: Path, work: Path, stack: ExitStack) -> Iterator[Server]:
    for name in (OURS, STOCK, *PEERS):
        try:
            if name == OURS:
                server = start_ours(archive, work)
            elif name == STOCK:
                server = start_stock(work)
            else:
                server = start_peer(name, work)
        except RuntimeError as error:
            warn(f"Left out: {error}")
            continue
        stack.callback(server.stop)
        step(f"{name}: first answer after {server.first_answer:.1f} s")
        yield server


def _plan(servers: list[Server]) -> Iterator[Load]:
    """What one round asks."""
    for clients in CLIENTS:
        for server in servers:
            if clients <= CLIENTS[1] or server.name not in UNBATCHED:
                yield server, "small", clients
    # Only where it is compared: 12 megapixels take the others seconds each.
    yield from (
        (server, "large", 16) for server in servers if server.name in (OURS, STOCK, "mosec")
    )


def _load(server: Server, work: Path, picture: str, clients: int, seconds: int) -> Sample:
    """Closed loop: each client waits for its answer and asks again."""
    body = _body(server, work, picture)
    before = server.cpu_seconds()
    found = closed_loop(server.url, body, clients, seconds)
    used = server.cpu_seconds() - before
    wait_until_quiet(server.name, server.cpu_seconds)
    return Sample(
        rate=found["count"] / found["seconds"],
        p50=found["p50"],
        p95=found["p95"],
        p99=found["p99"],
        failures=int(found["failures"]),
        cpu_ms=1000 * used / max(1, found["count"]),
    )


def _open_load(server: Server, work: Path, picture: str, rate: float, seconds: int) -> Sample:
    """Open loop: requests come at their pace, however slow the answers are."""
    address = urlsplit(server.url)
    prefix = work / "locust"
    before = server.cpu_seconds()
    subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py", "--headless"),
            *("--users", str(OPEN_USERS), "--spawn-rate", str(OPEN_USERS)),
            *("--run-time", f"{seconds}s", "--stop-timeout", "30", "--csv", str(prefix)),
            *("--host", f"{address.scheme}://{address.netloc}", "--loglevel", "ERROR"),
        ],
        env={
            **environment(_body(server, work, picture), work),
            "BENCHMARK_PATH": address.path,
            "BENCHMARK_RATE": str(rate / OPEN_USERS),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,  # locust's status is 1 where a request failed; failures are counted
    )
    used = server.cpu_seconds() - before
    wait_until_quiet(server.name, server.cpu_seconds)
    with Path(f"{prefix}_stats.csv").open() as table:
        total = next(row for row in csv.DictReader(table) if row["Name"] == "Aggregated")
    return Sample(
        rate=float(total["Requests/s"]),
        p50=float(total["50%"]),
        p95=float(total["95%"]),
        p99=float(total["99%"]),
        failures=int(total["Failure Count"]),
        cpu_ms=1000 * used / max(1, int(total["Request Count"])),
    )


def _body(server: Server, work: Path, picture: str) -> Body:
    return request_body(server, (work / f"{picture}.jpg").read_bytes())


def _bare(batch: int) -> float:
    """Images a second of the engine alone, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", _BARE_PROGRAM, str(batch), str(CORES), str(BARE_SECONDS)],
        capture_output=True,
        text=True,
        check=True,
    )
    rate: float = json.loads(result.stdout)
    return rate


_BARE_PROGRAM = "import sys; from benchmarks.bench import bare; bare(*map(float, sys.argv[1:]))"


def bare(batch: float, threads: float, seconds: float) -> None:
    """Prints the rate; runs in a process of its own."""
    model = session(int(threads))
    images = np.random.default_rng(0).integers(0, 256, (int(batch), 3, 224, 224), dtype=np.uint8)

    def run() -> None:
        model.run(["logits"], {"images": images})

    print(json.dumps(images_a_second(run, len(images), seconds)))


def _ratios(samples: dict[Key, list[Sample]], bare: dict[int, list[float]]) -> dict[str, float]:
    """Medians over the rounds; a peer that did not start has no ratio."""

    def rate(name: str, picture: str = "small", load: str = "16") -> float:
        found = samples.get((name, picture, load))
        return median(s.rate for s in found) if found else float("nan")

    engine = median(bare[8])
    alone = median(s.p50 for s in samples[OURS, "small", "1"])
    values = [
        rate(OURS) / engine,
        rate(OURS) / rate(STOCK),
        rate(OURS) / rate("Flask tutorial"),
        rate(OURS) / rate("mosec"),
        rate(OURS, "large") / engine,
        rate(OURS, "large") / rate(STOCK, "large"),
        rate(OURS, "large") / rate("mosec", "large"),
        alone * median(bare[1]) / 1000,
        rate(OURS, load="64") / rate(OURS),
    ]
    return dict(zip(GOALS, values, strict=True))


def _write(
    servers: list[Server],
    samples: dict[Key, list[Sample]],
    bare: dict[int, list[float]],
    open_rate: float,
    pictures: str,
) -> None:
    lines = [
        (
            f"Pictures: {pictures}; the weights are random, which changes no timing. Load: "
            "wrk (closed loop), locust (open loop), on the same cores as the servers. Medians of "
            "alternating rounds. Made by `make bench`."
        ),
        "",
        (
            f"The bare engine: {median(bare[8]):.1f} images/s in batches of 8, "
            f"{median(bare[1]):.1f} one by one, {CORES} threads."
        ),
        "",
        "| ratio | goal | here |",
        "|---|---|---|",
    ]
    for name, value in _ratios(samples, bare).items():
        lines.append(f"| {name} | {GOALS[name]} | {value:.2f} |")
    lines += [
        "",
        "| server | picture | clients | images/s | p50 ms | p95 ms | p99 ms | failed | CPU ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    titles = {"small": "720x720", "large": "12 megapixels"}
    for (name, picture, load), found in samples.items():
        clients = f"open loop, {open_rate:.0f}/s" if load == "open" else load
        middle = [median(getattr(s, f) for s in found) for f in ("rate", "p50", "p95", "p99")]
        lines.append(
            f"| {name} | {titles[picture]} | {clients} | {middle[0]:.1f} | {middle[1]:.0f} | "
            f"{middle[2]:.0f} | {middle[3]:.0f} | {sum(s.failures for s in found)} | "
            f"{median(s.cpu_ms for s in found):.0f} |"
        )
    lines += [
        "",
        "| server | settings | largest worker MB (PSS) | all processes MB | first answer s |",
        "|---|---|---|---|---|",
    ]
    for server in servers:
        worker, everything = server.memory()
        lines.append(
            f"| {server.name} | {server.settings} | {worker / 1e6:.0f} | {everything / 1e6:.0f} | "
            f"{server.first_answer:.1f} |"
        )
    lines += ["", "![latency against throughput](servers.png)"]
    write_report("servers", "Servers", lines)
    _chart(servers, samples)


def _chart(servers: list[Server], samples: dict[Key, list[Sample]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for server in servers:
        loads = [(server.name, "small", str(clients)) for clients in CLIENTS]
        points = [samples[load] for load in loads if load in samples]
        axes.plot(
            [median(s.rate for s in found) for found in points],
            [median(s.p50 for s in found) for found in points],
            marker="o",
            label=server.name,
        )
    axes.set_xlabel("images a second")
    axes.set_ylabel("median latency, ms")
    axes.set_yscale("log")
    axes.set_title(f"720x720 JPEG, {', '.join(map(str, CLIENTS))} clients, {CORES} cores")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "servers.png", dpi=110)


if __name__ == "__main__":
    command(main)
