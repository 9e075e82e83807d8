"""Measures what the gateway adds to a request, and what slow connections do to other clients."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import requests

from benchmarks.report import table, write_section
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, Options
from scripts.gateway.nodes import start_nodes, stop_nodes
from scripts.samples import CAT
from scripts.serve.running import HOST, find_running, unused_ports

_REQUESTS = 150
_SLOW_CONNECTIONS = 200
# Another address than the measured client's: connections are limited per address.
_SLOW_ADDRESS = "127.0.0.2"


def main() -> None:
    """Write benchmarks/results/gateway.md."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        http, https, metrics = unused_ports(3)
        options = Options(
            http_port=http, https_port=https, metrics_port=metrics, rate=1000, burst=1000
        )
        nodes = start_nodes(1, build(recipe(untrained()), folder / "store"), run_dir=folder / "run")
        try:
            running = find_running(Path(nodes[0].run_dir))
            assert running is not None
            gateway = starting.start(options, nodes, folder / "gateway", watch=False)
            direct, through = requests.Session(), requests.Session()
            headers, url = running.authorization("inference"), f"{gateway.url}/predict"
            pairs = [
                (_ms(direct, running.predictions_url, headers), _ms(through, url))
                for _ in range(_REQUESTS)
            ]
            with _slow_connections(gateway):
                time.sleep(2)
                slow = [_ms(through, url) for _ in range(_REQUESTS)]
        finally:
            starting.stop(gateway, folder / "gateway")
            stop_nodes(nodes)
    rows = [
        ("directly", median(before for before, _ in pairs)),
        ("through the gateway", median(after for _, after in pairs)),
        ("the difference", median(after - before for before, after in pairs)),
        (f"through the gateway with {_SLOW_CONNECTIONS} slow connections", median(slow)),
    ]
    lines = [
        f"One client, {_REQUESTS} requests of each kind, in turn. Repeat: `make bench-gateway`.",
        "",
        *table(["request", "median ms"], rows),
    ]
    write_section("gateway", "What the gateway adds", "One client", lines)


def _ms(session: requests.Session, url: str, headers: dict[str, str] | None = None) -> float:
    started = time.monotonic()
    answer = session.post(url, data=CAT.read_bytes(), headers=headers, timeout=60)
    answer.raise_for_status()
    return 1000 * (time.monotonic() - started)


@contextmanager
def _slow_connections(gateway: Gateway) -> Iterator[None]:
    """Keep connections open, half sending headers a byte at a time, half a body."""
    address = (HOST, gateway.options.http_port)
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
