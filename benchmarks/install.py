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
from scripts.serve.running import HOST, free_ports
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
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        work, proxy = Path(folder), Proxy()
        for number in range(rounds + 1):
            proxy.rate, proxy.received = None if number else megabits * 1e6 / 8, 0
            cache = "full" if number else f"empty, {megabits:.0f} Mbit/s"
            rows.append([cache, *_first_answer(work, proxy)])
            step(f"{rows[-1]}")
    write_section(
        *("install", "Installing", "`make run`"),
        "`make run ARCH=efficientnet_lite0` in a fresh clone, from the command to the first "
        "answer, with the caches of uv and pip empty or full. Installing is `make setup-lite0`. "
        "Repeat: `make bench-install`.",
        table(["cache", "seconds", "installing", "the rest", "received MB", ".venv MB"], rows),
    )


def _first_answer(work: Path, proxy: Proxy) -> tuple[float, ...]:
    """Return seconds in total, of installing and of the rest; MB received and of .venv."""
    clone = work / f"clone-{time.monotonic_ns()}"
    subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
    environment = os.environ | {
        "https_proxy": proxy.url,
        "UV_CACHE_DIR": str(work / "uv"),
        "PIP_CACHE_DIR": str(work / "pip"),
    }

    def make(*arguments: str) -> float:
        began = time.monotonic()
        subprocess.run(["make", *arguments], cwd=clone, env=environment, check=True)
        return time.monotonic() - began

    ports = free_ports()
    setup = make("setup-lite0")
    options = (f"PORT={ports.inference}", f"METRICS_PORT={ports.metrics}")
    rest = make("run", "ARCH=efficientnet_lite0", *options)
    make("stop")
    # Hard links to a cache count in full.
    size = subprocess.check_output(["du", "-s", "--block-size=1", clone / ".venv"], text=True)
    return setup + rest, setup, rest, proxy.received / 1e6, int(size.split()[0]) / 1e6
