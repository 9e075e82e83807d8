"""Measures leaks: memory, descriptors, threads and files after thousands of mixed requests.

The model is small, so that requests take most of the time.
"""

import base64
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import requests
import typer

from benchmarks.archives import workspace
from benchmarks.images import encode, form, noise, photograph
from benchmarks.load import Body
from benchmarks.report import table, write_section
from benchmarks.servers import Server, ours
from scripts.terminal import step

_CLIENTS = 8
_PARTS = 5
_WARM_UP = 1000


def main(
    requests_sent: Annotated[int, typer.Option("--requests", min=_PARTS)] = 20_000,
) -> None:
    """Write benchmarks/results/endurance.md."""
    bodies = list(_bodies())
    statuses: Counter[int] = Counter()
    with (
        workspace(arch="efficientnet_lite0", weights=None) as (work, archive),
        ours(archive, work) as server,
    ):
        _send(server, bodies, _WARM_UP)
        rows = [(0, *_held(server, work))]
        for part in range(1, _PARTS + 1):
            statuses += _send(server, bodies, requests_sent // _PARTS)
            rows.append((part * (requests_sent // _PARTS), *_held(server, work)))
            step(f"After {rows[-1][0]} requests: {rows[-1][1:]}")
    answered = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    headings = (
        *("requests", "frontend MB (RSS)", "workers MB (RSS)"),
        *("descriptors", "threads", "temporary files"),
    )
    text = (
        f"After {_WARM_UP:,} requests of warm-up; {len(bodies)} kinds of bodies in turn (JPEG, "
        "PNG, WebP, AVIF, TIFF, GIF, BMP, forms, JSON; a third of them damaged or no image) from "
        f"{_CLIENTS} clients. Responses: {answered}. Repeat: `make bench-endurance`."
    )
    write_section("endurance", "Endurance", "Requests of mixed kinds", text, table(headings, rows))


def _bodies() -> Iterator[Body]:
    """Yield images of all formats and sizes, and damaged copies."""
    random = np.random.default_rng(0)
    for side in (40, 300, 900):
        image = photograph(side, side)
        for file_format in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"):
            data = encode(image, file_format)
            yield Body(data)
            yield Body(base64.b64encode(data), "text/plain")
            broken = bytearray(data)
            for place in random.integers(0, len(data), 12):
                broken[place] = random.integers(0, 256)
            yield Body(bytes(broken))
            yield Body(data[: len(data) // 2])
    one = encode(photograph(500, 400))
    yield form(3)
    yield Body(b'{"image": "' + base64.b64encode(one) + b'", "topk": 3}', "application/json")
    yield Body(b'{"image": 5}', "application/json")
    yield Body(b"%PDF-1.7 not an image")
    yield Body(encode(noise(1500), "PNG"))


def _send(server: Server, bodies: list[Body], count: int) -> Counter[int]:
    """Send requests, each client on its own connection; return the statuses."""

    def client(number: int) -> Counter[int]:
        found: Counter[int] = Counter()
        with requests.Session() as session:
            session.trust_env = False
            for body in islice(cycle(bodies), number, count + number, _CLIENTS):
                headers = {"Content-Type": body.content_type}
                response = session.post(server.url, data=body.data, headers=headers, timeout=120)
                found[response.status_code] += 1
        return found

    with ThreadPoolExecutor(_CLIENTS) as pool:
        return sum(pool.map(client, range(_CLIENTS)), Counter())


def _held(server: Server, work: Path) -> tuple[float, float, int, int, int]:
    """Return what the page's table has: memory, open files, threads, temporary files."""
    processes = server.processes()
    java, *workers = (process.memory_info().rss / 1e6 for process in processes)
    return (
        java,
        sum(workers),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
        sum(1 for path in work.glob("run-*/**/*") if path.is_file()),
    )
