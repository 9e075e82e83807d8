"""Clients keep asking while workers and nodes die, leave and are replaced: none of them may notice.

The short form of `make outages`.
"""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import requests

from benchmarks import faults
from benchmarks.cluster import Tally, clients, free_options
from scripts.build.archive import build, recipe
from scripts.build.weights import Weights
from scripts.gateway import start as starting
from scripts.gateway import upgrade as upgrades
from scripts.gateway import watch as watches
from scripts.gateway.commands import refuse_during_an_operation
from scripts.gateway.gateway import Gateway, find_gateway
from scripts.gateway.nginx import change_nodes
from scripts.gateway.nodes import drain, replace, start_nodes, stop_nodes, undrain
from scripts.gateway.upgrade import upgrade
from scripts.gateway.watch import renew_tokens
from scripts.serve.running import Running
from scripts.store import sha256
from scripts.terminal import UserError
from tests.gateway.client import Client
from tests.gateway.conftest import KEYS

CLIENTS = 8


@contextmanager
def _asking(gateway: Gateway) -> Iterator[Tally]:
    """Clients that are answered before what happens meanwhile, and again after it."""
    with clients(gateway, CLIENTS) as tally:
        faults.wait_for(lambda: tally.outcomes.total() >= CLIENTS)
        yield tally
        before = tally.outcomes.total()
        faults.wait_for(lambda: tally.outcomes.total() > before + CLIENTS)  # some asked since


def _nobody_noticed(tally: Tally) -> None:
    assert tally.outcomes["200"] > CLIENTS, tally.outcomes
    assert tally.failed == 0, (tally.outcomes, tally.examples)


@pytest.fixture(autouse=True)
def _all_serve(cluster: Gateway, folder: Path) -> None:
    """What the test before did to a node is over."""
    assert cluster
    faults.wait_for(lambda: all(node.healthy for node in _gateway(folder).nodes))


def test_a_killed_worker_costs_no_client_an_error(cluster: Gateway, folder: Path) -> None:
    with _asking(cluster) as tally:
        faults.kill_worker(folder, 0)
    _nobody_noticed(tally)


def test_a_drained_node_costs_no_client_an_error(cluster: Gateway, folder: Path) -> None:
    with _asking(cluster) as tally:
        faults.drain_node(folder)
    _nobody_noticed(tally)


def test_tokens_are_renewed_without_an_error(cluster: Gateway, folder: Path) -> None:
    before = [server.authorization("inference") for server in faults.servers_of(folder)]
    with _asking(cluster) as tally:
        renewed = renew_tokens(folder, before_expiry=timedelta(hours=2))
    _nobody_noticed(tally)
    servers = faults.servers_of(folder)
    assert len(renewed) == len(servers) == 2
    for server, old in zip(servers, before, strict=True):
        answer = requests.post(server.predictions_url, data=b"x", headers=old, timeout=10)
        assert answer.json()["type"] == "InvalidKeyException"
    assert renew_tokens(folder, before_expiry=timedelta(minutes=1)) == []


def test_what_follows_a_renewal_at_once_carries_the_new_token(
    cluster: Gateway, folder: Path
) -> None:
    """The old processes of nginx take connections for a moment still."""
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            assert len(renew_tokens(folder, before_expiry=timedelta(hours=2))) == 2
            asked = [pool.submit(Client(cluster).predict) for _ in range(16)]
            assert [answer.result().status_code for answer in asked] == [200] * 16


def test_a_renewal_that_fails_leaves_no_node_drained_and_is_made_up_for(
    cluster: Gateway, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([UserError("TorchServe refuses a new token: not today")])
    real = watches.renew

    def renew(running: Running) -> None:
        for failure in failures:
            raise failure
        real(running)

    monkeypatch.setattr(watches, "renew", renew)
    with pytest.raises(UserError, match="not today"):
        renew_tokens(folder, before_expiry=timedelta(hours=2))
    assert [node.drained for node in _gateway(folder).nodes] == [False, False]
    assert Client(cluster).predict().status_code == 200
    renewed = renew_tokens(folder, before_expiry=timedelta(hours=2))
    assert len(renewed) == 2
    assert [node.drained for node in _gateway(folder).nodes] == [False, False]


def test_a_killed_node_is_replaced_and_costs_no_client_an_error(
    cluster: Gateway, folder: Path
) -> None:
    names = faults.nodes_of(folder)
    with _asking(cluster) as tally:
        faults.kill_node(folder)
    _nobody_noticed(tally)
    assert names[0] not in faults.nodes_of(folder)
    assert len(faults.nodes_of(folder)) == 2


def test_a_dead_frontend_is_started_again_by_the_watch_and_costs_no_client_an_error(
    cluster: Gateway, folder: Path
) -> None:
    names = faults.nodes_of(folder)
    with _asking(cluster) as tally:
        faults.kill_frontend(folder, 0)
    _nobody_noticed(tally)
    assert faults.nodes_of(folder) == names


def test_a_single_node_that_loses_its_worker_and_its_frontend_costs_no_client_an_error(
    archive: Path, tmp_path: Path, note: list[str]
) -> None:
    """There is no other node to ask: clients wait for as long as it takes."""
    folder = tmp_path / "run" / "gateway"
    nodes = start_nodes(1, archive, workers=1, run_dir=folder.parent)
    gateway = starting.start(free_options(rate=1000, burst=1000), nodes, folder)
    try:
        with clients(gateway, CLIENTS) as tally:
            for number in range(3):
                time.sleep(1)
                faults.kill_worker(folder, number)
            time.sleep(1)
            (victim,) = faults.servers_of(folder)
            faults.cut_power(victim)
            faults.wait_for(lambda: faults.serves_anew(folder, victim))
            time.sleep(0.5)
        _nobody_noticed(tally)
        longest = max(tally.seconds)
        note.append(
            f"one node, 3 workers and the frontend killed: the longest wait {longest:.1f} s"
        )
    finally:
        last = _gateway(folder)
        starting.stop(last, folder)
        stop_nodes(last.nodes)


def test_a_hung_worker_is_ended_and_whoever_waits_for_it_is_answered(
    cluster: Gateway, folder: Path, note: list[str]
) -> None:
    """A worker that is stopped takes requests, and gives no answer; nor do those behind it get one.

    The other node is free, and the gateway stays ready all the time.
    """
    worker = faults.worker_of(faults.servers_of(folder)[0])
    log = Path(cluster.options.certificate).parent / "watch.log"
    before = len(log.read_text())
    worker.suspend()
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(Client(cluster).predict) for _ in range(11)]
        ready = set()
        while not all(answer.done() for answer in asked):
            ready.add(Client(cluster).ask("GET", "/readyz").status_code)
            time.sleep(0.2)
        answers = [answer.result() for answer in asked]
    assert [answer.status_code for answer in answers] == [200] * 11
    assert ready == {200}
    assert "were idle and have been ended" in log.read_text()[before:]
    slowest = max(answer.elapsed.total_seconds() for answer in answers)
    note.append(f"11 requests while one of two nodes hung: the slowest took {slowest:.1f} s")
    faults.wait_for(lambda: all(node.healthy for node in _gateway(folder).nodes))


