"""Late requests, and those of disconnected clients, are not computed."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from scripts.samples import CAT
from scripts.serve.management import model_status
from scripts.serve.running import ServerState
from tests.gateway.cluster import Gateway, gateway, in_front_of, wait_for


@pytest.fixture(scope="module")
def local(running: ServerState, run_dir: Path) -> Iterator[Gateway]:
    """A gateway in the folder in which the workers look for its list of cancelled requests."""
    with gateway(in_front_of(running), run_dir / "gateway") as started:
        yield started


@pytest.fixture
def suspended(running: ServerState) -> Iterator[list[psutil.Process]]:
    workers = [psutil.Process(each["pid"]) for each in model_status(running)["workers"]]
    for worker in workers:
        worker.suspend()
    yield workers
    for worker in workers:
        worker.resume()


def timeouts(running: ServerState) -> float:
    text = requests.get(running.metrics_url, timeout=10).text
    pattern = r'^image_classifier_images_total\{.*error_type="Timeout".* ([0-9.]+)$'
    return sum(map(float, re.findall(pattern, text, re.MULTILINE)))


def test_a_request_beyond_its_time_limit_is_rejected(
    local: Gateway, running: ServerState, suspended: list[psutil.Process]
) -> None:
    before = timeouts(running)
    headers = {"X-Request-Timeout": "0.5"}
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(local.ask, "POST", "/predict", data=CAT.read_bytes(), headers=headers)
        time.sleep(1.5)
        assert not asked.done()
        for worker in suspended:
            worker.resume()
        answer = asked.result()
    assert (answer.status_code, answer.json()["type"]) == (504, "Timeout")
    wait_for(lambda: timeouts(running) == before + 1)
    in_time = {"X-Request-Timeout": "30"}
    assert local.ask("POST", "/predict", data=CAT.read_bytes(), headers=in_time).ok


def test_the_request_of_a_client_that_disconnected_is_not_computed(
    local: Gateway, running: ServerState, suspended: list[psutil.Process], run_dir: Path
) -> None:
    before, log = timeouts(running), run_dir / "gateway" / "cancelled.log"
    image = CAT.read_bytes()
    port = local.options.http_port
    with ThreadPoolExecutor(4) as clients:
        # The workers have taken these out of the queue.
        others = [clients.submit(local.ask, "POST", "/predict", data=image) for _ in suspended]
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n"
            client.sendall(head.encode() + image)
            time.sleep(0.5)  # until TorchServe has it
        wait_for(lambda: log.exists() and bool(log.read_text()))
        for worker in suspended:
            worker.resume()
        assert all(other.result().ok for other in others)
    wait_for(lambda: timeouts(running) == before + 1)
