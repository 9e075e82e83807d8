"""The state of a running server: its ports, models and processes.

It is stored in `server.json` in the server's folder. Several servers can run at the same time, each
with its own folder and ports.
"""

import dataclasses
import shutil
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil

from scripts.state import delete_state, process_by_arguments, read_state, unreadable_state
from scripts.terminal import UserError

RUN_DIR = Path(".run")
STATE = "server.json"
HOST = "127.0.0.1"
RESTART_HINT = "Restart it: make stop, then make run or make start."
# Name of the socket, and of a link to it in the server's folder: the path of a socket may have at
# most 107 bytes.
MANAGEMENT_SOCKET = "management.sock"
# TorchServe's Netty does not support Unix sockets on Macs with Apple silicon.
_MANAGEMENT_PORT = None if sys.platform == "linux" else 8081
# Main class of TorchServe's frontend.
FRONTEND = "org.pytorch.serve.ModelServer"
# Java's option for the server's temporary folder, whose name is unique: it identifies the frontend.
_FOLDER_OPTION = "-Djava.io.tmpdir="


@dataclass(frozen=True)
class Ports:
    """The ports of a server, all on loopback; the gRPC ports are used only if gRPC is on.

    If `management` is None, the management API listens at a Unix socket. A port could be reached by
    all users of the machine and by web pages in their browsers (DNS rebinding), because TorchServe
    accepts any `Host` header.
    """

    inference: int = 8080
    management: int | None = _MANAGEMENT_PORT
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071

    def used(self, *, grpc: bool) -> dict[str, int]:
        """Return the ports on which the server listens, by use."""
        return {
            use: port
            for use, port in dataclasses.asdict(self).items()
            if port is not None and (grpc or "grpc" not in use)
        }


def unused_ports(count: int) -> list[int]:
    """Return `count` different free ports on loopback."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def free_ports() -> Ports:
    """Return free ports for a server."""
    inference, management, *others = unused_ports(len(dataclasses.fields(Ports)))
    return Ports(inference, None if Ports.management is None else management, *others)


@dataclass(frozen=True)
class ServerState:
    """The state of a running server, as stored in `server.json`.

    Attributes:
        pid: the frontend's process id.
        temporary: the server's folder for sockets and unpacked model archives.
        ports: where it listens.
        models: SHA-256 of each served model archive, by model name.
        model: the default model.
        grpc: whether it can be reached over gRPC.
        workers: worker processes per model at the start.
        supervised: whether a supervisor, such as systemd, restarts it after it stops.
    """

    pid: int
    temporary: str
    ports: Ports
    models: dict[str, str]
    model: str
    grpc: bool = False
    workers: int = 1
    supervised: bool = False

    def serving(self, model: str) -> "ServerState":
        """Return this state with another of its models as the default.

        Raises:
            UserError: the server does not serve that model.
        """
        if model not in self.models:
            raise UserError(
                f"The server does not serve {model!r}. It serves: {', '.join(self.models)}."
            )
        return dataclasses.replace(self, model=model)

    @property
    def archive_sha256(self) -> str:
        """Return the SHA-256 of the default model's archive."""
        return self.models[self.model]

    @property
    def predictions_url(self) -> str:
        """Return the URL to which images are sent."""
        return f"http://{HOST}:{self.ports.inference}/predictions/{self.model}"

    @property
    def model_url(self) -> str:
        """Return the model's URL in the management API, for `management_session`."""
        if self.ports.management is None:
            return f"http+unix://{quote(str(self.management_socket), safe='')}/models/{self.model}"
        return f"http://{HOST}:{self.ports.management}/models/{self.model}"

    @property
    def management_socket(self) -> Path:
        """Return the path of the management API's Unix socket."""
        return Path(self.temporary) / MANAGEMENT_SOCKET

    @property
    def metrics_url(self) -> str:
        """Return the URL of the Prometheus metrics."""
        return f"http://{HOST}:{self.ports.metrics}/metrics"

    def process(self) -> psutil.Process | None:
        """Return the frontend's process; None if it has exited."""
        try:
            process = psutil.Process(self.pid)
            # Another process may have got the id.
            return process if _FOLDER_OPTION + self.temporary in process.cmdline() else None
        except psutil.Error:
            return None

    def lost_files(self) -> str | None:
        """Return a message if the server's temporary files were deleted; None if they exist.

        Programs that delete unused files delete the state file first, since nothing accesses it.
        """
        if Path(self.temporary, STATE).is_file():
            return None
        return (
            f"TorchServe's files in {self.temporary} were deleted: a worker that crashes cannot be "
            f"replaced. {RESTART_HINT}"
        )


def find_running(run_dir: Path = RUN_DIR) -> ServerState | None:
    """Return the running server of this folder, even if the folder was deleted; None if none runs.

    Raises:
        UserError: its state file cannot be read.
    """
    running = read_server_state(run_dir)
    if running is not None and running.process() is not None:
        return running
    process = process_by_arguments(FRONTEND, str(config_path(run_dir)))
    return None if process is None else _recover_state(process)


def config_path(run_dir: Path) -> Path:
    """Return the path of a server's configuration, which identifies its process."""
    return (run_dir / "config.properties").resolve()


def read_server_state(folder: Path) -> ServerState | None:
    """Return the state of the folder's last server, running or not; None if there was none."""
    path = folder / STATE
    values = read_state(path)
    if values is None:
        return None
    try:
        return ServerState(**{**values, "ports": Ports(**values["ports"])})
    except (TypeError, KeyError) as error:
        raise unreadable_state(path) from error


def _recover_state(process: psutil.Process) -> ServerState | None:
    """Return the copy of the state in the server's temporary folder; None if it has just exited.

    Raises:
        UserError: there is no copy.
    """
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return None
    folders = [a.removeprefix(_FOLDER_OPTION) for a in arguments if a.startswith(_FOLDER_OPTION)]
    state = read_server_state(Path(folders[0])) if folders else None
    if state is None:
        raise UserError(
            f"Process {process.pid} is a TorchServe of this folder whose state file is gone. Stop "
            f"it with: kill {process.pid}"
        )
    return dataclasses.replace(state, pid=process.pid)


def delete_server_files(running: ServerState, run_dir: Path) -> None:
    """Delete the temporary and state files of a server that has stopped; its logs stay."""
    shutil.rmtree(running.temporary, ignore_errors=True)
    delete_state(run_dir / STATE)
    (run_dir / MANAGEMENT_SOCKET).unlink(missing_ok=True)


def require_running(run_dir: Path = RUN_DIR) -> ServerState:
    """Return the running server of this folder.

    Raises:
        UserError: none is running.
    """
    running = find_running(run_dir)
    if running is None:
        raise UserError("TorchServe is not running. Start it with: make run")
    return running


def worker_processes(running: ServerState) -> list[psutil.Process]:
    """Return the running worker processes of all models."""
    frontend = running.process()
    if frontend is None:
        return []
    try:
        return [process for process in frontend.children() if _is_worker(process)]
    except psutil.NoSuchProcess:
        return []


def _is_worker(process: psutil.Process) -> bool:
    """Return whether a process is TorchServe's worker; a zombie has no command line."""
    try:
        return any("model_service_worker" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def is_worker_alive(pid: int, running: ServerState) -> bool:
    """Return whether a process is running and the frontend's child: its id may have been reused."""
    try:
        process = psutil.Process(pid)
        return process.ppid() == running.pid and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
