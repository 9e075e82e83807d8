"""What is checked before a gateway starts, and what is known of one that did; without any node."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.gateway import commands
from scripts.gateway import nodes as cluster
from scripts.gateway import start as starting
from scripts.gateway import upgrade as upgrades
from scripts.gateway import watch as watches
from scripts.gateway.gateway import STATE, Gateway, Node, Options, find_gateway, require_gateway
from scripts.gateway.nginx import change_nodes
from scripts.gateway.nodes import drain
from scripts.gateway.start import find_lost, stop_lost
from scripts.gateway.waiting import Attempts, may_be_sent_again
from scripts.gateway.watch import Starts, Watch
from scripts.serve.management import poll
from scripts.serve.running import unused_ports
from scripts.state import remember, started
from scripts.terminal import UserError
from tests.gateway.cluster import free_options
from tests.gateway.conftest import KEYS

EVERYWHERE = {"host": "0.0.0.0", "metrics_host": "0.0.0.0"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"http_port": 0}, "HTTP_PORT must be 1 to 65535, got 0"),
        ({"https_port": 99999}, "HTTPS_PORT must be 1 to 65535, got 99999"),
        ({"metrics_port": -1}, "METRICS_PORT must be 1 to 65535, got -1"),
        ({"https_port": 5000, "http_port": 5000}, "HTTP_PORT and HTTPS_PORT are both 5000"),
        ({"rate": 0}, "RATE must be 1 or more, got 0"),
        ({"burst": -3}, "BURST must be 1 or more, got -3"),
        ({"connections": 0}, "CONNECTIONS must be 1 or more, got 0"),
        ({"host": "localhost"}, "HOST must be an IP address"),
        ({"host": "192.0.2.1"}, r"192\.0\.2\.1 can be reached by others, and nobody would need a"),
        (EVERYWHERE, r"0\.0\.0\.0 can be reached by others"),
        ({**EVERYWHERE, "published": "192.0.2.1"}, r"192\.0\.2\.1 can be reached by others"),
        ({**EVERYWHERE, "published": "all"}, "PUBLISHED must be an IP address"),
        ({"host": "192.0.2.1", "keys": "keys"}, "keys cannot be read"),
        ({"certificate": "a.pem"}, "belong together"),
        ({"certificate": "a.pem", "certificate_key": "a.key"}, "a.pem is not a file"),
        ({"certificate": __file__, "certificate_key": __file__}, "no certificate and its private"),
    ],
)
def test_a_wrong_option_is_rejected_before_anything_starts(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gateway"
    with pytest.raises(UserError, match=message):
        starting.start(dataclasses.replace(free_options(), **wrong), [], folder)
    assert not folder.exists()


def test_a_container_whose_ports_are_published_on_loopback_needs_no_keys(tmp_path: Path) -> None:
    starting.check(free_options(published="127.0.0.1", **EVERYWHERE), tmp_path)


@pytest.mark.parametrize(
    ("name", "host"), [("https_port", "127.0.0.1"), ("metrics_port", "127.0.0.2")]
)
def test_a_port_in_use_is_rejected_with_its_owner(name: str, host: str, tmp_path: Path) -> None:
    """The metrics are on an address of their own."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = dataclasses.replace(free_options(), host=host, **{name: port})
        with pytest.raises(UserError, match=f"{port}.*already in use.*{name.upper()}"):
            starting.check(options, tmp_path)


def test_ipv6_addresses_are_written_in_brackets() -> None:
    assert Options(metrics_host="::").metrics_address == "[::]"


def test_a_state_that_cannot_be_read_is_reported_and_stays(tmp_path: Path) -> None:
    pid, when = os.getpid(), started(os.getpid())
    gateway = Gateway(pid, when, "/x", Options(), (), "secret", pid, when)
    path = tmp_path / STATE
    remember(path, dataclasses.asdict(gateway))
    assert find_gateway(tmp_path) == gateway
    for text in ('{"pid": 1}', path.read_text().replace("secret", "secrets", 1)):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot be understood"):
            find_gateway(tmp_path)
        assert path.read_text() == text
    # Other processes that have its ids by now are neither nginx nor the watch.
    reused = dataclasses.replace(gateway, started="long ago", watch_started="long ago")
    remember(path, dataclasses.asdict(reused))
    assert find_gateway(tmp_path) is None
    assert reused.watch() is None
    assert path.exists()


