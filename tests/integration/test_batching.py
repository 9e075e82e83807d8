"""Requests of several clients in one batch of a real server."""

import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.management import model_status, wait_until
from scripts.serve.running import ServerState
from tests.gateway.cluster import wait_for
from tests.served import worker_pids

JSON = {"Accept": "application/json", "Content-Type": "application/json"}
IMAGES = [path.read_bytes() for path in PHOTOGRAPHS[:3]]


def post(url: str, content: bytes | None = None, **more: Any) -> tuple[int, str, Any]:
    answer = requests.post(url, data=content, timeout=60, **more)
    kind = answer.headers["content-type"]
    return answer.status_code, kind, answer.json() if "json" in kind else answer.content


def in_one_batch(
    running: ServerState, log: Path, worker: psutil.Process, calls: list[Callable[[], Any]]
) -> list[Any]:
    """Run concurrent calls that end up in one batch; return their results.

    TorchServe may start a batch before the queue is complete, so this retries until all calls were
    in one batch.
    """
    for _ in range(10):
        with ThreadPoolExecutor(len(calls) + 1) as clients:
            # While the worker is suspended with one request in flight, the others queue up.
            worker.suspend()
            first = clients.submit(requests.put, running.predictions_url, CAT.read_bytes())
            time.sleep(1)
            waiting = [clients.submit(call) for call in calls]
            wait_until(
                lambda: model_status(running)["jobQueueStatus"]["pendingRequests"] == len(calls),
                20,
            )
            worker.resume()
            answers = [future.result() for future in waiting]
        size = size_of_next_batch(log, first.result().headers["x-request-id"], len(calls))
        if size == len(calls):
            return answers
    raise AssertionError(f"never all in one batch; the last batch had {size}")


def size_of_next_batch(log: Path, request: str, requests_after: int) -> int:
    """Return the size of the batch after a request, once the log has all requests of it."""
    sizes: list[int] = []

    def logged() -> bool:
        lines = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
        ids = [line["id"] for line in lines]
        sizes[:] = [line["batch_requests"] for line in lines[ids.index(request) + 1 :]]
        return len(sizes) >= requests_after

    wait_for(logged)
    return sizes[0]


def test_requests_of_all_kinds_in_one_batch_get_the_same_responses_as_alone(
    running: ServerState,
    run_dir: Path,
    one_worker: psutil.Process,
) -> None:
    predict = running.predictions_url
    explain = predict.replace("/predictions/", "/explanations/")
    deep = b'{"image":"AA==","topk":' + b"[" * 900 + b"]" * 900 + b"}"
    calls: list[Callable[[], Any]] = [
        partial(post, predict, IMAGES[0]),
        partial(post, predict, rb'"\ud800"', headers=JSON),
        partial(post, explain, headers={"Accept": JSON["Accept"]}, files={"file": IMAGES[0]}),
        partial(post, explain, IMAGES[2]),
        partial(post, predict, CAT.read_bytes()[:20_000]),
        partial(post, predict, deep, headers=JSON),
        partial(post, predict, headers={"Accept": "text/html"}),
        partial(post, predict, IMAGES[1]),
    ]
    alone = [call() for call in calls]
    assert [(status, kind.partition(";")[0]) for status, kind, _ in alone] == [
        (200, "application/json"),
        (400, "application/json"),
        (200, "application/json"),
        (200, "image/png"),
        (400, "application/json"),
        (422, "application/json"),
        (200, "text/html"),
        (200, "application/json"),
    ]
    log = run_dir / "logs" / "requests.log"
    assert_nearly_equal(in_one_batch(running, log, one_worker, calls), alone)
    assert worker_pids(running) == {one_worker.pid}


def assert_nearly_equal(first: Any, second: Any) -> None:
    """Compare with a tolerance: ONNX Runtime rounds batches and single images differently."""
    match first:
        case dict():
            assert first.keys() == second.keys()
            assert_nearly_equal(list(first.values()), [second[key] for key in first])
        case list() | tuple():
            for one, other in zip(first, second, strict=True):
                assert_nearly_equal(one, other)
        case float():
            assert first == pytest.approx(second, abs=1e-5)
        case bytes() if first.startswith(b"\x89PNG"):
            with Image.open(io.BytesIO(first)) as one, Image.open(io.BytesIO(second)) as other:
                difference = np.asarray(one).astype(int) - np.asarray(other)
            assert np.abs(difference).max() <= 1
        case _:
            assert first == second
