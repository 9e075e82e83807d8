"""Requests of several clients in one batch do not touch one another."""

import io
import json
import re
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
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from benchmarks.faults import wait_for
from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve.management import model_status, poll
from scripts.serve.running import Running
from tests.pictures import encode

TIMEOUT = 60


def post(url: str, content: bytes) -> requests.Response:
    return requests.post(
        url, data=content, headers={"Content-Type": "application/octet-stream"}, timeout=TIMEOUT
    )


def queued(running: Running) -> int:
    waiting: int = model_status(running)["jobQueueStatus"]["pendingRequests"]
    return waiting


def in_one_batch(
    running: Running, run_dir: Path, worker: psutil.Process, calls: list[Callable[[], Any]]
) -> tuple[list[Any], str]:
    """Runs calls of clients so that they meet in one batch.

    TorchServe sends less than it has where the machine halts it as it takes requests off the queue,
    so this is done again until it was one batch.

    Returns:
        what each call returned, and what the log says of the batch.
    """
    for _ in range(10):
        with ThreadPoolExecutor(len(calls) + 1) as clients:
            # While the worker is halted with one request in hand, the others queue up behind it.
            worker.suspend()
            in_hand = clients.submit(post, running.predictions_url, CAT.read_bytes())
            time.sleep(1)
            waiting = [clients.submit(call) for call in calls]
            poll(lambda: queued(running) == len(calls), 20)
            worker.resume()
            answers = [future.result() for future in waiting]
        before = in_hand.result().headers["x-request-id"]
        batch = batch_after(run_dir / "logs" / "requests.log", before, len(calls))
        if batch.startswith(f"{len(calls)} requests"):
            return answers, batch
    raise AssertionError(f"they never met in one batch; the last one was {batch}")


def batch_after(log: Path, request: str, size: int) -> str:
    """What the log says of the batch after a request, when `size` lines stand after that one's."""
    found: list[dict[str, Any]] = []

    def written() -> bool:
        lines = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
        places = [place for place, line in enumerate(lines) if line["id"] == request]
        found[:] = lines[places[0] + 1 :] if places else []
        return len(found) >= size

    wait_for(written)
    first = found[0]
    return (
        f"{first['batch_requests']} requests, {first['batch_images']} images: decoding "
        f"{first['decode_ms']:.0f} ms, inference {first['inference_ms']:.0f} ms"
    )


def test_bad_requests_in_a_batch_do_not_touch_their_neighbours(
    running: Running,
    run_dir: Path,
    one_worker: psutil.Process,
    worker_pids: Callable[[], set[int]],
) -> None:
    good = [path.read_bytes() for path in PHOTOGRAPHS[:4]]
    # The last is half a character in JSON.
    bad = [b"this is text", CAT.read_bytes()[:20_000], b"", rb'{"image":"AA==","topk":"\ud800"}']
    alone = [post(running.predictions_url, content).json() for content in good]
    assert len({answer["predictions"][0]["label"] for answer in alone}) > 1

    together = [good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3], bad[3]]
    answers, batch = in_one_batch(
        running,
        run_dir,
        one_worker,
        [partial(post, running.predictions_url, content) for content in together],
    )
    assert batch.startswith("8 requests, 7 images")

    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 400, 200, 400, 200, 400, 200, 422]
    assert [a.json() for a in answers if a.status_code == 200] == alone
    refusals = [a.json() for a in answers if a.status_code != 200]
    types = ["NotAnImage", "DamagedImage", "EmptyImage", "InvalidOption"]
    assert [r["type"] for r in refusals] == types
    assert all(r["success"] is False and len(r["message"]) > 20 for r in refusals)
    assert worker_pids() == {one_worker.pid}


def test_predictions_and_explanations_in_one_batch_do_not_touch_one_another(
    running: Running, run_dir: Path, one_worker: psutil.Process
) -> None:
    """Eight requests: each client gets its own kind, of its own picture and class."""
    explanations = running.predictions_url.replace("/predictions/", "/explanations/")
    pictures = [path.read_bytes() for path in PHOTOGRAPHS[:3]]

    def predict(picture: int) -> Any:
        return post(running.predictions_url, pictures[picture]).json()

    def explain(picture: int, class_index: int) -> Any:
        return requests.post(
            explanations,
            files={"file": pictures[picture]},
            data={"class_index": class_index},
            headers={"Accept": "application/json"},
            timeout=TIMEOUT,
        ).json()

    def draw(picture: int) -> Any:
        answer = post(explanations, pictures[picture])
        return answer.headers["content-type"], answer.content

    def refuse() -> Any:
        answer = post(explanations, b"this is text")
        return answer.status_code, answer.json()["type"]

    calls: list[Callable[[], Any]] = [
        partial(predict, 0),
        partial(explain, 0, 7),
        partial(explain, 1, 7),
        partial(draw, 2),
        refuse,
        partial(predict, 1),
        partial(explain, 1, 8),
        partial(predict, 2),
    ]
    alone = [call() for call in calls]
    assert len({repr(answer) for answer in alone}) == 8
    together, batch = in_one_batch(running, run_dir, one_worker, calls)
    assert batch.startswith("8 requests, 8 images")
    # Sums in another order than alone: ONNX Runtime rounds a batch otherwise than single images.
    for of_batch, of_one in zip(together, alone, strict=True):
        assert_nearly_equal(of_batch, of_one)


