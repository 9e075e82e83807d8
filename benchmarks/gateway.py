"""Measures the latency that the gateway adds, and the effect of slow connections on clients."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import requests

from benchmarks.images import encode, photograph
from benchmarks.load import Body, closed_loop, require_wrk
from benchmarks.report import table, write_section
from benchmarks.servers import behind_gateway
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.serve.running import HOST

_REQUESTS = 300
_CLIENTS = 16
_ROUNDS = 6
_SECONDS = 8
_SLOW_CONNECTIONS = 200
# Not the measured client's: connections are limited per address.
_SLOW_ADDRESS = "127.0.0.2"


def main() -> None:
    """Write benchmarks/results/gateway.md."""
    require_wrk()
    image = encode(photograph(720, 720), quality=90)
    with TemporaryDirectory() as folder:
        spec = from_options(arch="densenet121", weights="random")
        archive = build(spec, Path(folder, "store"))
        with behind_gateway(archive, Path(folder, "run"), 2) as (running, options):
            direct, through = running.predictions_url, f"{options.url}/predict"
            for url in (direct, through):
                closed_loop(url, Body(image), _CLIENTS, _SECONDS)
            rates = []
            for number in range(_ROUNDS):
                order = (direct, through) if number % 2 == 0 else (through, direct)
                rate = {
                    url: closed_loop(url, Body(image), _CLIENTS, _SECONDS).rate for url in order
                }
                rates.append((rate[direct], rate[through]))
            sessions = requests.Session(), requests.Session()
            pairs = [
                (_ms(sessions[0], direct, image), _ms(sessions[1], through, image))
                for _ in range(_REQUESTS)
            ]
            with _slow_connections(options.http_port):
                time.sleep(2)
                slow = [_ms(sessions[1], through, image) for _ in range(_REQUESTS)]
    one = [
        ("directly", median(before for before, _ in pairs)),
        ("through the gateway", median(after for _, after in pairs)),
        ("the difference", median(after - before for before, after in pairs)),
        (f"through the gateway with {_SLOW_CONNECTIONS} slow connections", median(slow)),
    ]
    title = "What the gateway adds"
    text = f"One client, {_REQUESTS} requests of each kind, in turn. Repeat: `make bench-gateway`."
    write_section("gateway", title, "One client", text, table(["request", "median ms"], one))
    many = [
        ("directly", median(before for before, _ in rates)),
        ("through the gateway", median(after for _, after in rates)),
        ("the ratio", f"{median(after / before for before, after in rates):.3f}"),
    ]
    text = f"{_CLIENTS} clients, {_ROUNDS} rounds of {_SECONDS} s of each kind, in turn."
    rows = table(["requests", "images/s"], many)
    write_section("gateway", title, f"{_CLIENTS} clients", text, rows)


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
                with suppress(OSError):  # nginx closes some
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
