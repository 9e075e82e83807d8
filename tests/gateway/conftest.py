"""A gateway in front of two real nodes, started once for all tests here, and a client of it."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.gateway import start as starting
from scripts.gateway.gateway import Gateway, find_gateway, require_gateway
from scripts.gateway.nodes import start_nodes, stop_nodes
from scripts.samples import CAT
from tests.gateway.cluster import TIMEOUT, free_options

KEYS = {"alice": "alices-key-0123456789", "bob": "bobs-key-0123456789ab"}


@dataclass(frozen=True)
class Client:
    """Sends requests to a gateway."""

    gateway: Gateway

    @property
    def folder(self) -> Path:
        """The gateway's, with its logs."""
        return Path(self.gateway.options.certificate).parent

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request over plain HTTP, and follow no redirect."""
        options = {"allow_redirects": False, **options}
        return requests.request(method, self.gateway.url + path, timeout=TIMEOUT, **options)

    def predict(self, key: str | None = None, **headers: str) -> requests.Response:
        """Classify a photograph."""
        headers = {**headers, **({"X-API-Key": key} if key else {})}
        return self.ask("POST", "/predict", data=CAT.read_bytes(), headers=headers)


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
    return Client(cluster)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of clients' keys that only its owner can read."""
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text("# clients\n" + "".join(f"{name} {key}\n" for name, key in KEYS.items()))
    return path


@pytest.fixture
def guarded(cluster: Gateway, folder: Path, keys: Path, tmp_path: Path) -> Iterator[Client]:
    """A second gateway in front of the same nodes, which needs keys and has narrow limits."""
    assert cluster.process() is not None
    options = free_options(keys=str(keys), rate=1, burst=4, connections=2)
    place = tmp_path / "guarded"
    started = starting.start(options, require_gateway(folder).nodes, place, watch=False)
    yield Client(started)
    starting.stop(started, place)
