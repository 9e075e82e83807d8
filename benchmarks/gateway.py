"""Measures what the gateway adds to a request, and what slow connections do to other clients."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import requests

from benchmarks.load import Body, closed_loop, require_wrk
from benchmarks.pictures import encode, photograph
from benchmarks.report import table, write_section
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.gateway import nginx
from scripts.gateway.options import Options
from scripts.serve.running import HOST, free_ports, unused_ports
from scripts.serve.server import start, stop

_REQUESTS = 300
_CLIENTS = 16
_ROUNDS = 6
_SECONDS = 8
_SLOW_CONNECTIONS = 200
# Another address than the measured client's: connections are limited per address.
_SLOW_ADDRESS = "127.0.0.2"


def main() -> None:
    """Write benchmarks/results/gateway.md."""
    require_wrk()
    image = encode(photograph(720, 720), quality=90)
    with TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        http, https = unused_ports(2)
        options = Options(
            http_port=http, https_port=https, rate=10_000, burst=10_000, connections=10_000
        )
        running = start(
            build(from_options(arch="densenet121", weights="random"), Path(name) / "store"),
            free_ports(),
            2,
            run_dir,
        )
        folder = run_dir / "gateway"
        try:
            nginx.start(replace(options, model=running.model), folder)
            direct, through = running.predictions_url, f"{options.url}/predict"
            for url in (direct, through):
                closed_loop(url, Body(image), _CLIENTS, _SECONDS)
            rates = [
                tuple(closed_loop(url, Body(image), _CLIENTS, _SECONDS).rate for url in order)[
                    :: 1 if number % 2 == 0 else -1
                ]
                for number in range(_ROUNDS)
                for order in [(direct, through) if number % 2 == 0 else (through, direct)]
            ]
            sessions = requests.Session(), requests.Session()
            pairs = [
                (_ms(sessions[0], direct, image), _ms(sessions[1], through, image))
                for _ in range(_REQUESTS)
            ]
            with _slow_connections(http):
                time.sleep(2)
                slow = [_ms(sessions[1], through, image) for _ in range(_REQUESTS)]
        finally:
            nginx.stop(folder)
            stop(running, run_dir)
    one = [
        ("directly", median(before for before, _ in pairs)),
        ("through the gateway", median(after for _, after in pairs)),
        ("the difference", median(after - before for before, after in pairs)),
        (f"through the gateway with {_SLOW_CONNECTIONS} slow connections", median(slow)),
    ]
    lines = [
        f"One client, {_REQUESTS} requests of each kind, in turn. Repeat: `make bench-gateway`.",
        "",
        *table(["request", "median ms"], one),
    ]
    write_section("gateway", "What the gateway adds", "One client", lines)
    many = [
        ("directly", median(before for before, _ in rates)),
        ("through the gateway", median(after for _, after in rates)),
        ("the ratio", f"{median(after / before for before, after in rates):.3f}"),
    ]
    lines = [
        f"{_CLIENTS} clients, {_ROUNDS} rounds of {_SECONDS} s of each kind, in turn.",
        "",
        *table(["requests", "images/s"], many),
    ]
    write_section("gateway", "What the gateway adds", f"{_CLIENTS} clients", lines)


def _ms(session: requests.Session, url: str, image: bytes) -> float:
    started = time.monotonic()
    session.post(url, data=image, timeout=60).raise_for_status()
    return 1000 * (time.monotonic() - started)


@contextmanager
def _slow_connections(port: int) -> Iterator[None]:
    """Keep connections open, half sending headers a byte at a time, half a body."""
    address = (HOST, port)
    connections = [
        socket.create_connection(address, source_address=(_SLOW_ADDRESS, 0))
        for _ in range(_SLOW_CONNECTIONS)
    ]
    for number, connection in enumerate(connections):
        connection.send(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        if number % 2:
            connection.send(b"Content-Length: 1000000\r\n\r\n")
    running = True

    def drip() -> None:
        while running:
            for connection in connections:
                with suppress(OSError):  # nginx has closed some by now
                    connection.send(b"x")
            time.sleep(1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(drip)
        try:
            yield
        finally:
            running = False
    for connection in connections:
        connection.close()