def test_what_made_whole_batches_fail_is_answered_in_its_place(
    running: Running, run_dir: Path, one_worker: psutil.Process
) -> None:
    """Half a character as JSON, a deep option, and a picture whose colour profile is a text."""
    explanations = running.predictions_url.replace("/predictions/", "/explanations/")
    pictures = [path.read_bytes() for path in PHOTOGRAPHS[:4]]
    profile = ImageFileDirectory_v2()
    profile[34675] = "a text"
    odd = encode(Image.new("RGB", (300, 300)), "TIFF", tiffinfo=profile)
    deep = b'{"image":"AA==","topk":' + b"[" * 900 + b"]" * 900 + b"}"

    def predict(picture: int) -> Any:
        return post(running.predictions_url, pictures[picture]).json()

    def send(body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        answer = requests.post(running.predictions_url, data=body, headers=headers, timeout=TIMEOUT)
        return answer.status_code, answer.json()["type"]

    calls: list[Callable[[], Any]] = [
        partial(predict, 0),
        partial(send, rb'"\ud800"'),
        partial(predict, 1),
        partial(send, deep),
        partial(predict, 2),
        lambda: post(explanations, odd).headers["content-type"],
        partial(predict, 3),
    ]
    alone = [call() for call in calls]
    together, _ = in_one_batch(running, run_dir, one_worker, calls)
    assert together[1] == (400, "BadRequest")
    assert together[3] == (422, "InvalidOption")
    for of_batch, of_one in zip(together, alone, strict=True):
        assert_nearly_equal(of_batch, of_one)


def assert_nearly_equal(first: Any, second: Any) -> None:
    match first:
        case dict():
            assert first.keys() == second.keys()
            for key, value in first.items():
                assert_nearly_equal(value, second[key])
        case list() | tuple():
            for one, other in zip(first, second, strict=True):
                assert_nearly_equal(one, other)
        case float():
            assert first == pytest.approx(second, abs=1e-5)
        case bytes():
            with Image.open(io.BytesIO(first)) as one, Image.open(io.BytesIO(second)) as other:
                difference = np.asarray(one).astype(int) - np.asarray(other)
            assert np.abs(difference).max() <= 1
        case _:
            assert first == second


def test_a_page_in_a_batch_costs_the_model_nothing(
    running: Running, run_dir: Path, one_worker: psutil.Process
) -> None:
    cat = CAT.read_bytes()

    def page() -> Any:
        headers = {"Accept": "text/html,*/*;q=0.8"}
        answer = requests.get(running.predictions_url, headers=headers, timeout=TIMEOUT)
        return answer.status_code, answer.headers["content-type"], answer.content

    def predict() -> Any:
        return post(running.predictions_url, cat).json()

    alone = [page(), predict()] * 4
    assert alone[0][:2] == (200, "text/html; charset=utf-8")
    assert b"<!doctype html>" in alone[0][2]
    together, batch = in_one_batch(running, run_dir, one_worker, [page, predict] * 4)
    assert batch.startswith("8 requests, 4 images")
    assert together[::2] == alone[::2]
    assert_nearly_equal(together[1::2], alone[1::2])

    together, batch = in_one_batch(running, run_dir, one_worker, [page] * 8)
    assert re.match(r"8 requests, 0 images: decoding 0 ms, inference 0 ms", batch)
    assert together == [alone[0]] * 8


def test_several_images_in_one_form_are_answered_by_name(running: Running) -> None:
    answer = requests.post(
        running.predictions_url,
        files={"cat": CAT.read_bytes(), "notes": b"text", "flower": PHOTOGRAPHS[-1].read_bytes()},
        data={"topk": "1"},
        timeout=TIMEOUT,
    )
    body = answer.json()
    assert answer.status_code == 200
    assert [(r["name"], r["success"]) for r in body["results"]] == [
        ("cat", True),
        ("notes", False),
        ("flower", True),
    ]
    assert body["results"][0]["predictions"] == _alone(running, CAT)["predictions"][:1]
    assert body["results"][1]["type"] == "NotAnImage"


def _alone(running: Running, path: Path) -> dict[str, list[object]]:
    body: dict[str, list[object]] = post(running.predictions_url, path.read_bytes()).json()
    return body
