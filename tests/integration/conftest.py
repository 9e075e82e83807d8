"""The only worker of the shared server."""

from collections.abc import Iterator

import psutil
import pytest

from scripts.serve.management import scale
from scripts.serve.running import ServerState
from tests.served import worker_pids


@pytest.fixture
def one_worker(running: ServerState) -> Iterator[psutil.Process]:
    """The only worker: the server is scaled down for one test."""
    scale(running, 1)
    (pid,) = worker_pids(running)
    yield psutil.Process(pid)
    scale(running, 2)
