"""Measures the latency that the gateway adds, and the effect of slow connections on clients."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from statistics import median

import requests

from benchmarks.archives import workspace
from benchmarks.load import Body, closed_loop
from benchmarks.report import table, write_section
from benchmarks.servers import behind_gateway
from benchmarks.timing import alternate
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
    with workspace() as (work, archive):
        image = (work / "small.jpg").read_bytes()
        with behind_gateway(archive, work / "run", 2) as (running, options):
            direct, through = running.predictions_url, f"{options.url}/predict"
            for url in (direct, through):
                closed_loop(url, Body(image), _CLIENTS, _SECONDS)
            rates = [
                {url: closed_loop(url, Body(image), _CLIENTS, _SECONDS).rate for url in order}
                for order in alternate([(direct, through), (through, direct)], _ROUNDS // 2)
            ]
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
        ("directly", median(rate[direct] for rate in rates)),
        ("through the gateway", median(rate[through] for rate in rates)),
        ("the ratio", f"{median(rate[through] / rate[direct] for rate in rates):.3f}"),
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
