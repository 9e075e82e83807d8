"""The workers of the shared server, and the stubs of its gRPC client."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.serve.management import model_status, scale
from scripts.serve.running import ServerState


@pytest.fixture
def worker_pids(running: ServerState) -> Callable[[], set[int]]:
    """A function that returns the process ids of the workers."""
    return lambda: {worker["pid"] for worker in model_status(running)["workers"]}


@pytest.fixture
def one_worker(running: ServerState) -> Iterator[psutil.Process]:
    """The only worker: the server is scaled down for one test."""
    scale(running, 1)
    yield psutil.Process(model_status(running)["workers"][0]["pid"])
    scale(running, 2)


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The gRPC modules, generated as a user generates them."""
    folder = tmp_path_factory.mktemp("grpc")
    proto = Path(__file__).with_name("inference.proto")
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{proto.parent}"),
            *(f"--python_out={folder}", f"--grpc_python_out={folder}", str(proto)),
        ],
        check=True,
    )
    sys.path.insert(0, str(folder))
    return importlib.import_module("inference_pb2"), importlib.import_module("inference_pb2_grpc")
