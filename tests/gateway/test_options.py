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
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests

from benchmarks.cluster import free_options
from scripts.gateway import commands, config
from scripts.gateway import nodes as cluster
from scripts.gateway import start as starting
from scripts.gateway import upgrade as upgrades
from scripts.gateway import watch as watches
from scripts.gateway.gateway import STATE, Gateway, Node, Options, find_gateway, require_gateway
from scripts.gateway.nginx import change_nodes
from scripts.gateway.start import find_lost, stop_lost
from scripts.gateway.waiting import Attempts, answering, may_be_sent_again
from scripts.gateway.watch import Starts, Watch
from scripts.serve import management
from scripts.serve.management import poll
from scripts.serve.running import Ports, unused_ports
from scripts.state import remember, started
from scripts.terminal import UserError


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
        starting.start(options, [], folder)
    assert not folder.exists()


def test_a_port_that_is_taken_is_refused_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = dataclasses.replace(free_options(), https_port=port)
        with pytest.raises(UserError, match=f"{port}.*already in use.*HTTPS_PORT"):
            starting.check(options, tmp_path)


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
def stub_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that nobody answers for."""
    monkeypatch.setattr(
        config,
        "_upstream",
        lambda node, sockets: {
            "name": node.name,
            "address": f"127.0.0.1:{unused_ports(1)[0]}",
            "authorization": "",
            "socket": f"{sockets}/{node.name}.sock",
        },
    )


@pytest.fixture
def serving(tmp_path: Path, stub_nodes: None) -> Iterator[Gateway]:  # noqa: ARG001
    """Nginx before such a node, with keys."""
    folder = tmp_path / "gateway"
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("alice alices-key-0123456789\n")
    gateway = starting.start(
        free_options(keys=str(keys)), [_node(tmp_path, 1)], folder, watch=False
    )
    yield gateway
    starting.stop(gateway, folder)


def _node(tmp_path: Path, number: int) -> Node:
    return Node(str(tmp_path / f"node-{number}"), "densenet121.mar", 1)


def test_a_gateway_whose_folder_was_removed_is_found_by_what_it_runs(
    serving: Gateway, tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert find_gateway(folder) is None
    with pytest.raises(UserError, match="make gateway-stop"):
        starting.check(free_options(), folder)
    assert find_lost(tmp_path / "other") == []
    lost = find_lost(folder)
    assert [process.pid for process in lost] == [serving.pid]
    stop_lost(lost)
    assert serving.process() is None
    assert find_lost(folder) == []


def test_a_watch_ends_where_its_gateway_does(serving: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "gateway"
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.gateway.watch", "--folder", folder]
    ) as watch:
        socket_path = Path(serving.sockets) / "watch.sock"
        assert poll(socket_path.exists, 30)
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


def test_the_metrics_port_is_looked_at_where_nginx_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = dataclasses.replace(free_options(), host="127.0.0.2", metrics_port=port)
        with pytest.raises(UserError, match=f"{port}.*already in use.*METRICS_PORT"):
            starting.check(options, tmp_path)


@pytest.mark.parametrize("fails", ["remember", "start_watch"])
@pytest.mark.usefixtures("stub_nodes")
def test_a_start_that_fails_late_leaves_nothing_running(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gateway"

    def fail(*_: object) -> None:
        assert find_lost(folder), "nginx runs by then"
        raise OSError("the disk is full")

    monkeypatch.setattr(starting, fails, fail)
    with pytest.raises(OSError, match="the disk is full"):
        starting.start(free_options(), [_node(tmp_path, 1)], folder)
    assert find_lost(folder) == []
    assert find_gateway(folder) is None
    assert not (folder / STATE).exists()


def test_a_mistake_in_the_keys_keeps_the_last_ones_and_every_change_goes_on(
    serving: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, keys = tmp_path / "gateway", Path(serving.options.keys)
    written = folder / "nginx.conf"
    keys.write_text("alice alices key\n")
    change_nodes(lambda nodes: [*nodes, _node(tmp_path, 2)], folder)
    assert "node-2.sock" in written.read_text()
    assert "alices-key-0123456789" in written.read_text()
    assert (folder / STATE).stat().st_mode & 0o077 == 0

    watch = Watch(folder)
    watch.keep()
    watch.keep()
    assert capsys.readouterr().out.count("The keys that were read last still count.") == 1
    monkeypatch.setattr(commands, "require_gateway", lambda: require_gateway(folder))
    commands.status_command()
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "The keys that were read last still count." in shown
    assert "line 1" in shown

    keys.write_text("bob bobs-key-0123456789ab\n")
    change_nodes(tuple, folder)
    assert "bobs-key-0123456789ab" in written.read_text()
    assert "alices-key-0123456789" not in written.read_text()
    commands.status_command()
    assert "still count" not in "".join(capsys.readouterr())


def test_a_worker_that_torchserve_calls_ready_and_that_is_dead_is_not_shown_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = {"status": "READY", "pid": 2**22 + 1}
    model = {
        "workers": [dead, dead],
        "jobQueueStatus": {"pendingRequests": 7},
        "modelVersion": "1.0",
    }
    running = SimpleNamespace(ports=Ports(inference=4321), pid=os.getpid())
    for module in (commands, management):
        monkeypatch.setattr(module, "model_status", lambda *_: model)
    monkeypatch.setattr(commands, "find_running", lambda _: running)
    assert commands._describe(_node(tmp_path, 1))[:5] == ["4321", "serving", "0", "7", "1.0"]


def test_a_node_that_was_drained_just_before_its_tokens_are_renewed_stays_drained(
    serving: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gateway"
    change_nodes(lambda nodes: [*nodes, _node(tmp_path, 2)], folder)
    first = serving.nodes[0].name

    @contextmanager
    def operation(*_: object) -> Iterator[None]:
        """Somebody else had that right until now."""
        change_nodes(
            lambda nodes: [
                dataclasses.replace(node, drained=node.drained or node.name == first)
                for node in nodes
            ],
            folder,
        )
        yield

    renewed: list[object] = []
    monkeypatch.setattr(watches, "operation", operation)
    monkeypatch.setattr(watches, "find_running", lambda _: SimpleNamespace(tokens=True))
    monkeypatch.setattr(watches, "_expires", lambda *_: True)
    monkeypatch.setattr(watches, "renew", renewed.append)
    assert watches.renew_tokens(folder) == ["node-1", "node-2"]
    assert len(renewed) == 2
    assert [node.drained for node in require_gateway(folder).nodes] == [True, False]


class _Upgrade:
    """An upgrade of stub nodes, in which chosen changes of the gateway fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ended = folder, list[str]()
        self._changes = 0
        self._fails: dict[int, str] = {}
        fresh = iter([_node(folder.parent, 2), _node(folder.parent, 3)])
        for name in ("_check_archive", "_check_answers", "_check_service", "_end"):
            monkeypatch.setattr(upgrades, name, lambda *_: None)
        monkeypatch.setattr(upgrades, "keep_release", lambda *_: folder / "densenet121.mar")
        monkeypatch.setattr(upgrades, "start_node", lambda *_: next(fresh))
        monkeypatch.setattr(upgrades, "change_nodes", self._change)
        monkeypatch.setattr(cluster, "stop_nodes", self._stop)

    def _stop(self, nodes: Any) -> None:
        self.ended += [node.name for node in nodes]

    def _change(self, change: Any, folder: Path) -> set[int]:
        self._changes += 1
        when = self._fails.get(self._changes)
        if when != "before":
            old = change_nodes(change, folder)
        if when is not None:
            raise UserError(f"change {self._changes} failed")
        return old

    def run(self, fails: dict[int, str]) -> str:
        """Upgrades; returns what the caller is told."""
        self._fails = fails
        with pytest.raises(UserError) as raised:
            upgrades.upgrade(Path("densenet121.mar"), folder=self.folder)
        return str(raised.value)

    def nodes(self) -> dict[str, bool]:
        """The gateway's nodes, and whether each serves."""
        nodes = require_gateway(self.folder).nodes
        return {node.name: not node.drained for node in nodes}


