"""Start Ray on this machine, or connect to an existing Ray cluster."""

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ray sends usage statistics unless this is set before its import.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's messages are in its log files; this program prints the errors that a user can fix.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import psutil
import ray
import ray.data
from ray._private import ray_constants

import batch
import classification_client
from scripts.terminal import step

# Timeout for connecting to a cluster's head, and for Ray's processes to exit.
_SECONDS = 10
# Paths of Unix sockets are limited to 107 bytes, of which Ray uses 76.
_MAX_FOLDER_BYTES = 30

for name in ("ray", "ray.data"):
    logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster for the duration of the context, and send this code to its nodes.

    Args:
        address: the cluster head's address, such as 10.0.0.1:6379, or "auto" on one of its nodes.

    Raises:
        ConnectionError: nothing listens at the address.
    """
    _check_reachable(address)
    packages = [
        str(Path(str(package.__file__)).parent) for package in (batch, classification_client)
    ]
    with _stderr_discarded():
        ray.init(
            address,
            runtime_env={"py_modules": packages},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise `ConnectionError` if nothing listens; `ray.init` would retry for many minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host:  # "auto", or an address with one of Ray's schemes
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"{address}: {error}") from error


@contextmanager
def embedded() -> Iterator[str]:
    """Run Ray on this machine, on loopback only; stop it and delete its files on exit.

    Yields:
        a folder to unpack archives in.
    """
    step("Starting Ray on this machine")
    # By default, Ray uses an external address of this machine and listens on all interfaces.
    ray_constants.ENABLE_RAY_CLUSTER = False
    folder = tempfile.mkdtemp(prefix="ray-", dir=_plain(tempfile.gettempdir()))
    try:
        with _stderr_discarded():
            ray.init(
                "local",
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield str(Path(folder, "archives"))
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        # In rare runs an actor's process hung on exit.
        _, left = psutil.wait_procs(started, _SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _plain(folder: str) -> str:
    """Return `folder`, or /tmp if its path is not ASCII or too long for Ray's sockets."""
    return folder if folder.isascii() and len(folder) <= _MAX_FOLDER_BYTES else "/tmp"


@contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discard standard error, to which Ray's native library logs."""
    before = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
