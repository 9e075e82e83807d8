"""Requests of several clients in one batch do not touch one another."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

from scripts.photographs import CAT
from scripts.server import Running, model_status
from tests.pictures import PHOTOGRAPHS

TIMEOUT = 60


def post(url: str, content: bytes) -> requests.Response:
    return requests.post(
        url, data=content, headers={"Content-Type": "application/octet-stream"}, timeout=TIMEOUT
    )


def queued(running: Running) -> int:
    waiting: int = model_status(running)["jobQueueStatus"]["pendingRequests"]
    return waiting


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def batches_in(log: Path) -> list[str]:
    lines = log.read_text().splitlines()
    return [line.split("Batch of ")[1] for line in lines if "Batch of " in line]


def test_bad_requests_in_a_batch_do_not_touch_their_neighbours(
    running: Running,
    run_dir: Path,
    one_worker: psutil.Process,
    worker_pids: Callable[[], set[int]],
) -> None:
    good = [path.read_bytes() for path in PHOTOGRAPHS[:5]]
    bad = [b"this is text", CAT.read_bytes()[:20_000], b""]
    alone = [post(running.predictions_url, content).json() for content in good]
    assert len({answer["predictions"][0]["label"] for answer in alone}) > 1

    together = [good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3], good[4]]
    before = len(batches_in(run_dir / "logs" / "model.log"))
    with ThreadPoolExecutor(9) as clients:
        # While the worker is halted with one request in hand, the others queue up behind it.
        one_worker.suspend()
        clients.submit(post, running.predictions_url, good[0])
        time.sleep(1)
        waiting = [clients.submit(post, running.predictions_url, content) for content in together]
        wait_for(lambda: queued(running) == len(together))
        one_worker.resume()
        answers = [future.result() for future in waiting]
    batches = batches_in(run_dir / "logs" / "model.log")[before:]
    assert [batch.split(":")[0] for batch in batches] == [
        "1 requests, 1 images",
        "8 requests, 7 images",
    ]

    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 400, 200, 400, 200, 400, 200, 200]
    assert [a.json() for a in answers if a.status_code == 200] == alone
    refusals = [a.json() for a in answers if a.status_code == 400]
    assert [r["type"] for r in refusals] == ["NotAnImage", "DamagedImage", "MissingImage"]
    assert all(r["success"] is False and len(r["message"]) > 20 for r in refusals)
    assert worker_pids() == {one_worker.pid}


def test_predictions_and_explanations_in_one_batch_do_not_touch_one_another(
    running: Running, run_dir: Path, one_worker: psutil.Process
) -> None:
    predictions, cat = running.predictions_url, CAT.read_bytes()
    explanations = predictions.replace("/predictions/", "/explanations/")
    expected = post(predictions, cat).json()
    before = len(batches_in(run_dir / "logs" / "model.log"))
    with ThreadPoolExecutor(9) as clients:
        one_worker.suspend()
        clients.submit(post, predictions, cat)
        time.sleep(1)
        waiting = [clients.submit(post, url, cat) for url in (explanations, predictions) * 4]
        wait_for(lambda: queued(running) == len(waiting))
        one_worker.resume()
        answers = [future.result() for future in waiting]
    batches = batches_in(run_dir / "logs" / "model.log")[before:]
    assert batches[-1].startswith("8 requests, 4 images")
    assert [answer.status_code for answer in answers] == [400, 200] * 4
    assert all(answer.json() == expected for answer in answers[1::2])


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
