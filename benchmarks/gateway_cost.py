"""`make gateway-cost`: what the gateway costs, what two nodes give, and what slow clients do.

Prints medians; nothing here passes or fails by time.
"""

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import requests

from benchmarks.cluster import clients, free_options
from benchmarks.machine import write_report
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, Node
from scripts.gateway.nodes import start_nodes, stop_nodes
from scripts.samples import CAT
from scripts.serve.running import HOST, Running, find_running
from scripts.terminal import command, console

_REQUESTS = 150
_LOAD_SECONDS = 15.0
_SLOW_CONNECTIONS = 200
# Another client than the one that is measured: connections are limited by address.
_SLOW_ADDRESS = "127.0.0.2"


@contextmanager
def _before(nodes: list[Node], folder: Path) -> Iterator[Gateway]:
    options = free_options(rate=1000, burst=1000)
    gateway = starting.start(options, nodes, folder, watch=False)
    try:
        yield gateway
    finally:
        starting.stop(gateway, folder)


def _running(node: Node) -> Running:
    running = find_running(Path(node.run_dir))
    assert running is not None
    return running


def _seconds(session: requests.Session, url: str, headers: dict[str, str]) -> float:
    started = time.monotonic()
    answer = session.post(url, data=CAT.read_bytes(), headers=headers, timeout=60)
    answer.raise_for_status()
    return time.monotonic() - started


def _added(gateway: Gateway) -> None:
    """The same client, the same node, in turn with and without the gateway."""
    running = _running(gateway.nodes[0])
    direct, through = requests.Session(), requests.Session()
    headers = running.authorization("inference")
    pairs = [
        (
            _seconds(direct, running.predictions_url, headers),
            _seconds(through, f"{gateway.url}/predict", {}),
        )
        for _ in range(_REQUESTS)
    ]
    without, with_it = np.median(pairs, axis=0) * 1000
    added = np.median(np.diff(pairs, axis=1)) * 1000
    _say(
        f"one client, median of {_REQUESTS}: {without:.1f} ms direct, {with_it:.1f} ms through the "
        f"gateway; median of the differences {added:+.2f} ms"
    )


def _throughput(gateway: Gateway) -> float:
    with clients(gateway, 16) as tally:
        time.sleep(3)  # warm
        before = tally.outcomes["200"]
        time.sleep(_LOAD_SECONDS)
        served = tally.outcomes["200"] - before
    return served / _LOAD_SECONDS


@contextmanager
def _slow_connections(gateway: Gateway) -> Iterator[None]:
    """Half send headers a byte at a time, half a body."""
    connections = [
        socket.create_connection(
            (HOST, gateway.options.http_port), source_address=(_SLOW_ADDRESS, 0)
        )
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


def _poisson(running: Running, rate: float) -> None:
    """Requests that come at random, as from many clients who do not wait for one another."""
    chance = np.random.default_rng(1)
    headers = running.authorization("inference")

    def send(wait_until: float) -> float:
        time.sleep(max(0.0, wait_until - time.monotonic()))
        return _seconds(requests.Session(), running.predictions_url, headers)

    arrivals = time.monotonic() + 0.5 + np.cumsum(chance.exponential(1 / rate, int(rate * 20)))
    with ThreadPoolExecutor(64) as pool:
        latencies = list(pool.map(send, arrivals))
    median, late = np.quantile(latencies, (0.5, 0.95)) * 1000
    _say(
        f"one node, {rate:.1f} images/s at random for 20 s: median {median:.0f} ms, 95 % under "
        f"{late:.0f} ms"
    )


def _slowloris(gateway: Gateway) -> None:
    session = requests.Session()
    url = f"{gateway.url}/predict"
    quiet = np.median([_seconds(session, url, {}) for _ in range(_REQUESTS)]) * 1000
    with _slow_connections(gateway):
        time.sleep(2)
        slow = np.median([_seconds(session, url, {}) for _ in range(_REQUESTS)]) * 1000
    _say(
        f"one client, median of {_REQUESTS}: {quiet:.1f} ms alone, {slow:.1f} ms beside "
        f"{_SLOW_CONNECTIONS} slow connections ({slow / quiet - 1:+.0%})"
    )


_lines: list[str] = []


def _say(text: str) -> None:
    console.print(text)
    _lines.append(f"- {text}")


def main() -> None:
    """Measures with two nodes of one worker each, pinned to a CPU each where there are two."""
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        archive = build(recipe(untrained()), place / "store")
        cpus = sorted(os.sched_getaffinity(0))
        nodes: list[Node] = []
        try:
            for cpu in (cpus[0], cpus[-1]):
                # Children inherit it: each node has a CPU of its own.
                os.sched_setaffinity(0, {cpu})
                nodes += start_nodes(1, archive, workers=1, run_dir=place / "run")
            os.sched_setaffinity(0, cpus)
            alone = []
            for node in nodes:
                with _before([node], place / "one") as gateway:
                    alone.append(_throughput(gateway))
            with _before(nodes, place / "both") as gateway:
                both = _throughput(gateway)
            _say(
                f"16 clients: {alone[0]:.1f} and {alone[1]:.1f} images/s alone, {both:.1f} "
                f"together, {both / sum(alone):.2f} of the sum"
            )
            with _before(nodes[:1], place / "cost") as gateway:
                _added(gateway)
                _slowloris(gateway)
            for share in (0.5, 0.8):
                _poisson(_running(nodes[0]), share * alone[0])
        finally:
            os.sched_setaffinity(0, cpus)
            stop_nodes(nodes)
    write_report("gateway", "What the gateway costs", ["Made by `make gateway-cost`.", "", *_lines])


if __name__ == "__main__":
    command(main)
