"""Measures `make run` in a fresh clone: seconds to the first answer, download and disk.

Packages come through a proxy of this program, which counts bytes and limits their rate.
"""

import asyncio
import os
import re
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import table, write_section
from scripts.serve.running import HOST, Ports, free_ports
from scripts.terminal import step

_BLOCK = 1 << 16


class Proxy:
    """An HTTPS proxy (CONNECT) on loopback, in a thread.

    Attributes:
        received: bytes that its clients received.
        rate: bytes per second for all connections together; None for no limit.
    """

    def __init__(self) -> None:
        """Start the proxy on a free port."""
        self.received = 0
        self.rate: float | None = None
        self._free_at = 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        start = asyncio.start_server(self._serve, HOST, 0)
        server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if match := re.match(rb"CONNECT (\S+):(\d+) ", head):
            with suppress(OSError):
                there = await asyncio.open_connection(match[1].decode(), int(match[2]))
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                await asyncio.gather(
                    self._copy(there[0], writer, limited=True),
                    self._copy(reader, there[1], limited=False),
                )
        writer.close()

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, limited: bool
    ) -> None:
        while block := await source.read(_BLOCK):
            if limited:
                self.received += len(block)
                if self.rate is not None:
                    now = time.monotonic()
                    self._free_at = max(now, self._free_at) + len(block) / self.rate
                    await asyncio.sleep(self._free_at - now)
            target.write(block)
            await target.drain()
        target.close()


def main(
    megabits: Annotated[float, typer.Option(help="Limit of the network, Mbit/s.")] = 50,
    rounds: Annotated[int, typer.Option(help="Runs with a full cache.")] = 3,
) -> None:
    """Write the section on `make run` of benchmarks/results/install.md."""
    with tempfile.TemporaryDirectory() as folder:
        work, proxy = Path(folder), Proxy()
        proxy.rate = megabits * 1e6 / 8
        seconds, setup, clone = _first_answer(work, proxy)
        received = proxy.received / 1e6
        disk = _megabytes(clone / ".venv")
        rows: list[tuple[object, ...]] = [
            (f"empty, {megabits:.0f} Mbit/s", seconds, setup, seconds - setup, received, disk)
        ]
        proxy.rate = None
        for _ in range(rounds):
            before = proxy.received
            seconds, setup, _ = _first_answer(work, proxy)
            received = (proxy.received - before) / 1e6
            rows.append(("full", seconds, setup, seconds - setup, received, disk))
    lines = [
        (
            "`make run ARCH=efficientnet_lite0` in a fresh clone, from the command to the first "
            "answer, with the caches of uv and pip empty or full. Installing is `make "
            "setup-lite0`. Repeat: `make bench-install`."
        ),
        "",
        *table(
            ["cache", "seconds", "installing", "the rest", "received MB", ".venv MB"],
            rows,
        ),
    ]
    write_section("install", "Installing", "`make run`", lines)


def _first_answer(work: Path, proxy: Proxy) -> tuple[float, float, Path]:
    """Return the seconds until the first answer, those of installing, and the clone."""
    clone = work / f"clone-{time.monotonic_ns()}"
    subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
    environment = os.environ | {
        "https_proxy": proxy.url,
        "UV_CACHE_DIR": str(work / "uv"),
        "PIP_CACHE_DIR": str(work / "pip"),
    }
    ports: Ports = free_ports()
    began = time.monotonic()
    _make("setup-lite0", clone=clone, environment=environment)
    setup = time.monotonic() - began
    options = (f"PORT={ports.inference}", f"METRICS_PORT={ports.metrics}")
    _make("run", "ARCH=efficientnet_lite0", *options, clone=clone, environment=environment)
    seconds = time.monotonic() - began
    _make("stop", clone=clone, environment=environment)
    step(f"{seconds:.1f} s to the first answer, {setup:.1f} s of them installing")
    return seconds, setup, clone


def _make(*arguments: str, clone: Path, environment: dict[str, str]) -> None:
    subprocess.run(["make", *arguments], cwd=clone, env=environment, check=True)


def _megabytes(folder: Path) -> float:
    """Return the space that a folder takes; hard links to a cache count in full."""
    size = subprocess.check_output(["du", "-s", "--block-size=1", folder], text=True)
    return int(size.split()[0]) / 1e6
