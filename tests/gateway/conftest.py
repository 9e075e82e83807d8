"""Gateways in front of the shared server, each started once for all tests here."""

import shutil
from collections.abc import Iterator

import pytest

from scripts.gateway.options import Options
from scripts.serve.running import ServerState
from tests.gateway.cluster import Gateway, gateway, in_front_of, write_keys

KEYS = {
    name: f"{name}s-key-0123456789" for name in ("alice", "bob", "carol", "dave", "erin", "frank")
}


@pytest.fixture(scope="session", autouse=True)
def _nginx() -> None:
    if shutil.which("nginx") is None:
        pytest.skip("NOT RUN: nginx is missing (on Debian: apt install nginx)")


@pytest.fixture(scope="session")
def client(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway without API keys, in a folder whose path has a space; it trusts no proxy here."""
    folder = tmp_path_factory.mktemp("gateway") / "a folder" / "gateway"
    with gateway(in_front_of(running, proxies="192.0.2.0/24"), folder) as started:
        yield started


@pytest.fixture(scope="session")
def keyed(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway on loopback that requires API keys."""
    folder = tmp_path_factory.mktemp("keyed")
    options = in_front_of(running, keys=write_keys(folder, KEYS))
    with gateway(options, folder / "gateway") as started:
        yield started


@pytest.fixture(scope="session")
def public(running: ServerState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A public gateway with low limits below a path, which trusts a load balancer on loopback.

    It listens on loopback, which the patched options treat as a public address.
    """
    folder = tmp_path_factory.mktemp("public")
    for path in (folder, folder / "acme"):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    options = in_front_of(
        running,
        keys=write_keys(folder, KEYS),
        proxies="127.0.0.1",
        prefix="/classify",
        acme=str(folder / "acme"),
        keepalive=620,
        rate=1,
        burst=4,
        connections=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "is_loopback", False)
        started = gateway(options, folder / "gateway")
        with started as public:
            patch.undo()
            yield public