def test_a_request_that_is_followed_by_silence_reaches_one_node(
    cluster: Gateway, folder: Path, guarded: Client
) -> None:
    """Before the same nodes, a gateway without a watch that waits for 5 s."""
    worker = faults.worker_of(faults.servers_of(folder)[0])
    worker.suspend()
    try:
        answers = [guarded.predict(KEYS["alice"]) for _ in range(3)]
    finally:
        worker.resume()
    silent = [answer for answer in answers if answer.status_code == 504]
    assert silent
    assert silent[0].json()["type"] == "Timeout"
    time.sleep(1.5)
    lines = (Path(guarded.gateway.options.certificate).parent / "access.log").read_text()
    logged = {line["id"]: line for line in map(json.loads, lines.splitlines())}
    for answer in silent:
        assert logged[answer.headers["x-request-id"]]["node_status"] == "504"
    faults.wait_for(lambda: all(node.healthy for node in _gateway(folder).nodes))
    assert cluster.process() is not None


def test_one_change_of_nodes_at_a_time_and_a_dead_holder_keeps_nothing(
    cluster: Gateway, folder: Path, archive: Path
) -> None:
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from scripts.gateway.gateway import operation\n"
        "with operation('make upgrade to new.mar', Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    names = faults.nodes_of(folder)
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = rf"make upgrade to new.mar \(process {holder.pid}\) changes which nodes serve"
        for refused in (
            lambda: upgrade(archive, folder=folder),
            lambda: drain([names[0]], folder),
            lambda: undrain(names[0], folder),
            lambda: replace(names[0], folder),
        ):
            with pytest.raises(UserError, match=said):
                refused()
        with pytest.raises(UserError, match=said):
            refuse_during_an_operation(_gateway(folder), folder)
        holder.kill()
    refuse_during_an_operation(_gateway(folder), folder)
    drain([names[0]], folder)
    undrain(names[0], folder)
    assert faults.nodes_of(folder) == names
    assert Client(cluster).predict().status_code == 200


def test_an_upgrade_that_goes_back_leaves_alone_what_others_changed(
    cluster: Gateway,
    folder: Path,
    other_archive: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, last = faults.nodes_of(folder)
    taken = _gateway(folder).nodes[1]

    def fail(*_: object) -> None:
        change_nodes(lambda nodes: [node for node in nodes if node.name != last], folder)
        raise UserError("no")

    monkeypatch.setattr(upgrades, "_check_service", fail)
    with pytest.raises(UserError, match="no"):
        faults.upgrade_all(folder, other_archive)
    assert faults.nodes_of(folder) == [first]
    assert not _gateway(folder).nodes[0].drained
    assert Client(cluster).predict().status_code == 200
    change_nodes(lambda nodes: [*nodes, dataclasses.replace(taken, drained=False)], folder)


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
    with _asking(cluster) as tally:
        faults.upgrade_all(folder, other_archive)
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
    faults.wait_for(lambda: client.ask("GET", "/readyz").status_code == 200)


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
        faults.wait_for(lambda: not _gateway(folder).nodes[0].healthy)
        for _ in range(4):
            assert Client(cluster).predict().status_code == 200
    finally:
        with suppress(psutil.NoSuchProcess):  # the watch has started another one in its place
            process.resume()
    faults.wait_for(lambda: _gateway(folder).nodes[0].healthy)


def _gateway(folder: Path) -> Gateway:
    gateway = find_gateway(folder)
    assert gateway is not None
    return gateway
