"""A gateway before two real nodes, started once for all tests here."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cluster import free_options
from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, find_gateway
from scripts.gateway.nodes import start_nodes, stop_nodes
from tests.gateway.client import Client

KEYS = {"alice": "alices-key-0123456789", "bob": "bobs-key-0123456789ab"}


@pytest.fixture(scope="session", autouse=True)
def _nginx() -> None:
    if shutil.which("nginx") is None:
        pytest.skip("NOT RUN: nginx is missing (on Debian: apt install nginx)")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gateway's folder; those of the nodes are beside it."""
    return tmp_path_factory.mktemp("gateway-run") / "gateway"


@pytest.fixture(scope="session")
def cluster(archive: Path, folder: Path) -> Iterator[Gateway]:
    """Two nodes of one worker each, behind a gateway with the watch."""
    nodes = start_nodes(2, archive, workers=1, run_dir=folder.parent)
    options = free_options(rate=1000, burst=1000)
    started = starting.start(options, nodes, folder)
    yield started
    last = find_gateway(folder)
    assert last is not None, "nginx ended during the tests"
    starting.stop(last, folder)
    stop_nodes(last.nodes)


@pytest.fixture
def client(cluster: Gateway) -> Client:
    """Asks the gateway."""
    return Client(cluster)


@pytest.fixture
def guarded(cluster: Gateway, tmp_path: Path) -> Iterator[Client]:
    """A second gateway before the same nodes, which asks for keys and has narrow limits."""
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("# clients\n" + "".join(f"{name} {key}\n" for name, key in KEYS.items()))
    options = free_options(keys=str(keys), rate=1, burst=4, connections=2, timeout=5)
    folder = tmp_path / "guarded"
    current = find_gateway(Path(cluster.nodes[0].run_dir).parent / "gateway")
    assert current is not None
    started = starting.start(options, current.nodes, folder, watch=False)
    yield Client(started)
    starting.stop(started, folder)
