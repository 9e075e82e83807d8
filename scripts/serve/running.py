"""What is known of a server that runs: where it listens, what it serves, which processes it is.

`server.json` in the server's folder remembers it. Several servers live beside one another with a
folder and ports each.
"""

import dataclasses
import shutil
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.state import (
    forget,
    living_process,
    process_of,
    recall,
    started,
    unreadable,
)
from scripts.terminal import UserError

RUN_DIR = Path(".run")
STATE = "server.json"
HOST = "127.0.0.1"


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


def unused_ports(count: int) -> list[int]:
    """So many different ports of loopback that nobody uses yet."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def free_ports() -> Ports:
    """Ports for a server, of which nobody uses one yet."""
    return Ports(*unused_ports(len(dataclasses.fields(Ports))))


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
        grpc: whether it can be reached over gRPC.
        workers: worker processes of each model at the start.
        supervised: whether something starts it again after it stopped, such as systemd.
    """

    pid: int
    started: str
    temporary: str
    ports: Ports
    models: dict[str, str]
    model: str
    grpc: bool = False
    workers: int = 1
    supervised: bool = False

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
    running = last_started(run_dir)
    if running is not None and running.process() is not None:
        return running
    process = process_of(FRONTEND, str(config_of(run_dir)))
    return None if process is None else _recover(process)


# The class that Java is started with.
FRONTEND = "org.pytorch.serve.ModelServer"


def config_of(run_dir: Path) -> Path:
    """The configuration of the server of this folder: by its path a server is recognised."""
    return (run_dir / "config.properties").resolve()


def last_started(run_dir: Path) -> Running | None:
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


def forget_server(running: Running, run_dir: Path) -> None:
    """Removes what a server that has ended left behind; its logs stay."""
    shutil.rmtree(running.temporary, ignore_errors=True)
    forget(run_dir / STATE)


def require_running(run_dir: Path = RUN_DIR) -> Running:
    """The server of this folder; `UserError` where none runs."""
    running = find_running(run_dir)
    if running is None:
        raise UserError("TorchServe is not running. Start it with: make run")
    return running


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


def lives(pid: int, running: Running) -> bool:
    """Whether a living process of that id is the frontend's own, and not another's by now."""
    try:
        process = psutil.Process(pid)
        return process.ppid() == running.pid and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
