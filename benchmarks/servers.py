"""Starts and stops this project's server and its peers, on free ports of loopback."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.images import form_body
from benchmarks.load import Body
from benchmarks.peers.common import BATCH, BATCH_DELAY_MS, WORKERS
from scripts.gateway import nginx
from scripts.gateway.options import Options
from scripts.serve.management import wait_until
from scripts.serve.running import HOST, ServerState, free_ports, unused_ports
from scripts.serve.server import start, stop

START_TIMEOUT = 120.0
OURS = "this project"
_BATCHING = f"{WORKERS} workers of 1 thread, batch {BATCH}"


@dataclass
class Server:
    """A running server.

    Attributes:
        name, settings: as the tables show them.
        url: takes images.
        form: the form field that carries an image; None to send it as the request's body.
        root: the first process.
        first_answer: seconds from the start to the first response.
    """

    name: str
    settings: str
    url: str
    form: str | None
    root: psutil.Process
    first_answer: float = 0.0

    def processes(self) -> list[psutil.Process]:
        """Return the whole process tree."""
        return [self.root, *self.root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the CPU time of all running processes."""
        return sum(sum(p.cpu_times()[:2]) for p in self.processes())

    def memory(self) -> tuple[float, float]:
        """Return the PSS in MB of the largest worker and of all processes together."""
        sizes = {p: p.memory_full_info().pss / 1e6 for p in self.processes()}
        return max(size for p, size in sizes.items() if p.name() != "java"), sum(sizes.values())

    def body(self, image: bytes) -> Body:
        """Return a request's body with this image."""
        if self.form is None:
            return Body(image)
        return form_body({self.form: ("image.jpg", image, "image/jpeg")})


@dataclass(frozen=True)
class Peer:
    """The start of another server.

    Attributes:
        settings: as the tables show them.
        command: arguments of `python -m`; `{port}` is a free port.
        path: of the URL that takes images.
        form: see `Server`.
        threads: of PyTorch in each process; None for PyTorch's default.
    """

    settings: str
    command: str
    path: str
    form: str | None
    threads: int | None = 1


_SAME_ENGINE = f"{_BATCHING}, this project's engine"
PEERS = {
    "TorchServe image_classifier": Peer(
        f"{_BATCHING}, delay {BATCH_DELAY_MS} ms, eager PyTorch",
        "benchmarks.peers.torchserve_app {port}",
        "/predictions/stock",
        None,
    ),
    "Flask tutorial": Peer(
        "as in the tutorial: flask run, one thread per request, eager PyTorch",
        "flask --app benchmarks.peers.flask_app:app run --port {port}",
        "/predict",
        "file",
        threads=None,
    ),
    "Flask, gunicorn": Peer(
        f"{WORKERS} sync workers of 1 thread, eager PyTorch",
        f"gunicorn --bind 127.0.0.1:{{port}} --workers {WORKERS} benchmarks.peers.flask_app:app",
        "/predict",
        "file",
    ),
    "mosec": Peer(
        f"{_SAME_ENGINE}, delay {BATCH_DELAY_MS} ms",
        "benchmarks.peers.mosec_app --port {port} --address 127.0.0.1 --timeout 60000 "
        "--log-level warning",
        "/inference",
        None,
    ),
    "LitServe": Peer(
        f"{_SAME_ENGINE}, delay {BATCH_DELAY_MS} ms",
        "benchmarks.peers.litserve_app {port}",
        "/predict",
        "file",
    ),
    "BentoML": Peer(
        f"{_SAME_ENGINE}, adaptive delay",
        "bentoml serve benchmarks.peers.bentoml_app:Classifier --port {port} --host 127.0.0.1",
        "/predict",
        "images",
    ),
}
NAMES = (OURS, *PEERS)


def serve(name: str, work: Path, precision: str = "float32") -> AbstractContextManager[Server]:
    """Start a server, wait for its first response, and stop it afterwards.

    Args:
        name: one of `NAMES`.
        work: holds the files of `benchmarks.peers`, `small.jpg` and the model archive in `store`.
        precision: of this project's engine.

    Raises:
        RuntimeError: it does not respond.
    """
    if name == OURS:
        (archive,) = (work / "store").glob("*.mar")
        return ours(archive, work)
    return _peer(name, work, precision)


@contextmanager
def ours(archive: Path, work: Path, **options: Any) -> Iterator[Server]:
    """Serve an archive as `make start` does, with options of `scripts.serve.server.start`."""
    began, run_dir = time.monotonic(), work / f"run-{time.monotonic_ns()}"
    running = start(archive, free_ports(), run_dir=run_dir, **options)
    try:
        process = running.process()
        assert process is not None
        settings = f"as `make start`: {WORKERS} workers, batch {BATCH}, delay 1 ms"
        server = Server(OURS, settings, running.predictions_url, None, process)
        yield _answered(server, work, began)
    finally:
        stop(running, run_dir)


@contextmanager
def behind_gateway(
    archive: Path, folder: Path, workers: int | None = None
) -> Iterator[tuple[ServerState, Options]]:
    """Serve an archive behind the gateway, without limits of the rate."""
    http, https = unused_ports(2)
    running = start(archive, free_ports(), workers, folder)
    options = Options(
        http_port=http,
        https_port=https,
        model=running.model,
        rate=10_000,
        burst=10_000,
        connections=10_000,
    )
    try:
        nginx.start(options, folder / "gateway")
        try:
            yield running, options
        finally:
            nginx.stop(folder / "gateway")
    finally:
        stop(running, folder)


@contextmanager
def _peer(name: str, work: Path, precision: str) -> Iterator[Server]:
    peer, began, (port,) = PEERS[name], time.monotonic(), unused_ports(1)
    environment = {
        "BENCHMARK_FILES": str(work),
        "BENCHMARK_PRECISION": precision,
        "BENTOML_DO_NOT_TRACK": "true",
    }
    if peer.threads is not None:
        environment["OMP_NUM_THREADS"] = str(peer.threads)
    with (work / "peer.log").open("a") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *peer.command.format(port=port).split()],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://{HOST}:{port}{peer.path}"
        yield _answered(Server(name, peer.settings, url, peer.form, process), work, began)
    finally:
        tree = [*process.children(recursive=True), process] if process.is_running() else []
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        for one in psutil.wait_procs(tree, timeout=10)[1]:
            one.kill()
        process.wait()


def _answered(server: Server, work: Path, began: float) -> Server:
    """Wait for the first successful response to an image."""
    body = server.body((work / "small.jpg").read_bytes())
    headers, problem = {"Content-Type": body.content_type}, ""

    def answers() -> bool:
        nonlocal problem
        try:
            reply = requests.post(server.url, data=body.data, headers=headers, timeout=30)
            problem = f"status {reply.status_code}: {reply.text[:300]}"
            return bool(reply.ok and reply.text.strip())
        except requests.RequestException as error:
            problem = str(error)
        if not server.root.is_running():
            raise RuntimeError(f"{server.name} exited: {problem}")
        return False

    if not wait_until(answers, START_TIMEOUT):
        raise RuntimeError(f"{server.name} does not respond: {problem}")
    server.first_answer = time.monotonic() - began
    return server
