"""Starts, stops, scales and watches a TorchServe of this project's own.

All that a running server needs beside the archive is in one folder, `.run`: its effective
configuration, its logs and `server.json`, which says which process it is. Several servers live
beside one another with a folder and ports each.
"""

import base64
import dataclasses
import json
import os
import re
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

import psutil
import requests
import typer
from requests.adapters import HTTPAdapter
from rich.status import Status
from rich.table import Table
from urllib3.util import Retry

from scripts.machine import Plan, plan
from scripts.preflight import (
    check_archives,
    check_ports,
    check_workers,
    java_home,
    why_not_loaded,
)
from scripts.state import (
    forget,
    living_process,
    process_of,
    recall,
    remember,
    started,
    unreadable,
)
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card, sha256
from scripts.terminal import UserError, console, run, step, warn
from scripts.worker_log import NewLines, cause, last_words, says_died

RUN_DIR = Path(".run")
STATE = "server.json"
CONFIG = Path("config.properties")
LOG_CONFIG = Path("log4j2.xml")
METRICS_CONFIG = Path("metrics.yaml")
HOST = "127.0.0.1"
# Where TorchServe's gRPC listens while nobody asked for it, since it cannot be told not to listen:
# a multicast address, from which the kernel never answers a connection, and any free port.
_NOWHERE = "224.0.0.1"

# A grey picture of one pixel, as PNG.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
)

# Seconds. A worker is ready after about 5 s on an idle machine.
START_TIMEOUT = 180.0
SCALE_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0
HTTP_TIMEOUT = 10.0
# TorchServe puts a new worker in the place of one that ended within 2 to 6 s.
_REPLACED_WITHIN = 20.0
# The log comes later than what it tells of.
_LOG_DELAY = 1.0
_POLL = 0.2


@dataclass(frozen=True)
class Ports:
    """Where a server listens, all on loopback; on those of gRPC only if that was asked for."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071

    def used(self, *, grpc: bool) -> dict[str, int]:
        """Those on which it listens."""
        ports = dataclasses.asdict(self)
        return ports if grpc else {use: port for use, port in ports.items() if "grpc" not in use}


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
        grpc: whether it can be reached over gRPC.
    """

    pid: int
    started: str
    temporary: str
    ports: Ports
    models: dict[str, str]
    model: str
    tokens: bool = False
    grpc: bool = False

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
    """The server of this folder, if it runs, even where the folder was removed beneath it.

    Raises:
        UserError: what is remembered of it cannot be read.
    """
    running = _last(run_dir)
    if running is not None and running.process() is not None:
        return running
    process = process_of(_FRONTEND, str(_config_of(run_dir)))
    return None if process is None else _recover(process)


# The class that Java is started with.
_FRONTEND = "org.pytorch.serve.ModelServer"


def _config_of(run_dir: Path) -> Path:
    """The configuration of the server of this folder: by its path a server is recognised."""
    return (run_dir / "config.properties").resolve()


def _last(run_dir: Path) -> Running | None:
    """The server that was started here last, dead or alive."""
    return _read(run_dir / STATE)


def _read(path: Path) -> Running | None:
    values = recall(path)
    if values is None:
        return None
    try:
        return Running(**{**values, "ports": Ports(**values["ports"])})
    except (TypeError, KeyError) as error:
        raise unreadable(path) from error