@pytest.mark.parametrize(
    ("fails", "nodes", "ended"),
    [
        # The first change puts the new node beside the old, the second takes the old one out, and
        # what follows goes back.
        ({1: "before"}, {"node-1": True}, ["node-2"]),
        ({1: "after"}, {"node-1": True}, ["node-2"]),
        ({1: "before", 2: "before"}, {"node-1": True}, ["node-2"]),
        ({2: "before"}, {"node-1": True}, ["node-2"]),
        ({2: "after"}, {"node-1": True}, ["node-2"]),
        # It cannot go back: the new node serves, and is not ended.
        ({1: "after", 2: "before"}, {"node-1": False, "node-2": True}, []),
        ({2: "after", 3: "before"}, {"node-2": True}, []),
    ],
)
@pytest.mark.usefixtures("serving")
def test_an_upgrade_that_fails_wherever_it_may_ends_no_node_that_serves(
    fails: dict[int, str],
    nodes: dict[str, bool],
    ended: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upgrade = _Upgrade(tmp_path / "gateway", monkeypatch)
    assert upgrade.run(fails) == f"change {min(fails)} failed"
    assert upgrade.nodes() == nodes
    assert upgrade.ended == ended


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
        config,
        "_upstream",
        lambda node, sockets: {
            "name": node.name,
            "address": f"127.0.0.1:{ports[node.name]}",
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
            length = self.headers["Inference-Header-Content-Length"]
            self.send_response(200)
            self.send_header("Inference-Header-Content-Length", "34")
            self.end_headers()
            self.wfile.write(f"{self.path} {len(body)} {length}".encode())

    folder = tmp_path / "gateway"
    old, new = (HTTPServer(("127.0.0.1", 0), handler) for handler in (Old, New))
    threads = [threading.Thread(target=server.serve_forever) for server in (old, new)]
    for thread in threads:
        thread.start()
    ports.update({"node-1": old.server_port, "node-2": new.server_port})
    first, second = (Node(str(tmp_path / name), "densenet121.mar", 1) for name in ports)
    gateway = starting.start(free_options(), [first], folder, watch=False)
    nodes = _Nodes("again", "node-1")
    try:
        with (
            answering(Path(gateway.sockets) / "watch.sock", nodes, bytes),
            ThreadPoolExecutor(1) as pool,
        ):
            answer = pool.submit(
                requests.post,
                f"{gateway.url}/predict?topk=2",
                data=bytes(300_000),
                headers={"Inference-Header-Content-Length": "12"},
                timeout=30,
            )
            assert asked.wait(10)
            change_nodes(lambda _: [second], folder)
            old.shutdown()
            ended.set()
            old.server_close()
            assert answer.result().text == "/densenet121/predict?topk=2 300000 12"
            assert answer.result().headers["Inference-Header-Content-Length"] == "34"
    finally:
        ended.set()
        starting.stop(gateway, folder)
        for server in (old, new):
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
