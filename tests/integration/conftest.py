"""The shared server, looked at and changed more closely."""

from collections.abc import Callable, Iterator

import psutil
import pytest

from scripts.serve.management import model_status, scale
from scripts.serve.running import Running


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
