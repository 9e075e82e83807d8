"""Clients keep asking while workers and nodes die, leave and are replaced: none of them may notice.

The short form of `make outages`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import requests

from scripts.build.archive import build, recipe
from scripts.build.weights import Weights
from scripts.gateway import watch as watches
from scripts.gateway.gateway import Gateway, require_gateway
from scripts.gateway.nodes import drain, undrain
from scripts.gateway.upgrade import upgrade
from scripts.gateway.watch import renew_tokens
from scripts.serve.running import Running
from scripts.store import sha256
from scripts.terminal import UserError
from tests.gateway import faults
from tests.gateway.cluster import clients
from tests.gateway.conftest import Client

CLIENTS = 8
SOON = timedelta(hours=2)


def _all_serve(folder: Path) -> bool:
    return all(node.healthy and not node.drained for node in require_gateway(folder).nodes)


@contextmanager
def _no_client_notices(gateway: Gateway, folder: Path) -> Iterator[None]:
    """Clients are answered before what happens meanwhile, during it, and again after it."""
    faults.wait_for(lambda: _all_serve(folder))
    with clients(gateway, CLIENTS) as tally:
        faults.wait_for(lambda: tally.outcomes.total() >= CLIENTS)
        yield
        before = tally.outcomes.total()
        faults.wait_for(lambda: tally.outcomes.total() > before + CLIENTS)  # some asked since
    assert tally.failed == 0, (tally.outcomes, tally.examples)
    faults.wait_for(lambda: _all_serve(folder))
    assert len(faults.servers_of(folder)) == 2


def _kill_worker(folder: Path) -> None:
    faults.kill_worker(folder, 0)


def _kill_worker_and_frontend_of_the_only_node_that_serves(folder: Path) -> None:
    """Clients wait for as long as it takes."""
    names = faults.nodes_of(folder)
    faults.patiently(lambda: drain(names[1:], folder))
    faults.kill_worker(folder, 0)
    faults.kill_frontend(folder, 0)
    faults.patiently(lambda: undrain(names[1], folder))
    assert faults.nodes_of(folder) == names


@pytest.mark.parametrize(
    "fault",
    [
        _kill_worker,
        faults.drain_node,
        _kill_worker_and_frontend_of_the_only_node_that_serves,
        faults.kill_node,
    ],
)
def test_a_fault_costs_no_client_an_error(
    fault: Callable[[Path], None], cluster: Gateway, folder: Path
) -> None:
    with _no_client_notices(cluster, folder):
        fault(folder)


def test_tokens_are_renewed_without_an_error_and_the_old_ones_are_void(
    cluster: Gateway, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [server.authorization("inference") for server in faults.servers_of(folder)]

    def fail(_: Running) -> None:
        raise UserError("not today")

    with _no_client_notices(cluster, folder):
        with monkeypatch.context() as patch:
            patch.setattr(watches, "renew", fail)
            with pytest.raises(UserError, match="not today"):
                renew_tokens(folder, before_expiry=SOON)
        assert _all_serve(folder)
        for _ in range(2):
            assert len(renew_tokens(folder, before_expiry=SOON)) == 2
    for server, old in zip(faults.servers_of(folder), before, strict=True):
        answer = requests.post(server.predictions_url, data=b"x", headers=old, timeout=10)
        assert answer.json()["type"] == "InvalidKeyException"
    assert renew_tokens(folder, before_expiry=timedelta(minutes=1)) == []


def test_a_hung_worker_is_ended_and_whoever_waits_for_it_is_answered(
    cluster: Gateway, folder: Path
) -> None:
    """A worker that is stopped takes requests, and gives no answer; nor do those behind it get one.

    The other node is free, and the gateway stays ready all the time.
    """
    worker = faults.worker_of(faults.servers_of(folder)[0])
    worker.suspend()
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(Client(cluster).predict) for _ in range(11)]
        ready = set()
        while not all(answer.done() for answer in asked):
            ready.add(Client(cluster).ask("GET", "/readyz").status_code)
            time.sleep(0.2)
    assert [answer.result().status_code for answer in asked] == [200] * 11
    assert ready == {200}
    assert not worker.is_running()
    faults.wait_for(lambda: _all_serve(folder))


@pytest.mark.timeout(600)
def test_an_upgrade_costs_no_client_an_error_and_one_with_other_answers_must_be_asked_for(
    cluster: Gateway, folder: Path, weights: Weights, tmp_path: Path
) -> None:
    state = dict(weights.state_dict)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name].roll(1, dims=0)
    other = dataclasses.replace(weights, state_dict=state, sha256="0" * 64)
    archive = build(recipe(other), tmp_path)

    def best() -> int:
        return int(Client(cluster).predict().json()["predictions"][0]["class_index"])

    names, before = faults.nodes_of(folder), best()
    with pytest.raises(UserError, match="keep their first label"):
        upgrade(archive, folder=folder)
    assert faults.nodes_of(folder) == names
    assert best() == before
    with _no_client_notices(cluster, folder):
        faults.upgrade_all(folder, archive)
    digests = {server.archive_sha256 for server in faults.servers_of(folder)}
    assert digests == {sha256(archive)}
    assert best() == (before + 1) % 1000
    with pytest.raises(UserError, match="already"):
        upgrade(archive, folder=folder)