def _recover(process: psutil.Process) -> Running | None:
    """What a server keeps of itself in its temporary folder, which its command line names."""
    begin = "-Djava.io.tmpdir="
    try:
        said = [word for word in process.cmdline() if word.startswith(begin)]
        kept = _read(Path(said[0].removeprefix(begin)) / STATE) if said else None
        if kept is not None:
            return dataclasses.replace(kept, pid=process.pid, started=started(process.pid))
    except psutil.Error:
        return None  # it has just ended
    raise UserError(
        f"Process {process.pid} is a TorchServe of this folder, and nothing says how to reach it. "
        f"End it with: kill {process.pid}"
    )


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
    grpc: bool = False,
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
        grpc: whether it can be reached over gRPC, by whose streams any client can end all workers.
        config: TorchServe's configuration, to which this start adds what it decides.
        log_config: what is logged.
        beside: more archives of the same folder, each served by workers of its own.

    Raises:
        UserError: a port is taken, Java or the archive cannot be used, the machine is too small, or
            no worker gets ready. Nothing is left running then; the logs are kept.
    """
    ports = ports or Ports()
    archives = [archive, *beside]
    check_start(archives, ports, workers, grpc=grpc)
    chosen = plan(workers, models=len(archives))
    if threads is not None:
        chosen = dataclasses.replace(chosen, threads=threads)
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    dead = _last(run_dir)
    if dead is not None and dead.process() is None:
        _forget(dead, run_dir)
    decided = _decided_at_start(archives, ports, chosen, tokens=tokens, grpc=grpc)
    # The last line of a key counts.
    (run_dir / "config.properties").write_text(config.read_text() + decided)
    # TorchServe names its sockets and its process file after nothing but the temporary folder:
    # two servers must not share one. The path is short, since a socket's must be.
    temporary = tempfile.mkdtemp(prefix="torchserve-")
    models = {archive.stem: sha256(archive) for archive in archives}
    unborn = Running(0, "", temporary, ports, models, archives[0].stem, tokens, grpc)
    model_log = NewLines(logs / "model.log")
    try:
        remember(Path(temporary) / STATE, dataclasses.asdict(unborn))
        running = _launch(unborn, archives[0].parent, chosen, run_dir, log_config)
    except BaseException:
        orphan = process_of(_FRONTEND, str(_config_of(run_dir)))
        if orphan is not None:
            orphan.kill()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        remember(run_dir / STATE, dataclasses.asdict(running))
        _wait_until_ready(running, archives, chosen.workers, logs, model_log)
    except BaseException:
        stop(running, run_dir)
        raise
    return running


def check_start(
    archives: Sequence[Path],
    ports: Ports,
    workers: int | None,
    *,
    grpc: bool = False,
    instead_of: Running | None = None,
) -> None:
    """Checks all that can be known before a start.

    Args:
        archives: what to serve; none of them where that is not known yet.
        ports: where to listen.
        workers: how many for each model.
        grpc: whether gRPC will be reachable.
        instead_of: a server that ends before this one starts.

    Raises:
        UserError: an archive, a port, Java, or the number of workers cannot be used.
    """
    java_home()
    held: list[int] = []
    ending = 0
    if instead_of is not None:
        held = list(instead_of.ports.used(grpc=instead_of.grpc).values())
        ending = len(worker_processes(instead_of))
    check_ports(HOST, ports.used(grpc=grpc), held)
    check_workers(workers, max(1, len(archives)), ending)
    check_archives(archives)


def _decided_at_start(
    archives: Sequence[Path], ports: Ports, chosen: Plan, *, tokens: bool, grpc: bool
) -> str:
    return (
        "\n# --- Decided at start ---\n"
        f"inference_address=http://{HOST}:{ports.inference}\n"
        f"management_address=http://{HOST}:{ports.management}\n"
        f"metrics_address=http://{HOST}:{ports.metrics}\n"
        f"grpc_inference_address={HOST if grpc else _nowhere()}\n"
        f"grpc_inference_port={ports.grpc_inference if grpc else 0}\n"
        f"grpc_management_address={HOST if grpc else _nowhere()}\n"
        f"grpc_management_port={ports.grpc_management if grpc else 0}\n"
        f"model_store={archives[0].parent.resolve()}\n"
        f"load_models={','.join(archive.name for archive in archives)}\n"
        f"default_workers_per_model={chosen.workers}\n"
        f"metrics_config={METRICS_CONFIG.resolve()}\n"
        f"disable_token_authorization={str(not tokens).lower()}\n"
    )


def _nowhere() -> str:
    """Where gRPC cannot be reached; loopback, at a port that nobody is told, where this kernel does
    not let anybody listen there (macOS, gVisor).
    """
    with socket.socket() as probe:
        try:
            probe.bind((_NOWHERE, 0))
        except OSError:
            return HOST
    return _NOWHERE


def _configured(key: str, config: Path) -> str:
    """A key's value in the configuration; the last line of a key counts."""
    values = re.findall(rf"^{key}=(\d+)\s*$", config.read_text(), re.MULTILINE)
    if not values:
        raise UserError(f"{CONFIG} says nothing of {key}; a number of bytes is needed.")
    value: str = values[-1]
    return value


