"""Nodes that others start: found by name, known by answers, out while they give none."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, Node, require_gateway
from scripts.gateway.nginx import change_nodes
from scripts.gateway.nodes import drain, replace, undrain
from scripts.gateway.upgrade import upgrade
from scripts.gateway.upstreams import Answers, find_nodes, read_upstreams
from scripts.gateway.waiting import answering
from scripts.gateway.watch import CHECKS_THAT_FAIL
from scripts.terminal import UserError
from tests.gateway.cluster import free_options
from tests.gateway.faults import wait_for

LENGTH = "Inference-Header-Content-Length"


class _Server(ThreadingHTTPServer):
    """Stands for a node: answers what came to it, with its status; 0 for no answer at all."""

    daemon_threads = True
    status = 200
    asked = 0


class _Answer(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._send(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        if self.server.status == 0:
            time.sleep(5)
        self._send(f"{self.server.server_port} {self.path} {len(body)}".encode())

    def _send(self, body: bytes) -> None:
        self.send_response(self.server.status or 200)
        self.send_header(LENGTH, self.headers.get(LENGTH, ""))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _serve(port: int = 0) -> _Server:
    server = _Server(("127.0.0.1", port), _Answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    return server


def _end(server: _Server) -> None:
    server.shutdown()
    server.server_close()


@pytest.fixture
def servers() -> Iterator[list[_Server]]:
    found = [_serve(), _serve()]
    yield found
    for server in found:
        _end(server)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "gateway"


@pytest.fixture
def gateway(servers: list[_Server], folder: Path) -> Iterator[Gateway]:
    upstreams = " ".join(f"localhost:{server.server_port}" for server in servers)
    options = free_options(rate=1000, burst=1000, upstreams=upstreams)
    started = starting.start(options, find_nodes(upstreams, "densenet121"), folder)
    try:
        _healthy(folder, 2)
        yield started
    finally:
        starting.stop(started, folder)


def _healthy(folder: Path, count: int) -> None:
    wait_for(lambda: sum(node.healthy for node in require_gateway(folder).nodes) == count)


def _predict(gateway: Gateway) -> requests.Response:
    return requests.post(
        f"{gateway.url}/predict?topk=2", data=bytes(300_000), headers={LENGTH: "12"}, timeout=60
    )


def _answered_by(server: _Server) -> str:
    return f"{server.server_port} /densenet121/predict?topk=2 300000"


def _status(gateway: Gateway, path: str) -> int:
    return requests.get(f"{gateway.url}{path}", timeout=10).status_code


def test_a_node_that_ends_costs_nothing_and_comes_back(
    gateway: Gateway, servers: list[_Server], folder: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda _: _predict(gateway), range(20)))
        assert {(a.status_code, a.headers[LENGTH]) for a in first} == {(200, "12")}
        assert {answer.text for answer in first} == {_answered_by(server) for server in servers}
        gone = servers[0]
        _end(gone)
        answers = list(pool.map(lambda _: _predict(gateway), range(20)))
    assert {answer.text for answer in answers} == {_answered_by(servers[1])}
    _healthy(folder, 1)
    servers[0] = _serve(gone.server_port)
    wait_for(lambda: _predict(gateway).text == _answered_by(gone))


def test_requests_wait_while_no_node_is_there(gateway: Gateway, servers: list[_Server]) -> None:
    ports = [server.server_port for server in servers]
    for server in servers:
        _end(server)
    wait_for(lambda: _status(gateway, "/readyz") == 503)
    assert _status(gateway, "/healthz") == 200
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_predict, gateway)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        servers[:] = [_serve(port) for port in ports]
        assert waiting.result(timeout=60).status_code == 200
    wait_for(lambda: _status(gateway, "/readyz") == 200)


def test_a_held_request_goes_to_the_nodes_that_are_there_now(
    servers: list[_Server], folder: Path
) -> None:
    """The process of nginx that holds it knows none of them."""
    old, new = (find_nodes(f"127.0.0.1:{s.server_port}", "densenet121") for s in servers)
    servers[0].status = 503
    changed = threading.Event()
    nodes: Any = SimpleNamespace(ready=changed.is_set, verdict=lambda _: "again")
    gateway = starting.start(free_options(), old, folder, watch=False)
    try:
        with (
            answering(Path(gateway.sockets) / "watch.sock", nodes, bytes),
            ThreadPoolExecutor(1) as pool,
        ):
            answer = pool.submit(_predict, gateway)
            wait_for(lambda: servers[0].asked > 0)
            change_nodes(lambda _: new, folder)
            changed.set()
            assert answer.result().text == _answered_by(servers[1])
            assert answer.result().headers[LENGTH] == "12"
    finally:
        starting.stop(gateway, folder)


def test_a_request_that_is_followed_by_silence_reaches_one_node(
    servers: list[_Server], folder: Path
) -> None:
    nodes = [node for s in servers for node in find_nodes(f"127.0.0.1:{s.server_port}", "m")]
    gateway = starting.start(free_options(timeout=1), nodes, folder, watch=False)
    try:
        assert _status(gateway, "/readyz") == 200  # without the watch, by an image of one pixel
        for server in servers:
            server.status, server.asked = 0, 0
        answer = _predict(gateway)
        assert (answer.status_code, answer.json()["type"]) == (504, "Timeout")
        assert sum(server.asked for server in servers) == 1
        log = folder / "access.log"
        wait_for(lambda: "/predict" in log.read_text())
        assert json.loads(log.read_text().splitlines()[-1])["node_status"] == "504"
    finally:
        starting.stop(gateway, folder)


def test_a_node_that_rejects_work_gets_no_more_of_it(
    gateway: Gateway, servers: list[_Server], folder: Path
) -> None:
    servers[0].status = 503
    _healthy(folder, 1)
    assert {_predict(gateway).text for _ in range(4)} == {_answered_by(servers[1])}
    assert _status(gateway, "/readyz") == 200


def test_others_nodes_can_be_drained_and_are_never_replaced(
    gateway: Gateway, servers: list[_Server], folder: Path
) -> None:
    first = gateway.nodes[0]
    drain([first.name], folder)
    (other,) = (s for s in servers if not first.address.endswith(f":{s.server_port}"))
    assert {_predict(gateway).text for _ in range(4)} == {_answered_by(other)}
    undrain(first.name, folder)
    assert not any(node.drained for node in require_gateway(folder).nodes)
    for change in (
        lambda: replace(first.name, folder),
        lambda: upgrade(folder / "densenet121.mar", folder=folder),
    ):
        with pytest.raises(UserError, match="started by others"):
            change()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no node"),
        ("densenet", "HOST:PORT"),
        ("densenet:0", "HOST:PORT"),
        ("densenet:99999", "HOST:PORT"),
        ("http://densenet:8080", "HOST:PORT"),
        ("a:1 ;evil:2", "HOST:PORT"),
    ],
)
def test_what_is_no_address_is_rejected(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_upstreams(text)


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host == "nobody":
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 1, 6, "", (address, port)) for address in ("10.0.0.8", "10.0.0.7", "fd00::7")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    nodes = find_nodes("densenet:8080 nobody:8080", "densenet121")
    assert [node.address for node in nodes] == ["10.0.0.7:8080", "10.0.0.8:8080", "[fd00::7]:8080"]
    assert [node.name for node in nodes] == ["10-0-0-7-8080", "10-0-0-8-8080", "fd00--7-8080"]
    assert not any(node.healthy for node in nodes)


def test_silence_is_no_readiness(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = Node("n", "densenet121.mar", 0, address=f"127.0.0.1:{silent.getsockname()[1]}")
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        health = Answers(node)
        health.look(own=False)
        assert not health.ready
        now += 26
        failures = health.failures
        health.look(own=False)
        assert health.failures == failures + 1 >= CHECKS_THAT_FAIL
