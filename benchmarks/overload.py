"""Measures overload: more clients than the queue holds, clients with a deadline, disconnections.

The curve has TorchServe's port, mosec and LitServe with the same engine, one server at a time.
Deadlines and disconnections need the gateway.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from matplotlib import pyplot

from benchmarks.compare import IMAGES, prepare
from benchmarks.load import Body, Load, closed_loop
from benchmarks.report import RESULTS, table, write_section
from benchmarks.servers import OURS, behind_gateway, serve
from benchmarks.timing import wait_until_idle
from scripts.gateway.options import Options
from scripts.serve.running import HOST
from scripts.terminal import step

_TITLE = "Overload"
_SERVERS = (OURS, "mosec", "LitServe")
_CLIENTS = (1, 16, 64, 128, 256, 512, 2000)
_SECONDS = 20
_WARM_UP_SECONDS = 6
# Open loop: twice the capacity for half a minute; the client's timeout.
_OVERLOAD = 2.0
_OVERLOAD_SECONDS = 30
_PATIENCE = 2.0
# Clients per second that send an image and disconnect; duration.
_LEAVERS = 30
_LEAVERS_SECONDS = 15


def main(
    server: Annotated[list[str] | None, typer.Option(help="Only these servers.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Numbers of clients.")] = None,
    *,
    curve: Annotated[bool, typer.Option(help="Measure the number of clients.")] = True,
    gateway: Annotated[bool, typer.Option(help="Measure clients that give up or leave.")] = True,
) -> None:
    """Write benchmarks/results/overload.md and overload.png."""
    image = IMAGES["720x720"]()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        archive = prepare("float32", work)
        if curve:
            _write_curve(work, image, server or _SERVERS, clients or _CLIENTS)
        if gateway:
            with behind_gateway(archive, Path(folder, "run")) as (_, options):
                _write_gateway(options, image)


def _write_curve(work: Path, image: bytes, servers: Sequence[str], clients: Sequence[int]) -> None:
    found: dict[str, dict[int, Load]] = {}
    for name in servers:
        with serve(name, work) as running:
            body = running.body(image)
            closed_loop(running.url, body, 16, _WARM_UP_SECONDS)
            found[name] = {}
            for count in clients:
                wait_until_idle(name, running.cpu_seconds)
                found[name][count] = closed_loop(running.url, body, count, _SECONDS)
        step(f"{name}: " + ", ".join(f"{n}: {load.rate:.1f}/s" for n, load in found[name].items()))
    rows = [
        (name, count, load.rate, load.failed, load.p50, load.p99)
        for name, loads in found.items()
        for count, load in loads.items()
    ]
    headings = ("server", "clients", "successes/s", "failed", "p50 ms", "p99 ms")
    write_section(
        *("overload", _TITLE, "From 1 to 2,000 clients"),
        f"720x720 JPEG of {len(image) // 1000} kB, wrk in a closed loop on the same cores, each "
        "client sending again at once, also after a rejection; one server at a time; "
        f"{_SECONDS} s each. Latencies are of all responses. Repeat: `make bench-overload`.",
        "![successes and latencies against clients](overload.png)",
        table(headings, rows),
    )
    _plot(found)


def _plot(found: dict[str, dict[int, Load]]) -> None:
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 7))
    for (name, loads), color in zip(found.items(), ("C0", "C1", "C2"), strict=False):
        counts = list(loads)
        above.plot(counts, [load.rate for load in loads.values()], "o-", color=color, label=name)
        below.plot(counts, [load.p50 for load in loads.values()], "o-", color=color)
        below.plot(counts, [load.p99 for load in loads.values()], "o:", color=color)
    above.set(ylabel="successes per second", xscale="log", ylim=(0, None))
    below.set(xlabel="clients", ylabel="latency in ms: p50, dotted p99", yscale="log")
    above.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "overload.png", dpi=100)


def _write_gateway(options: Options, image: bytes) -> None:
    url = f"{options.url}/predict"
    closed_loop(url, Body(image), 16, _WARM_UP_SECONDS)
    capacity = closed_loop(url, Body(image), 16, _SECONDS).rate
    clients = _Clients(options.http_port, image)
    impatient = asyncio.run(clients.open_loop(_OVERLOAD * capacity, _OVERLOAD_SECONDS))
    after = asyncio.run(clients.one_by_one(3))
    alone = asyncio.run(clients.one_by_one(10))
    with_leavers = asyncio.run(clients.one_by_one(_LEAVERS_SECONDS, _LEAVERS))
    large = closed_loop(url, Body(image), 512, _SECONDS)
    in_time = impatient / _OVERLOAD_SECONDS
    rows = [
        ("16 clients, images/s", capacity),
        ("512 clients, images/s", large.rate),
        ("512 clients, failed", large.failed),
        (f"{_OVERLOAD:g} x capacity, clients wait {_PATIENCE:g} s: in time/s", in_time),
        ("share of the capacity", f"{in_time / capacity:.2f}"),
        ("right after it, one client: median ms", 1000 * median(after)),
        ("one client alone: images/s", len(alone) / 10.0),
        (f"with {_LEAVERS} clients/s that leave: images/s", len(with_leavers) / _LEAVERS_SECONDS),
    ]
    step(str(rows))
    text = "Through the gateway. Repeat: `make bench-overload`."
    write_section("overload", _TITLE, "Clients that give up or leave", text, table(["", ""], rows))


class _Clients:
    """Clients of the gateway that open a connection per request."""

    def __init__(self, port: int, image: bytes) -> None:
        self._port = port
        self._image = image

    async def open_loop(self, rate: float, seconds: float) -> int:
        """Send requests at a rate, each with a limit of `_PATIENCE`; count those in time."""
        started = time.monotonic()
        tasks: list[asyncio.Task[bool]] = []
        while (elapsed := time.monotonic() - started) < seconds:
            while len(tasks) < rate * elapsed:
                tasks.append(asyncio.create_task(self._ask(_PATIENCE)))
            await asyncio.sleep(0.005)
        return sum(await asyncio.gather(*tasks))

    async def one_by_one(self, seconds: float, leavers: int = 0) -> list[float]:
        """Send one request after the other; return the seconds that each success took.

        Meanwhile `leavers` other clients per second send an image and disconnect.
        """

        async def leave() -> None:
            while leavers:
                tasks.append(asyncio.create_task(self._request(60, leaves=True)))
                await asyncio.sleep(1 / leavers)

        tasks: list[asyncio.Task[bool]] = []
        leaving = asyncio.create_task(leave())
        started, found = time.monotonic(), []
        while (began := time.monotonic()) < started + seconds:
            if await self._ask(60):
                found.append(time.monotonic() - began)
        leaving.cancel()
        return found

    async def _ask(self, patience: float) -> bool:
        """Return whether the response arrived in time and was a success."""
        try:
            return await asyncio.wait_for(self._request(patience), patience)
        except (OSError, asyncio.TimeoutError):
            return False

    async def _request(self, patience: float, *, leaves: bool = False) -> bool:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        head = (
            f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {len(self._image)}\r\nX-Request-Timeout: {patience:g}\r\n"
            "Connection: close\r\n\r\n"
        )
        try:
            writer.write(head.encode() + self._image)
            await writer.drain()
            return not leaves and b" 200 " in await reader.readline()
        finally:
            writer.close()