def _launch(
    unborn: Running, model_store: Path, chosen: Plan, run_dir: Path, log_config: Path
) -> Running:
    """Starts Java; gives back `unborn` with the process that it became."""
    logs = run_dir / "logs"
    temporary = unborn.temporary
    environment = {
        **os.environ,
        "JAVA_HOME": java_home(),
        "TMPDIR": temporary,
        "TEMP": temporary,
        "LOG_LOCATION": str(logs.resolve()),
        "METRICS_LOCATION": str(logs.resolve()),
        "OMP_NUM_THREADS": str(chosen.threads),
        "MAX_THREADS": str(chosen.max_threads),
        # The frontend receives bodies outside its heap, in blocks that glibc would keep for later.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        # TorchServe does not tell its workers; the handler keeps its answers below it.
        "TS_MAX_RESPONSE_SIZE": _configured("max_response_size", _config_of(run_dir)),
    }
    # A module path of the user's could put other modules before the archive's own.
    environment.pop("PYTHONPATH", None)
    command = [
        *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
        *("--ts-config", str(_config_of(run_dir))),
        *("--log-config", str(log_config.resolve())),
        *("--model-store", str(model_store.resolve())),
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
        return dataclasses.replace(unborn, pid=pid, started=started(pid))
    except (OSError, ValueError, psutil.NoSuchProcess) as error:
        raise UserError(
            f"TorchServe did not start (exit status {result.returncode}). {last_words(logs)}"
        ) from error


def _wait_until_ready(
    running: Running, archives: Sequence[Path], workers: int, logs: Path, model_log: NewLines
) -> None:
    """Raises `UserError` as soon as a worker ends, which a sound one never does."""
    killed_before = _killed_for_memory()
    seen: set[int] = set()
    with Status("Waiting for TorchServe ...", console=console) as status:

        def check() -> bool:
            if running.process() is None:
                raise UserError(f"TorchServe ended while it started. {last_words(logs)}")
            now = {process.pid for process in worker_processes(running)}
            if seen - now or says_died(model_log.read()):
                reason = _why_it_died(archives, model_log, killed_before)
                raise UserError(
                    f"The archive cannot be loaded: {reason.rstrip('.')}. The worker's log is "
                    f"{logs / 'model.log'}."
                )
            seen.update(now)
            ready = [ready_workers(running.serving(model)) for model in running.models]
            wanted = workers * len(ready)
            status.update(f"Waiting for TorchServe: {sum(ready)} of {wanted} workers ready ...")
            return min(ready) >= workers

        if not _poll(check, START_TIMEOUT):
            raise UserError(
                f"No {workers} workers were ready after {START_TIMEOUT:.0f} s. {last_words(logs)}"
            )


def _why_it_died(archives: Sequence[Path], model_log: NewLines, killed_before: int) -> str:
    _poll(lambda: cause(model_log.read()) is not None, _LOG_DELAY)
    reason = cause(model_log.read())
    if _killed_for_memory() > killed_before:
        return reason or "the kernel killed a process for want of memory; try WORKERS=1"
    if reason is not None and _HANDLER_NOT_IMPORTED not in reason:
        return reason
    # Loading it once more tells more than the log.
    again = (why_not_loaded(archive, 1, METRICS_CONFIG) for archive in archives)
    found = next((why for why in again if why is not None), reason)
    return found or "its worker ended without a word, as when somebody kills it"


# TorchServe looks for a handler of its own where the archive's cannot be imported, and forgets why.
_HANDLER_NOT_IMPORTED = "ts.torch_handler."


def _killed_for_memory() -> int:
    """How many processes the kernel has killed on this machine for want of memory."""
    try:
        counters = Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def worker_processes(running: Running) -> list[psutil.Process]:
    """The living worker processes of all models."""
    frontend = running.process()
    if frontend is None:
        return []
    try:
        return [process for process in frontend.children() if _is_worker(process)]
    except psutil.NoSuchProcess:
        return []


def _is_worker(process: psutil.Process) -> bool:
    """Whether it runs as TorchServe's worker; what has ended has no command line any more."""
    try:
        return any("model_service_worker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _poll(check: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


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

    `/ping` is no help here: it says Healthy while every worker is failing to start. Nor is the
    management API alone, which goes on to call a worker READY that a gRPC stream has ended.
    """
    try:
        workers = model_status(running, timeout)["workers"]
    except (requests.RequestException, OSError, ValueError):
        return 0  # not up, or the file of tokens is not there or not whole yet
    return sum(worker["status"] == "READY" and _lives(worker["pid"], running) for worker in workers)


def _lives(pid: int, running: Running) -> bool:
    """Whether a living process of that id is the frontend's own, and not another's by now."""
    try:
        process = psutil.Process(pid)
        return process.ppid() == running.pid and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def scale(running: Running, workers: int) -> None:
    """Asks for a number of workers, waits until exactly so many are ready, and asks them.

    Raises:
        UserError: TorchServe refuses, the machine is too small, or they are not ready in time.
    """
    check_workers(workers, ending=ready_workers(running))
    with requests.Session() as session:
        # Under load TorchServe now and then answers 500 ConcurrentModificationException.
        again = Retry(total=5, backoff_factor=0.2, status_forcelist=[500], allowed_methods=["PUT"])
        session.mount("http://", HTTPAdapter(max_retries=again))
        try:
            answer = session.put(
                running.model_url,
                params={"min_worker": workers, "max_worker": workers},
                headers=running.authorization("management"),
                timeout=HTTP_TIMEOUT,
            )
        except requests.RequestException as error:
            raise _not_answering(running) from error
    if answer.status_code != HTTPStatus.ACCEPTED:
        raise UserError(f"TorchServe refused to scale: {answer.text.strip()[:300]}")
    with Status(f"Scaling to {workers} workers ...", console=console):
        if not _poll(lambda: _settled(running, workers), SCALE_TIMEOUT):
            raise UserError(f"No {workers} workers were ready after {SCALE_TIMEOUT:.0f} s.")
        if not _poll(lambda: ready_workers(running) == workers, _REPLACED_WITHIN):
            raise UserError(
                f"TorchServe counts {workers} worker(s), of which {ready_workers(running)} "
                f"live, and it puts none in the others' place. {_AFRESH}"
            )
        if not _poll(lambda: _answers(running), SCALE_TIMEOUT):
            raise UserError(f"{workers} worker(s) are alive, but none answers. {_AFRESH}")


_AFRESH = "Start it afresh: make stop, then make run or make start."


def _settled(running: Running, workers: int) -> bool:
    """Whether TorchServe counts so many workers as ready, and no other."""
    try:
        states = [worker["status"] for worker in model_status(running)["workers"]]
    except requests.RequestException:
        return False  # busy; it is asked again
    return states == ["READY"] * workers


def _answers(running: Running) -> bool:
    """Whether a picture gets an answer; 503 is a full queue."""
    try:
        return requests.post(
            running.predictions_url,
            data=PIXEL,
            headers={"Content-Type": "image/png", **running.authorization("inference")},
            timeout=HTTP_TIMEOUT,
        ).ok
    except requests.RequestException:
        return False


def _not_answering(running: Running) -> UserError:
    return UserError(f"TorchServe runs (pid {running.pid}), but does not answer.")


def stop(running: Running, run_dir: Path = RUN_DIR) -> None:
    """Ends the server and its workers. TorchServe cuts what is in flight."""
    frontend = running.process()
    if frontend is not None:
        try:
            processes = [*frontend.children(recursive=True), frontend]
            frontend.terminate()
        except psutil.NoSuchProcess:
            processes = []  # it has just ended
        _, left = psutil.wait_procs(processes, timeout=STOP_TIMEOUT)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT)
    _forget(running, run_dir)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes.")]
Grpc = Annotated[bool, typer.Option(help="Reachable over gRPC too, whose streams end workers.")]


@app.command("start")
def start_command(
    models: Annotated[str, typer.Option(help="Names of archives.")] = DEFAULT_ARCHITECTURE,
    workers: Workers = None,
    model_store: Annotated[Path, typer.Option(help="Folder with the archive.")] = MODEL_STORE,
    port: int = Ports.inference,
    management_port: int = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc: Grpc = False,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
) -> None:
    """Serves archives in the background; refuses one without trained weights."""
    if find_running() is not None:
        raise UserError("TorchServe is running already. Stop it with: make stop")
    archives = [model_store / f"{name}.mar" for name in models.replace(",", " ").split()]
    if not archives:
        raise UserError("MODELS names no model.")
    for archive in archives:
        _check_trained(archive)
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    began = start(archives[0], ports, workers, grpc=grpc, beside=archives[1:])
    for model in began.models:
        step(f"TorchServe: serving on {began.serving(model).predictions_url}")


def _check_trained(archive: Path) -> None:
    if not archive.is_file():
        others = sorted(path.stem for path in archive.parent.glob("*.mar"))
        raise UserError(
            f"There is no archive {archive}. Build it with make archive, and ARCH or NAME where it "
            f"is not {DEFAULT_ARCHITECTURE}."
            + (f" There are archives of: {', '.join(others)}." if others else "")
        )
    check_archives([archive])
    card = read_card(archive)
    if card is not None and not card.trained:
        raise UserError(
            f"{archive} holds untrained random weights. Build it with trained ones: make archive, "
            "or make archive WEIGHTS=path/to/weights.pth"
        )


@app.command("stop")
def stop_command() -> None:
    """Stops the server, and clears what a dead one left behind."""
    running = find_running()
    dead = None if running is not None else _last(RUN_DIR)
    if running is not None:
        with Status("Stopping TorchServe ...", console=console):
            stop(running)
        step("TorchServe: stopped")
    elif dead is not None:
        _forget(dead, RUN_DIR)
        step("TorchServe: had ended already; what it left is cleared")
    else:
        step("TorchServe: not running")


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
        raise _not_answering(running) from error
    for model in models:
        _show_workers(model, running)
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
    dead = sum(_ended(worker, running) for model in models for worker in model["workers"])
    if dead:
        warn(
            f"{dead} worker(s) that TorchServe counts as ready have ended. If it puts no others in "
            f"their place within {_REPLACED_WITHIN:.0f} s, it will not. {_AFRESH}"
        )


def _show_workers(model: dict[str, Any], running: Running) -> None:
    table = Table(title=f"{model['modelName']} {model['modelVersion']}")
    for heading in ("worker", "pid", "status", "memory"):
        table.add_column(heading)
    for worker in model["workers"]:
        state = "ended" if _ended(worker, running) else worker["status"]
        table.add_row(worker["id"], str(worker["pid"]), state, _memory(worker["pid"]))
    console.print(table)


def _ended(worker: dict[str, Any], running: Running) -> bool:
    """Whether TorchServe calls a worker ready whose process is gone."""
    return worker["status"] == "READY" and not _lives(worker["pid"], running)


def _memory(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).memory_info().rss / 1e6:.0f} MB"
    except psutil.Error:
        return "-"


if __name__ == "__main__":
    run(app)
