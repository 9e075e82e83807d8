"""Probe and scale a running server with TorchServe's management API."""

import base64
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests
import requests_unixsocket
from rich.status import Status

from classification_client import Client, RequestOptions, ServiceError
from classification_client.retrying import tries
from scripts.serve.preflight import check_workers, max_worker_bytes
from scripts.serve.running import RESTART_HINT, ServerState, is_worker_alive
from scripts.terminal import UserError, console

# A gray image of one pixel, as PNG.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
)
SCALE_TIMEOUT = 180.0
HTTP_TIMEOUT = 10.0
# TorchServe takes 2 to 6 s to replace a worker that exited.
WORKER_REPLACEMENT_SECONDS = 20.0
_POLL_SECONDS = 0.2


def wait_until(check: Callable[[], bool], timeout: float) -> bool:
    """Poll `check` until it returns true; return false after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def management_session() -> requests.Session:
    """Return a session for the management API, which supports Unix sockets and uses no proxy."""
    session: requests.Session = requests_unixsocket.Session()  # type: ignore[no-untyped-call]
    session.trust_env = False
    return session


def model_status(running: ServerState, timeout: float = HTTP_TIMEOUT) -> dict[str, Any]:
    """Return the management API's description of the model's default version.

    Raises:
        requests.RequestException: the management API does not respond.
    """
    with management_session() as session:
        response = session.get(running.model_url, timeout=timeout)
    response.raise_for_status()
    versions: list[dict[str, Any]] = response.json()
    return versions[0]


def ready_workers(running: ServerState, timeout: float = HTTP_TIMEOUT) -> int:
    """Return the number of workers that can respond; 0 while the server is starting.

    `/ping` reports Healthy even if every worker fails to start. The management API still reports a
    worker as READY after a gRPC stream has stopped it, so the worker's process is checked too.
    """
    try:
        workers = model_status(running, timeout)["workers"]
    except (requests.RequestException, ValueError):
        return 0  # not up yet
    return sum(
        worker["status"] == "READY" and is_worker_alive(worker["pid"], running)
        for worker in workers
    )


def ready_per_model(running: ServerState) -> list[int]:
    """Return the number of workers of each model that can respond."""
    return [ready_workers(running.serving(model)) for model in running.models]


def scale(running: ServerState, workers: int) -> None:
    """Set the number of workers, wait until exactly that many are ready, and send a test image.

    Raises:
        UserError: TorchServe rejects the number, the machine is too small, or the workers are not
            ready in time.
    """
    if lost := running.lost_files():
        raise UserError(lost)
    # TorchServe unpacks model archives in this folder.
    each = max_worker_bytes(Path(running.temporary).glob("models/*"))
    check_workers(workers, stopping=ready_workers(running), bytes_per_worker=each)
    try:
        response = _put_workers(running, workers)
    except requests.RequestException as error:
        raise unresponsive_error(running) from error
    if response.status_code != HTTPStatus.ACCEPTED:
        raise UserError(f"TorchServe did not scale: {response.text.strip()[:300]}")
    with Status(f"Scaling to {workers} workers ...", console=console):
        if not wait_until(lambda: _has_exactly(running, workers), SCALE_TIMEOUT):
            raise UserError(f"No {workers} workers were ready after {SCALE_TIMEOUT:.0f} s.")
        if not wait_until(lambda: ready_workers(running) == workers, WORKER_REPLACEMENT_SECONDS):
            raise UserError(
                f"TorchServe reports {workers} worker(s) as ready, {ready_workers(running)} of "
                f"them are running, and it does not replace the others. {RESTART_HINT}"
            )
        try:
            with client_of(running, patience=SCALE_TIMEOUT) as client:
                client.classify(PIXEL)
        except ServiceError as error:
            raise UserError(
                f"{workers} worker(s) are running, but none responds. {RESTART_HINT}"
            ) from error


def _put_workers(running: ServerState, workers: int) -> requests.Response:
    """Send the scaling request, with retries."""
    for attempt in tries(requests.RequestException, patience=HTTP_TIMEOUT):
        with attempt, management_session() as session:
            response = session.put(
                running.model_url,
                params={"min_worker": workers, "max_worker": workers},
                timeout=HTTP_TIMEOUT,
            )
            # Transient under load: TorchServe returns 500 ConcurrentModificationException.
            if response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
                response.raise_for_status()
            return response
    raise AssertionError  # the last try returns or raises


def _has_exactly(running: ServerState, workers: int) -> bool:
    """Return whether TorchServe reports exactly this many workers, all of them ready."""
    try:
        states = [worker["status"] for worker in model_status(running)["workers"]]
    except requests.RequestException:
        return False  # busy; the caller polls again
    return states == ["READY"] * workers


def client_of(running: ServerState, patience: float) -> Client:
    """Return a client of this server that retries for `patience` seconds."""
    return Client(running.predictions_url, RequestOptions(patience=patience))


def unresponsive_error(running: ServerState) -> UserError:
    """Return the error for a server that is running and does not respond."""
    return UserError(f"TorchServe is running (pid {running.pid}), but does not respond.")
