"""A real TorchServe on free ports, with a real archive, started once for all tests here."""

import dataclasses
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from scripts.server import Ports, Running, model_status, scale, start, stop


def free_ports() -> Ports:
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in dataclasses.fields(Ports)]
    numbers = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return Ports(*numbers)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder, with its logs."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def running(archive: Path, run_dir: Path) -> Iterator[Running]:
    """The server that the tests share. It must survive them all."""
    server = start(archive, free_ports(), workers=2, run_dir=run_dir)
    yield server
    survived = server.process() is not None
    stop(server, run_dir)
    assert survived, f"TorchServe ended during the tests; see {run_dir}"


@pytest.fixture
def worker_pids(running: Running) -> Callable[[], set[int]]:
    """Asks which processes serve; a worker that was replaced has another."""
    return lambda: {worker["pid"] for worker in model_status(running)["workers"]}


@pytest.fixture
def one_worker(running: Running) -> Iterator[psutil.Process]:
    """The server with a single worker for the time of a test."""
    scale(running, 1)
    yield psutil.Process(model_status(running)["workers"][0]["pid"])
    scale(running, 2)
