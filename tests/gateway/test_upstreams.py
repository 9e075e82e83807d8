"""Nodes that others start: found by name, known by answers, out while they give none."""

import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from benchmarks.cluster import free_options
from benchmarks.faults import wait_for
from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, Node, Options, find_gateway
from scripts.gateway.keys import read_keys
from scripts.gateway.nodes import drain, replace, undrain
from scripts.gateway.upgrade import upgrade
from scripts.gateway.upstreams import Answers, find_nodes, read_upstreams
from scripts.gateway.watch import CHECKS_THAT_FAIL
from scripts.terminal import UserError


class _Server(ThreadingHTTPServer):
    """Stands for a node: says which one it is, or the status that it is told to."""

    daemon_threads = True
    status = 200
    asked = 0


class _Answer(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._send()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self._send()

    def _send(self) -> None:
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(str(self.server.server_port).encode())

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
def gateway(servers: list[_Server], tmp_path: Path) -> Iterator[Gateway]:
    upstreams = " ".join(f"localhost:{server.server_port}" for server in servers)
    options = dataclasses.replace(free_options(rate=1000, burst=1000), upstreams=upstreams)
    folder = tmp_path / "gateway"
    started = starting.start(options, find_nodes(upstreams, "densenet121"), folder)
    try:
        _healthy(folder, 2)
        yield started
    finally:
        starting.stop(started, folder)


def _nodes(folder: Path) -> tuple[Node, ...]:
    found = find_gateway(folder)
    assert found is not None
    return found.nodes


def _healthy(folder: Path, count: int) -> None:
    wait_for(lambda: sum(node.healthy for node in _nodes(folder)) == count)


def _ask(gateway: Gateway) -> requests.Response:
    return requests.post(f"{gateway.url}/predict", data=b"picture", timeout=60)


def test_a_node_that_ends_costs_nothing_and_comes_back(
    gateway: Gateway, servers: list[_Server], tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    with ThreadPoolExecutor(4) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: _ask(gateway), range(20))} == {
            200
        }
        assert all(server.asked for server in servers)
        gone = servers[0]
        _end(gone)
        answers = list(pool.map(lambda _: _ask(gateway), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text for answer in answers} == {str(servers[1].server_port)}
    _healthy(folder, 1)
    servers[0] = _serve(gone.server_port)
    _healthy(folder, 2)
    wait_for(lambda: _ask(gateway).text == str(gone.server_port))


def test_requests_wait_while_no_node_is_there(gateway: Gateway, servers: list[_Server]) -> None:
    ports = [server.server_port for server in servers]
    for server in servers:
        _end(server)
    ready = f"{gateway.url}/readyz"
    wait_for(lambda: requests.get(ready, timeout=10).status_code == 503)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_ask, gateway)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        servers[:] = [_serve(port) for port in ports]
        assert waiting.result(timeout=60).status_code == 200
    wait_for(lambda: requests.get(ready, timeout=10).status_code == 200)


def test_a_node_that_refuses_work_is_asked_no_more(
    gateway: Gateway, servers: list[_Server], tmp_path: Path
) -> None:
    servers[0].status = 503
    _healthy(tmp_path / "gateway", 1)
    assert {_ask(gateway).text for _ in range(4)} == {str(servers[1].server_port)}
    assert requests.get(f"{gateway.url}/readyz", timeout=10).status_code == 200


def test_others_nodes_can_be_drained_and_are_never_replaced(
    gateway: Gateway, servers: list[_Server], tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    first = gateway.nodes[0]
    drain([first.name], folder)
    (other,) = (s for s in servers if not first.address.endswith(f":{s.server_port}"))
    assert {_ask(gateway).text for _ in range(4)} == {str(other.server_port)}
    drained = [node.name for node in _nodes(folder) if node.drained]
    assert drained == [first.name]
    undrain(first.name, folder)
    with pytest.raises(UserError, match="started by others"):
        replace(first.name, folder)
    archive = tmp_path / "densenet121.mar"
    archive.write_bytes(b"another")
    with pytest.raises(UserError, match="started by others"):
        upgrade(archive, folder=folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no node"),
        ("densenet", "HOST:PORT"),
        ("densenet:0", "HOST:PORT"),
        ("densenet:99999", "HOST:PORT"),
        ("http://densenet:8080", "HOST:PORT"),
        ("a:1 ;evil:2", "HOST:PORT"),
    ],
)
def test_what_is_no_address_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_upstreams(text)


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host == "nobody":
            raise socket.gaierror(-2, "Name or service not known")
        return [
            (socket.AF_INET, 1, 6, "", ("10.0.0.8", port)),
            (socket.AF_INET, 1, 6, "", ("10.0.0.7", port)),
            (socket.AF_INET6, 1, 6, "", ("fd00::7", port, 0, 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    nodes = find_nodes("densenet:8080 nobody:8080", "densenet121")
    assert [node.address for node in nodes] == ["10.0.0.7:8080", "10.0.0.8:8080", "[fd00::7]:8080"]
    assert [node.name for node in nodes] == ["10-0-0-7-8080", "10-0-0-8-8080", "fd00--7-8080"]
    assert not any(node.healthy for node in nodes)
    assert find_nodes("nobody:8080", "densenet121") == []


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


def test_what_a_container_publishes_decides_whether_keys_are_needed(tmp_path: Path) -> None:
    inside = dataclasses.replace(free_options(), host="0.0.0.0", metrics_host="0.0.0.0")
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached by others"):
        starting.check(inside, tmp_path)
    starting.check(dataclasses.replace(inside, published="127.0.0.1"), tmp_path)
    with pytest.raises(UserError, match=r"192\.0\.2\.1 can be reached by others"):
        starting.check(dataclasses.replace(inside, published="192.0.2.1"), tmp_path)
    with pytest.raises(UserError, match="PUBLISHED must be an IP address"):
        starting.check(dataclasses.replace(inside, published="all"), tmp_path)


def test_a_secrets_file_may_be_its_groups_where_root_has_given_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice alices-key-0123456789\n")
    owner = keys.stat().st_uid
    for user, mode, refused in ((owner + 7, 0o440, owner != 0), (owner, 0o440, True)):
        keys.chmod(mode)
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        if refused:
            with pytest.raises(UserError, match="can be read by others"):
                read_keys(keys)
        else:
            assert [key.name for key in read_keys(keys)] == ["alice"]
    keys.chmod(0o444)
    with pytest.raises(UserError, match="can be read by others"):
        read_keys(keys)


def test_the_options_know_how_addresses_are_written() -> None:
    assert Options(metrics_host="::").metrics_address == "[::]"
