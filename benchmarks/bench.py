"""Serves the same pictures with this project and with its peers, side by side on this machine.

All servers run throughout; each round asks one after the other, so that a noisy minute hits all.
Beside them stands the bare engine: ONNX Runtime in one process, batches of 8, all cores, nothing
to decode and nobody to answer.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
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
from PIL import Image

from benchmarks.machine import RESULTS, write_report
from benchmarks.peers.common import session
from benchmarks.servers import CORES, Server, request_body, start_ours, start_peer, start_stock
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.samples import CAT
from scripts.terminal import UserError, command, step, warn

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
# A server that still works on what was given up counts as quiet below this share of a core.
QUIET, QUIET_TIMEOUT = 0.2, 90.0
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


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=3, help="Load on each server a round.")] = 6,
) -> None:
    """Compares this project with its peers; writes benchmarks/results/."""
    if shutil.which("wrk") is None:
        raise UserError("The load is made by wrk, which is not installed (on Debian: wrk).")
    samples: dict[Key, list[Sample]] = {}
    bare: dict[int, list[float]] = {1: [], 8: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        archive = _prepare(work)
        servers = list(_start(archive, work, stack))
        for server in servers:
            _load(server, work, "small", 16, WARM_UP_SECONDS)
        for number in range(rounds):
            step(f"Round {number + 1} of {rounds}")
            for batch, rates in bare.items():
                rates.append(_bare(batch))
            for server, picture, clients in _plan(servers, number):
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
    with Image.open(CAT.parent / "astronaut.png") as photograph:
        rgb = photograph.convert("RGB")
    rgb.resize((720, 720), Image.Resampling.BICUBIC).save(work / "small.jpg", quality=90)
    # A photograph of a telephone's size; noise as its sensor has makes the file as large.
    large = np.asarray(rgb.resize((4000, 3000), Image.Resampling.BICUBIC)).astype(np.float32)
    large += np.random.default_rng(0).normal(0, 4, (3000, 4000, 1))
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(work / "large.jpg", quality=85)
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


def _plan(servers: list[Server], number: int) -> Iterator[tuple[Server, str, int]]:
    """What one round asks; the order turns, so that no server always follows the same one."""
    turn = number % len(servers)
    turned = servers[turn:] + servers[:turn]
    for clients in CLIENTS:
        for server in turned:
            if clients <= CLIENTS[1] or server.name not in UNBATCHED:
                yield server, "small", clients
    # Only where it is compared: 12 megapixels take the others seconds each.
    yield from ((server, "large", 16) for server in turned if server.name in (OURS, STOCK, "mosec"))


def _load(server: Server, work: Path, picture: str, clients: int, seconds: int) -> Sample:
    """Closed loop: each client waits for its answer and asks again."""
    environment = _request(server, work, picture)
    before = server.cpu_seconds()
    found = closed_loop(server.url, environment, clients, seconds)
    used = server.cpu_seconds() - before
    _wait_until_quiet(server)
    return Sample(
        rate=found["count"] / found["seconds"],
        p50=found["p50"],
        p95=found["p95"],
        p99=found["p99"],
        failures=int(found["failures"]),
        cpu_ms=1000 * used / max(1, found["count"]),
    )


def closed_loop(
    url: str, environment: dict[str, str], clients: int, seconds: int
) -> dict[str, float]:
    """Runs wrk; see wrk.lua for what it reads from the environment and what it gives."""
    result = subprocess.run(
        [
            *("wrk", "--threads", "1", "--connections", str(clients)),
            *("--duration", f"{seconds}s", "--timeout", "60s"),
            *("--script", "benchmarks/wrk.lua", url),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    found: dict[str, float] = json.loads(line.removeprefix("RESULT"))
    return found


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
            **_request(server, work, picture),
            "BENCHMARK_PATH": address.path,
            "BENCHMARK_RATE": str(rate / OPEN_USERS),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,  # locust's status is 1 where a request failed; failures are counted
    )
    used = server.cpu_seconds() - before
    _wait_until_quiet(server)
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


def _wait_until_quiet(server: Server) -> None:
    """A load's last requests are given up by their clients, but not by every server: the next
    server must not pay for them.
    """
    deadline = time.monotonic() + QUIET_TIMEOUT
    while time.monotonic() < deadline:
        before, began = server.cpu_seconds(), time.monotonic()
        time.sleep(0.5)
        if (server.cpu_seconds() - before) / (time.monotonic() - began) < QUIET:
            return
    warn(f"{server.name} is still busy after {QUIET_TIMEOUT:.0f} s without requests.")


def _request(server: Server, work: Path, picture: str) -> dict[str, str]:
    """Writes the body that the load sends; the environment that says where it is."""
    body, content_type = request_body(server, (work / f"{picture}.jpg").read_bytes())
    (work / "body").write_bytes(body)
    return {**os.environ, "BENCHMARK_BODY": str(work / "body"), "BENCHMARK_TYPE": content_type}


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
    model.run(["logits"], {"images": images})
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        model.run(["logits"], {"images": images})
        count += len(images)
    print(json.dumps(count / elapsed))


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
