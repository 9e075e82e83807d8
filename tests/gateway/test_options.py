"""What is checked before a gateway starts, and what is known of one that did; without any node."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client import CollectorRegistry

from scripts import gateway as gateways
from scripts.gateway import (
    STATE,
    Gateway,
    Node,
    Options,
    find_gateway,
    find_lost,
    stop_lost,
)
from scripts.state import remember, started
from scripts.terminal import UserError
from scripts.waiting import Attempts, answering, may_be_sent_again
from scripts.watch import Starts
from tests.gateway.conftest import free_options, free_port


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"http_port": 0}, "HTTP_PORT must be 1 to 65535, got 0"),
        ({"https_port": 99999}, "HTTPS_PORT must be 1 to 65535, got 99999"),
        ({"metrics_port": -1}, "METRICS_PORT must be 1 to 65535, got -1"),
        ({"https_port": 5000, "http_port": 5000}, "HTTP_PORT and HTTPS_PORT are both 5000"),
        ({"rate": 0}, "RATE must be 1 or more, got 0"),
        ({"burst": -3}, "BURST must be 1 or more, got -3"),
        ({"connections": 0}, "CONNECTIONS must be 1 or more, got 0"),
        ({"host": "localhost"}, "HOST must be an IP address"),
        ({"host": "192.0.2.1", "keys": "keys"}, "keys cannot be read"),
        ({"certificate": "a.pem"}, "belong together"),
        ({"certificate": "a.pem", "certificate_key": "a.key"}, "a.pem is not a file"),
        ({"certificate": __file__, "certificate_key": __file__}, "no certificate and its private"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(
    wrong: dict[str, Any], said: str, tmp_path: Path
) -> None:
    options = dataclasses.replace(free_options(), **wrong)
    folder = tmp_path / "gateway"
    with pytest.raises(UserError, match=said):
        gateways.start(options, [], folder)
    assert not folder.exists()


def test_a_port_that_is_taken_is_refused_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = dataclasses.replace(free_options(), https_port=port)
        with pytest.raises(UserError, match=f"{port}.*already in use.*HTTPS_PORT"):
            gateways.check(options, tmp_path)


@pytest.fixture
def remembered(tmp_path: Path) -> Gateway:
    """A gateway whose nginx and watch are this very process."""
    pid, when = os.getpid(), started(os.getpid())
    gateway = Gateway(pid, when, "/x", Options(), (), "secret", pid, when)
    remember(tmp_path / STATE, dataclasses.asdict(gateway))
    return gateway


def test_a_step_of_the_clock_changes_nothing(
    remembered: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time

    def an_hour_later() -> float:
        return now() + 3600

    monkeypatch.setattr(time, "time", an_hour_later)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: an_hour_later())
    found = find_gateway(tmp_path)
    assert found == remembered
    assert found.process() is not None
    assert found.watch() is not None


def test_anothers_process_of_the_same_id_is_no_watch(remembered: Gateway) -> None:
    reused = dataclasses.replace(remembered, watch_started=f"{remembered.watch_started}0")
    assert remembered.watch() is not None
    assert reused.watch() is None


def test_what_cannot_be_read_is_reported_and_stays(remembered: Gateway, tmp_path: Path) -> None:
    path = tmp_path / STATE
    for text in ("{", "[]", '{"pid": 1}', path.read_text().replace("secret", "secrets", 1)):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot be understood"):
            find_gateway(tmp_path)
        assert path.read_text() == text
    assert remembered.process() is not None


def test_a_gateway_that_has_ended_is_not_found_and_looking_removes_nothing(
    remembered: Gateway, tmp_path: Path
) -> None:
    ended = dataclasses.replace(remembered, started="long ago")
    remember(tmp_path / STATE, dataclasses.asdict(ended))
    assert find_gateway(tmp_path) is None
    assert (tmp_path / STATE).exists()


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Nginx before a node that nobody answers for."""
    monkeypatch.setattr(
        gateways,
        "_upstream",
        lambda node, sockets: {
            "name": node.name,
            "port": free_port(),
            "authorization": "",
            "socket": f"{sockets}/{node.name}.sock",
        },
    )
    folder = tmp_path / "gateway"
    node = Node(str(tmp_path / "node-1"), "densenet121.mar", 1)
    gateway = gateways.start(free_options(), [node], folder, watch=False)
    yield gateway
    gateways.stop(gateway, folder)