def _node(name: str) -> Node:
    """A node that does not answer."""
    return Node(name, "densenet121.mar", 1, address=f"127.0.0.1:{unused_ports(1)[0]}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "gateway"


@pytest.fixture
def serving(folder: Path, keys: Path) -> Iterator[Gateway]:
    """Nginx in front of such a node, with keys."""
    gateway = starting.start(free_options(keys=str(keys)), [_node("first")], folder, watch=False)
    yield gateway
    starting.stop(gateway, folder)


def test_a_gateway_whose_folder_was_removed_is_found_by_its_processes(
    serving: Gateway, folder: Path, tmp_path: Path
) -> None:
    shutil.rmtree(folder)
    assert find_gateway(folder) is None
    with pytest.raises(UserError, match="make gateway-stop"):
        starting.check(free_options(), folder)
    assert find_lost(tmp_path / "other") == []
    lost = find_lost(folder)
    assert [process.pid for process in lost] == [serving.pid]
    stop_lost(lost)
    assert serving.process() is None
    assert find_lost(folder) == []


def test_the_watch_ends_with_its_gateway(serving: Gateway, folder: Path) -> None:
    command = [sys.executable, "-m", "scripts.gateway.watch", "--folder", str(folder)]
    with subprocess.Popen(command) as watch:
        assert poll((Path(serving.sockets) / "watch.sock").exists, 30)
        process = serving.process()
        assert process is not None
        process.send_signal(signal.SIGQUIT)
        assert watch.wait(timeout=20) == 0


@pytest.mark.parametrize("fails", ["remember", "start_watch"])
def test_a_start_that_fails_late_leaves_nothing_running(
    fails: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert find_lost(folder), "nginx runs by then"
        raise OSError("the disk is full")

    monkeypatch.setattr(starting, fails, fail)
    with pytest.raises(OSError, match="the disk is full"):
        starting.start(free_options(), [_node("first")], folder)
    assert find_lost(folder) == []
    assert not (folder / STATE).exists()


def test_after_a_mistake_in_the_keys_the_last_ones_count_and_nodes_can_still_be_changed(
    serving: Gateway,
    folder: Path,
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shown() -> str:
        return " ".join("".join(capsys.readouterr()).split())

    assert serving.process() is not None
    written = folder / "nginx.conf"
    keys.write_text("alice alices key\n")
    change_nodes(lambda nodes: [*nodes, _node("second")], folder)
    assert "second" in written.read_text()
    assert KEYS["alice"] in written.read_text()
    assert (folder / STATE).stat().st_mode & 0o077 == 0

    watch = Watch(folder)
    watch.keep()
    watch.keep()
    assert shown().count("The keys that were read last still count.") == 1
    monkeypatch.setattr(commands, "require_gateway", lambda: require_gateway(folder))
    commands.status_command()
    status = shown()
    assert "The keys that were read last still count." in status
    assert "line 1" in status

    keys.write_text("carol carols-key-0123456789\n")
    change_nodes(tuple, folder)
    assert "carols-key-0123456789" in written.read_text()
    assert KEYS["alice"] not in written.read_text()
    commands.status_command()
    assert "still count" not in shown()


def test_one_change_of_nodes_at_a_time_and_a_killed_process_holds_up_no_other(
    serving: Gateway, folder: Path
) -> None:
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from scripts.gateway.gateway import operation\n"
        "with operation('make upgrade to new.mar', Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = rf"make upgrade to new.mar \(process {holder.pid}\) changes which nodes serve"
        with pytest.raises(UserError, match=message):
            drain(["first"], folder)
        with pytest.raises(UserError, match=message):
            commands.refuse_during_an_operation(serving, folder)
        holder.kill()
    with pytest.raises(UserError, match="No node would be left"):
        drain(["first"], folder)
    assert [node.drained for node in require_gateway(folder).nodes] == [False]


def test_a_drained_node_whose_tokens_are_renewed_stays_drained(
    serving: Gateway, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = dataclasses.replace(serving.nodes[0], drained=True), _node("second")

    @contextmanager
    def operation(*_: object) -> Iterator[None]:
        """Somebody else had that right until now, and drained it."""
        change_nodes(lambda _: [first, second], folder)
        yield

    monkeypatch.setattr(watches, "operation", operation)
    monkeypatch.setattr(watches, "find_running", lambda _: SimpleNamespace(tokens=True))
    monkeypatch.setattr(watches, "_expires", lambda *_: True)
    monkeypatch.setattr(watches, "renew", lambda _: None)
    assert watches.renew_tokens(folder) == ["first"]
    assert [node.drained for node in require_gateway(folder).nodes] == [True, False]


@pytest.mark.parametrize(
    ("goes_back", "nodes", "stopped"),
    [
        (True, {"first": True}, ["new-1", "new-2"]),
        # The new nodes serve, and are not stopped.
        (False, {"first": False, "new-1": True, "new-2": True}, []),
    ],
)
@pytest.mark.usefixtures("serving")
def test_an_upgrade_that_fails_stops_no_node_that_serves_and_undoes_no_change_of_others(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: dict[str, bool],
    stopped: list[str],
    *,
    goes_back: bool,
) -> None:
    change_nodes(lambda nodes: [*nodes, _node("second")], folder)
    fresh, ended = iter([_node("new-1"), _node("new-2")]), list[str]()

    def fail(*_: object) -> None:
        raise UserError("failed")

    def check(*_: object) -> None:
        change_nodes(lambda nodes: [node for node in nodes if node.name != "second"], folder)
        if not goes_back:
            monkeypatch.setattr(upgrades, "change_nodes", fail)
        fail()

    for name in ("require_own", "_check_archive", "_check_answers"):
        monkeypatch.setattr(upgrades, name, lambda *_: None)
    monkeypatch.setattr(upgrades, "_check_service", check)
    monkeypatch.setattr(upgrades, "keep_release", lambda *_: folder / "densenet121.mar")
    monkeypatch.setattr(upgrades, "start_node", lambda *_: next(fresh))
    monkeypatch.setattr(cluster, "stop_nodes", lambda nodes: ended.extend(n.name for n in nodes))
    with pytest.raises(UserError, match="failed"):
        upgrades.upgrade(Path("densenet121.mar"), folder=folder)
    assert {node.name: not node.drained for node in require_gateway(folder).nodes} == nodes
    assert ended == stopped


TRIED = "unix:/tmp/b/node-1.sock, unix:/tmp/b/node-2.sock"
HELD = " : unix:/tmp/b/watch.sock : unix:/tmp/b/again.sock"


@pytest.mark.parametrize(
    ("verdict", "attempts", "again"),
    [
        # Its worker was ended while it worked at this request or one beside it.
        ("no", Attempts(TRIED, "500", "25.1"), False),
        # Its worker was ended because it hung: once more, and no further.
        ("once", Attempts(TRIED, "500", "8.2"), True),
        ("once", Attempts(TRIED + HELD, "500 : 200 : 500", "8.2 : 0.5 : 8.1", TRIED), False),
        # Whatever the request does to workers, it does to six at most, and for a minute.
        ("again", Attempts(TRIED + HELD, "500, 500, 500, 500, 500, 500", "0.1", TRIED), False),
        ("again", Attempts(TRIED + 4 * HELD, "503", "0.1", TRIED), False),
        # TorchServe gave up a worker that was silent for a minute, or a new one half of that.
        ("again", Attempts(TRIED, "503, 500", "0.1, 26.0"), False),
        # The frontend was what took long, or the watch was, which waited for a node.
        ("again", Attempts(TRIED, "503, 500", "30.0, 0.1"), True),
        ("again", Attempts(TRIED + HELD, "503 : 200 : 500", "0 : 40.1 : 0.1", TRIED), True),
        # No node is ready in time.
        ("unready", Attempts(TRIED, "503", "59.9"), False),
    ],
)
def test_what_may_be_sent_again(verdict: str, attempts: Attempts, *, again: bool) -> None:
    def verdict_of(node: str) -> Any:
        assert node.endswith("/node-2.sock")
        return "again" if verdict == "unready" else verdict

    nodes: Any = SimpleNamespace(ready=lambda: verdict != "unready", verdict=verdict_of)
    assert may_be_sent_again(nodes, attempts) is again


def test_a_node_that_dies_again_and_again_is_started_after_pauses_that_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 10_000.0)
    starts, pauses = Starts(), list[float]()
    assert starts.due()
    for _ in range(8):
        starts.count()
        starts.over()
        assert not starts.due()
        pauses.append(starts.pause)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]
    monkeypatch.setattr(time, "monotonic", lambda: 13_600.0)
    assert starts.due()
    starts.count()
    assert starts.pause == 5
