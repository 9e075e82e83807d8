"""The costliest pictures at once, beside ordinary requests, on the real server."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event, Thread

import psutil
import requests

from handler.settings import ADDED_BYTES
from scripts.serve.running import Running
from tests import costs
from tests.corpus import photograph
from tests.pictures import encode

TIMEOUT = 120
# Of every kind that is at a bound: time, or memory.
WORST = (
    "JPEG: padding in a progressive scan",
    "BMP: 8 megapixels of runs of 1",
    "TIFF: strips of one row",
    "PNG: 49 megapixels of RGB",
    "WebP: 12 megapixels",
    "JPEG: 100 scans of 64 megapixels",
)


def post(running: Running, data: bytes) -> tuple[int, float]:
    """Status and seconds."""
    started = time.monotonic()
    headers = {"Content-Type": "application/octet-stream"}
    answer = requests.post(running.predictions_url, data=data, headers=headers, timeout=TIMEOUT)
    return answer.status_code, time.monotonic() - started


@contextmanager
def peaks(pids: set[int]) -> Iterator[dict[int, int]]:
    """The most memory of each worker together with its decoder process, in bytes, sampled."""
    most = dict.fromkeys(pids, 0)
    done = Event()

    def sample() -> None:
        while not done.wait(0.05):
            for pid in pids:
                with suppress(psutil.NoSuchProcess):
                    worker = psutil.Process(pid)
                    family = (worker, *worker.children(recursive=True))
                    held = sum(process.memory_info().rss for process in family)
                    most[pid] = max(most[pid], held)

    thread = Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def test_eighteen_of_the_costliest_pictures_hold_nobody_up(
    running: Running, worker_pids: Callable[[], set[int]], note: list[str]
) -> None:
    bodies = {name: make() for name, make in costs.kinds() if name in WORST}
    assert len(bodies) == len(WORST)
    ordinary = encode(photograph(), "JPEG")
    before = worker_pids()
    usual = {pid: psutil.Process(pid).memory_info().rss for pid in before}
    with peaks(before) as most, ThreadPoolExecutor(28) as clients:
        attacks = {
            name: [clients.submit(post, running, data) for _ in range(3)]
            for name, data in bodies.items()
        }
        answers = [clients.submit(post, running, ordinary) for _ in range(40)]
        statuses = [status for status, _ in map(Future.result, answers)]
        slowest = max(seconds for _, seconds in map(Future.result, answers))
        refused = {name: {f.result()[0] for f in futures} for name, futures in attacks.items()}
    assert set(statuses) == {200}
    assert worker_pids() == before
    assert all(found <= {200, 413} for found in refused.values()), refused
    added = max(most[pid] - usual[pid] for pid in before)
    note.append(
        f"18 of the costliest pictures at once: 40 ordinary requests beside them answered, the "
        f"slowest in {slowest:.1f} s; a worker and its decoder process took {added / 1e6:.0f} MB "
        f"more at most, of {ADDED_BYTES / 1e6:.0f}"
    )
    assert added < ADDED_BYTES


def test_json_that_would_take_gigabytes_is_refused(
    running: Running, worker_pids: Callable[[], set[int]]
) -> None:
    before = worker_pids()
    body = b'{"image":[' + b"[]," * 6_900_000 + b"1]}"
    for content_type in ("application/json", "text/plain"):
        with peaks(before) as most, ThreadPoolExecutor(8) as clients:
            usual = {pid: psutil.Process(pid).memory_info().rss for pid in before}
            answers = list(
                clients.map(
                    lambda _, kind=content_type: requests.post(
                        running.predictions_url,
                        data=body,
                        headers={"Content-Type": kind},
                        timeout=TIMEOUT,
                    ),
                    range(8),
                )
            )
        assert {answer.status_code for answer in answers} == {400}
        assert "lists, objects and values" in answers[0].json()["message"]
        assert all(most[pid] - usual[pid] < ADDED_BYTES for pid in before)
    assert worker_pids() == before