def test_a_gateway_whose_folder_was_removed_is_found_by_what_it_runs(
    serving: Gateway, tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert find_gateway(folder) is None
    with pytest.raises(UserError, match="make gateway-stop"):
        gateways.check(free_options(), folder)
    assert find_lost(tmp_path / "other") == []
    lost = find_lost(folder)
    assert [process.pid for process in lost] == [serving.pid]
    stop_lost(lost)
    assert serving.process() is None
    assert find_lost(folder) == []


def test_a_watch_ends_where_its_gateway_does(serving: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "gateway"
    with subprocess.Popen([sys.executable, "-m", "scripts.watch", "--folder", folder]) as watch:
        socket_path = Path(serving.sockets) / "watch.sock"
        deadline = time.monotonic() + 30
        while not socket_path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # What it cannot understand it reports, and goes on.
        state = (folder / STATE).read_text()
        (folder / STATE).write_text("{")
        time.sleep(2.5)
        assert watch.poll() is None
        (folder / STATE).write_text(state)
        process = serving.process()
        assert process is not None
        process.send_signal(signal.SIGQUIT)
        assert watch.wait(timeout=20) == 0


class _Nodes:
    """What the watch says of nodes, given here."""

    def __init__(self, verdict: str, node: str = "node-2", *, ready: bool = True) -> None:
        self._verdict, self._node, self._ready = verdict, node, ready

    def ready(self) -> bool:
        return self._ready

    def steady(self) -> bool:
        return True

    def verdict(self, socket: str) -> Any:
        assert socket.endswith(f"/{self._node}.sock")
        return self._verdict


FIRST = "unix:/tmp/b/node-1.sock, unix:/tmp/b/node-2.sock"


def _held(rounds: int) -> str:
    return FIRST + " : unix:/tmp/b/watch.sock : unix:/tmp/b/again.sock" * rounds


@pytest.mark.parametrize(
    ("nodes", "attempts", "again"),
    [
        (_Nodes("again"), Attempts(FIRST, "503, 503", "0.001, 0.002"), True),
        # Its worker was ended while it worked at this request or one beside it.
        (_Nodes("no"), Attempts(FIRST, "500", "25.1"), False),
        # Its worker was ended because it hung: once more, and no further.
        (_Nodes("once"), Attempts(FIRST, "500", "8.2"), True),
        (_Nodes("once"), Attempts(_held(1), "500 : 200 : 500", "8.2 : 0.5 : 8.1", FIRST), False),
        # Whatever the request does to workers, it does to six at most, and for a minute.
        (_Nodes("again"), Attempts(_held(1), "500, 500, 500, 500, 500, 500", "0.1", FIRST), False),
        (_Nodes("again"), Attempts(_held(4), "503", "0.1", FIRST), False),
        (_Nodes("again", ready=False), Attempts(FIRST, "503", "59.9"), False),
        (_Nodes("again"), Attempts(FIRST, "503, 503", "30.0, 30.1"), False),
        # TorchServe gave up a worker that was silent for a minute, or a new one half of that.
        (_Nodes("again"), Attempts(FIRST, "500", "60.1"), False),
        (_Nodes("again"), Attempts(FIRST, "503, 500", "0.1, 26.0"), False),
        (_Nodes("again"), Attempts(_held(1), "503 : 200 : 500", "0 : 0.5 : 26.0", FIRST), False),
        # The frontend was what took long, or the watch was, which waited for a node.
        (_Nodes("again"), Attempts(FIRST, "503, 500", "30.0, 0.1"), True),
        (_Nodes("again"), Attempts(_held(1), "503 : 200 : 500", "0 : 40.1 : 0.1", FIRST), True),
    ],
)
def test_what_may_be_sent_again(nodes: _Nodes, attempts: Attempts, *, again: bool) -> None:
    assert may_be_sent_again(nodes, attempts) is again


def test_a_node_that_dies_again_and_again_is_started_more_and_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 10_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    starts, waited = Starts(), []
    for _ in range(9):
        begin = now
        while not starts.due():
            now += 1
        waited.append(now - begin)
        starts.count()
        starts.over()
    assert waited == [0, 5, 10, 20, 40, 80, 160, 300, 300]
    now += 3600
    starts.count()
    starts.over()
    assert starts.pause == 5


def test_a_held_request_goes_by_the_nodes_that_are_there_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of nginx that has it knows none of them any more."""
    ports: dict[str, int] = {}
    monkeypatch.setattr(
        gateways,
        "_upstream",
        lambda node, sockets: {
            "name": node.name,
            "port": ports[node.name],
            "authorization": "",
            "socket": f"{sockets}/{node.name}.sock",
        },
    )
    asked = threading.Event()
    ended = threading.Event()

    class Old(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.set()
            ended.wait(20)
            self.connection.close()

    class New(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{self.path} {len(body)}".encode())

    folder = tmp_path / "gateway"
    old, new = (HTTPServer(("127.0.0.1", 0), handler) for handler in (Old, New))
    threads = [threading.Thread(target=server.serve_forever) for server in (old, new)]
    for thread in threads:
        thread.start()
    ports.update({"node-1": old.server_port, "node-2": new.server_port})
    first, second = (Node(str(tmp_path / name), "densenet121.mar", 1) for name in ports)
    gateway = gateways.start(free_options(), [first], folder, watch=False)
    nodes = _Nodes("again", "node-1")
    try:
        with (
            answering(Path(gateway.sockets) / "watch.sock", nodes, CollectorRegistry()),
            ThreadPoolExecutor(1) as pool,
        ):
            answer = pool.submit(
                requests.post, f"{gateway.url}/predict?topk=2", data=bytes(300_000), timeout=30
            )
            assert asked.wait(10)
            gateways.change_nodes(lambda _: [second], folder)
            old.shutdown()
            ended.set()
            old.server_close()
            assert answer.result().text == "/densenet121/predict?topk=2 300000"
    finally:
        ended.set()
        gateways.stop(gateway, folder)
        for server in (old, new):
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
