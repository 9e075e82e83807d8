"""A gateway in front of the shared server, started once for all tests here."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.serve.running import ServerState
from tests.gateway.cluster import Gateway, gateway, in_front_of

KEYS = {"alice": "alices-key-0123456789", "bob": "bobs-key-0123456789ab"}


@pytest.fixture(scope="session", autouse=True)
def _nginx() -> None:
    if shutil.which("nginx") is None:
        pytest.skip("NOT RUN: nginx is missing (on Debian: apt install nginx)")


@pytest.fixture(scope="session")
def client(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway without API keys, in a folder whose path has a space."""
    folder = tmp_path_factory.mktemp("gateway") / "a folder" / "gateway"
    with gateway(in_front_of(running), folder) as started:
        yield started


def write_keys(folder: Path, keys: dict[str, str]) -> Path:
    """Write a file of API keys that only its owner can read."""
    path = folder / "keys"
    path.touch(mode=0o600)
    path.write_text("# clients\n" + "".join(f"{name} {key}\n" for name, key in keys.items()))
    return path


@pytest.fixture(scope="module")
def keyed(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that requires API keys and has high limits."""
    folder = tmp_path_factory.mktemp("keyed")
    options = in_front_of(running, keys=str(write_keys(folder, KEYS)))
    with gateway(options, folder / "gateway") as started:
        yield started


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path, KEYS)


@pytest.fixture
def guarded(running: ServerState, keys: Path, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that requires API keys and has low limits."""
    options = in_front_of(running, keys=str(keys), rate=1, burst=4, connections=2)
    with gateway(options, tmp_path / "guarded" / "gateway") as started:
        yield started
