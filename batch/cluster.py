"""Ray: an embedded one for this machine, or a cluster that is there."""

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ray reports its use to its makers unless it is told not to before it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Its messages are in its folder of logs; of what a person can mend this program speaks itself.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import psutil
import ray
import ray.data
from ray._private import ray_constants

# For a cluster's head to take a connection, and for Ray's own processes to end.
_SECONDS = 10

for name in ("ray", "ray.data"):
    logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def joined(address: str) -> Iterator[None]:
    """A cluster for as long as the context lasts; its nodes get this package from here.

    Args:
        address: of its head, such as 10.0.0.1:6379, or "auto" on one of its nodes.

    Raises:
        ConnectionError: nobody answers there.
    """
    _reach(address)
    package = str(Path(__file__).parent)
    with _silence():
        ray.init(
            address,
            runtime_env={"py_modules": [package]},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises where nobody is: Ray itself would wait there for many minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host:  # "auto", or a scheme of Ray's
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"{address}: {error}") from error


@contextmanager
def embedded() -> Iterator[str]:
    """A Ray of this machine's own, closed to others, which leaves nothing behind.

    Returns:
        a folder for what its processes unpack.
    """
    # Otherwise Ray takes the address by which other machines reach this one, and listens on all.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Of short name: the names of its sockets may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        with _silence():
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
        # Of many runs one left a process of an actor that hung in its own end.
        _, left = psutil.wait_procs(started, _SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is written to standard error: Ray's library says there what it was told to log."""
    before = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
