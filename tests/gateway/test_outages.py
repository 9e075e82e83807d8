"""Clients keep asking while workers and nodes die, leave and are replaced: none of them may notice.

The short form of `make outages`.
"""

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import requests

from scripts.archive import build, recipe
from scripts.cluster import drain, undrain
from scripts.gateway import Gateway, find_gateway
from scripts.store import sha256
from scripts.terminal import UserError
from scripts.upgrade import upgrade
from scripts.watch import renew_tokens
from scripts.weights import Weights
from tests.gateway import faults
from tests.gateway.client import Client, Tally, clients

CLIENTS = 8


def _nobody_noticed(tally: Tally) -> None:
    assert tally.outcomes["200"] > CLIENTS, tally.outcomes
    assert tally.failed == 0, (tally.outcomes, tally.examples)


def test_a_killed_worker_costs_no_client_an_error(cluster: Gateway, folder: Path) -> None:
    with clients(cluster, CLIENTS) as tally:
        time.sleep(0.5)
        faults.kill_worker(folder, 0)
    _nobody_noticed(tally)


def test_a_drained_node_costs_no_client_an_error(cluster: Gateway, folder: Path) -> None:
    with clients(cluster, CLIENTS) as tally:
        time.sleep(0.5)
        faults.drain_node(folder)
        time.sleep(0.5)
    _nobody_noticed(tally)


def test_tokens_are_renewed_without_an_error(cluster: Gateway, folder: Path) -> None:
    before = [server.authorization("inference") for server in faults.servers_of(folder)]
    with clients(cluster, CLIENTS) as tally:
        time.sleep(0.5)
        renewed = renew_tokens(folder, before_expiry=timedelta(hours=2))
        time.sleep(0.5)
    _nobody_noticed(tally)
    servers = faults.servers_of(folder)
    assert len(renewed) == len(servers) == 2
    for server, old in zip(servers, before, strict=True):
        answer = requests.post(server.predictions_url, data=b"x", headers=old, timeout=10)
        assert answer.json()["type"] == "InvalidKeyException"
    assert renew_tokens(folder, before_expiry=timedelta(minutes=1)) == []


def test_a_killed_node_is_replaced_and_costs_no_client_an_error(
    cluster: Gateway, folder: Path
) -> None:
    names = faults.nodes_of(folder)
    with clients(cluster, CLIENTS) as tally:
        time.sleep(0.5)
        faults.kill_node(folder)
        time.sleep(0.5)
    _nobody_noticed(tally)
    assert names[0] not in faults.nodes_of(folder)
    assert len(faults.nodes_of(folder)) == 2


def test_the_last_node_cannot_be_drained(cluster: Gateway, folder: Path) -> None:
    first, last = faults.nodes_of(folder)
    drain([first], folder)
    with pytest.raises(UserError, match="No node would be left"):
        drain([last], folder)
    assert Client(cluster).predict().status_code == 200
    undrain(first, folder)


@pytest.fixture(scope="module")
def other_archive(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with other weights, which answer every picture differently."""
    state = dict(weights.state_dict)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name].roll(1, dims=0)
    other = dataclasses.replace(weights, state_dict=state, sha256="0" * 64)
    return build(recipe(other), tmp_path_factory.mktemp("other_store"))


def test_an_upgrade_that_answers_otherwise_goes_back_by_itself(
    cluster: Gateway, folder: Path, other_archive: Path
) -> None:
    names = faults.nodes_of(folder)
    with pytest.raises(UserError, match="keep their first label"):
        upgrade(other_archive, folder=folder)
    assert faults.nodes_of(folder) == names
    assert Client(cluster).predict().status_code == 200


def test_an_upgrade_costs_no_client_an_error_and_changes_the_answers(
    cluster: Gateway, folder: Path, other_archive: Path
) -> None:
    before = Client(cluster).predict().json()["predictions"][0]["class_index"]
    with clients(cluster, CLIENTS) as tally:
        time.sleep(0.5)
        faults.upgrade_all(folder, other_archive)
        time.sleep(0.5)
    _nobody_noticed(tally)
    assert {server.archive_sha256 for server in faults.servers_of(folder)} == {
        sha256(other_archive)
    }
    after = Client(cluster).predict().json()["predictions"][0]["class_index"]
    assert after == (before + 1) % 1000
    with pytest.raises(UserError, match="already"):
        upgrade(other_archive, folder=folder)


def test_ready_tells_the_truth_when_all_workers_are_gone(cluster: Gateway, folder: Path) -> None:
    client = Client(cluster)
    assert client.ask("GET", "/readyz").json() == {"success": True, "status": "ready"}
    with _workers_kept_dead(folder):
        time.sleep(2.1)  # nginx counts whole seconds, so one second can be nearly two
        answer = client.ask("GET", "/readyz")
        assert answer.status_code == 503, answer.text
        assert answer.json()["type"] == "ServiceUnavailable"
        assert client.ask("GET", "/healthz").status_code == 200
    deadline = time.monotonic() + 60
    while client.ask("GET", "/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)


@contextmanager
def _workers_kept_dead(folder: Path) -> Iterator[None]:
    """Kills all workers, and every one that takes the place of a killed one."""
    frontends = [server.process() for server in faults.servers_of(folder)]
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.05):
            for frontend in frontends:
                for worker in frontend.children() if frontend else []:
                    with suppress(psutil.NoSuchProcess):  # it has ended by itself
                        worker.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_node_that_hangs_is_taken_out_and_comes_back(cluster: Gateway, folder: Path) -> None:
    server = faults.servers_of(folder)[0]
    process = server.process()
    assert process is not None
    process.suspend()
    try:
        _until_first_node_is(folder, healthy=False)
        for _ in range(4):
            assert Client(cluster).predict().status_code == 200
    finally:
        process.resume()
    _until_first_node_is(folder, healthy=True)


def _until_first_node_is(folder: Path, *, healthy: bool) -> None:
    deadline = time.monotonic() + 30
    while True:
        gateway = find_gateway(folder)
        assert gateway is not None
        if gateway.nodes[0].healthy == healthy:
            return
        assert time.monotonic() < deadline
        time.sleep(0.2)
