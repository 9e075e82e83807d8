"""Asks a running server how it is, and scales it, over TorchServe's management API."""

import base64
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests
from rich.status import Status

from classification_client import Client, RequestOptions, ServiceError
from classification_client.retrying import tries
from handler.settings import MODEL_CARD, ModelCard
from scripts.serve.machine import WORKER_BYTES, worker_bytes
from scripts.serve.preflight import check_workers
from scripts.serve.running import Running, lives
from scripts.terminal import UserError, console

# A grey picture of one pixel, as PNG.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
)
SCALE_TIMEOUT = 180.0
HTTP_TIMEOUT = 10.0
# TorchServe puts a new worker in the place of one that ended within 2 to 6 s.
REPLACED_WITHIN = 20.0
_POLL = 0.2


def poll(check: Callable[[], bool], timeout: float) -> bool:
    """Whether it becomes so within so many seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def model_status(running: Running, timeout: float = HTTP_TIMEOUT) -> dict[str, Any]:
    """What the management API says of the model's default version.

    Raises:
        requests.RequestException: it does not answer.
    """
    response = requests.get(running.model_url, timeout=timeout)
    response.raise_for_status()
    versions: list[dict[str, Any]] = response.json()
    return versions[0]


def ready_workers(running: Running, timeout: float = HTTP_TIMEOUT) -> int:
    """How many workers can answer; 0 while the server is not up yet.

    `/ping` is no help here: it says Healthy while every worker is failing to start. Nor is the
    management API alone, which goes on to call a worker READY that a gRPC stream has ended.
    """
    try:
        workers = model_status(running, timeout)["workers"]
    except (requests.RequestException, ValueError):
        return 0  # not up yet
    return sum(worker["status"] == "READY" and lives(worker["pid"], running) for worker in workers)


def scale(running: Running, workers: int) -> None:
    """Asks for a number of workers, waits until exactly so many are ready, and asks them.

    Raises:
        UserError: TorchServe refuses, the machine is too small, or they are not ready in time.
    """
    # TorchServe unpacks the archives there.
    cards = map(ModelCard.load, Path(running.temporary).glob(f"models/*/{MODEL_CARD}"))
    each = max((worker_bytes(card.precision) for card in cards), default=WORKER_BYTES)
    check_workers(workers, ending=ready_workers(running), each=each)
    try:
        answer = _ask_for_workers(running, workers)
    except requests.RequestException as error:
        raise not_answering(running) from error
    if answer.status_code != HTTPStatus.ACCEPTED:
        raise UserError(f"TorchServe refused to scale: {answer.text.strip()[:300]}")
    with Status(f"Scaling to {workers} workers ...", console=console):
        if not poll(lambda: _settled(running, workers), SCALE_TIMEOUT):
            raise UserError(f"No {workers} workers were ready after {SCALE_TIMEOUT:.0f} s.")
        if not poll(lambda: ready_workers(running) == workers, REPLACED_WITHIN):
            raise UserError(
                f"TorchServe counts {workers} worker(s), of which {ready_workers(running)} "
                f"live, and it puts none in the others' place. {AFRESH}"
            )
        try:
            with client_of(running, patience=SCALE_TIMEOUT) as client:
                client.classify(PIXEL)
        except ServiceError as error:
            raise UserError(f"{workers} worker(s) are alive, but none answers. {AFRESH}") from error


def _ask_for_workers(running: Running, workers: int) -> requests.Response:
    for attempt in tries(requests.RequestException, patience=HTTP_TIMEOUT):
        with attempt:
            answer = requests.put(
                running.model_url,
                params={"min_worker": workers, "max_worker": workers},
                timeout=HTTP_TIMEOUT,
            )
            # Under load TorchServe now and then answers 500 ConcurrentModificationException.
            if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
                answer.raise_for_status()
            return answer
    raise AssertionError  # the last try returns or raises


AFRESH = "Start it afresh: make stop, then make run or make start."


def _settled(running: Running, workers: int) -> bool:
    """Whether TorchServe counts so many workers as ready, and no other."""
    try:
        states = [worker["status"] for worker in model_status(running)["workers"]]
    except requests.RequestException:
        return False  # busy; it is asked again
    return states == ["READY"] * workers


def client_of(running: Running, patience: float) -> Client:
    """A client of this server; `patience` in seconds."""
    return Client(running.predictions_url, RequestOptions(patience=patience))


def not_answering(running: Running) -> UserError:
    """The error for a server that runs and says nothing."""
    return UserError(f"TorchServe runs (pid {running.pid}), but does not answer.")
