"""What is known of a gateway that runs: nginx, the watch, its options and its nodes.

All of it is in one folder, `.run/gateway`, whose `gateway.json` remembers it. What takes longer
than a change of that file, an upgrade or a drain, is an `operation`, of which there is one at a
time.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.gateway.keys import Key
from scripts.serve.running import HOST, RUN_DIR
from scripts.state import (
    living_process,
    recall,
    unreadable,
)
from scripts.terminal import UserError

GATEWAY_DIR = RUN_DIR / "gateway"
STATE = "gateway.json"


@dataclass(frozen=True)
class Options:
    """How the gateway faces its clients.

    Attributes:
        host: address to listen on. Beyond loopback, keys are compulsory and plain HTTP is only
            sent on to HTTPS.
        http_port: plain HTTP.
        https_port: HTTPS with HTTP/2.
        certificate: PEM file, the certificate and what signed it; empty for a self-signed one.
        certificate_key: PEM file of its private key.
        keys: file of clients' keys, a name and a key a line; without one nobody needs a key.
        rate: requests a second that one client may send for long.
        burst: requests that one client may send at once beyond that.
        connections: requests of one client at the same time.
        timeout: seconds after which a node that does not answer is given up. Longer than TorchServe
            gives a worker (`responseTimeout`).
        metrics_port: what the gateway counted, for Prometheus.
        metrics_host: address to listen on for that.
        published: address at which others reach it, where that is not `host`: a container's ports
            are published by whoever runs it. What is safe is decided by this one.
        upstreams: nodes that others start, as HOST:PORT with spaces between. A name stands for all
            its addresses, and is looked up again and again.
        processes: of nginx; 0 for as many as there are CPUs.
    """

    host: str = HOST
    http_port: int = 5000
    https_port: int = 8443
    certificate: str = ""
    certificate_key: str = ""
    keys: str = ""
    rate: int = 50
    burst: int = 100
    connections: int = 64
    timeout: int = 70
    metrics_port: int = 9145
    metrics_host: str = HOST
    published: str = ""
    upstreams: str = ""
    processes: int = 0

    @property
    def address(self) -> str:
        """The host as URLs and nginx write it."""
        return _bracketed(self.host)

    @property
    def metrics_address(self) -> str:
        """The host of the metrics, likewise."""
        return _bracketed(self.metrics_host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Node:
    """A TorchServe behind the gateway.

    Attributes:
        run_dir: its folder, see `scripts.serve.server`.
        archive: what it serves.
        workers: its worker processes.
        drained: an operator took it out.
        healthy: false where the watch found that it cannot answer.
        address: HOST:PORT of one that somebody else started, of which nothing is known but its
            answers; "" for one whose processes are in its folder.
    """

    run_dir: str
    archive: str
    workers: int
    drained: bool = False
    healthy: bool = True
    address: str = ""

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return Path(self.run_dir).resolve().name.lstrip(".")


@dataclass(frozen=True)
class Gateway:
    """A gateway that is running, as `gateway.json` in its folder remembers it.

    Attributes:
        pid: nginx's master process.
        started: when that started, see `scripts.state`.
        sockets: folder of the nodes' sockets; a socket's path must be short.
        options: how it faces clients.
        nodes: what it stands in front of.
        secret: what browsers' sessions are made with, see `scripts.gateway.keys`.
        watch_pid: the process that watches over the nodes; 0 for none.
        watch_started: when that started.
        keys: the clients' keys as they were last read without a mistake.
    """

    pid: int
    started: str
    sockets: str
    options: Options
    nodes: tuple[Node, ...]
    secret: str
    watch_pid: int = 0
    watch_started: str = ""
    keys: tuple[Key, ...] = ()

    @property
    def url(self) -> str:
        """Plain HTTP."""
        return f"http://{self.options.address}:{self.options.http_port}"

    @property
    def https_url(self) -> str:
        """HTTPS."""
        return f"https://{self.options.address}:{self.options.https_port}"

    def process(self) -> psutil.Process | None:
        """The master process of nginx; None where it has ended, or its id is another's by now."""
        return living_process(self.pid, self.started)

    def watch(self) -> psutil.Process | None:
        """The watch's process; None where it has ended."""
        return living_process(self.watch_pid, self.watch_started) if self.watch_pid else None


def find_gateway(folder: Path = GATEWAY_DIR) -> Gateway | None:
    """The gateway of this folder, if it runs."""
    values = recall(folder / STATE)
    if values is None:
        return None
    try:
        gateway = Gateway(
            **{
                **values,
                "options": Options(**values["options"]),
                "nodes": tuple(Node(**node) for node in values["nodes"]),
                "keys": tuple(Key(**key) for key in values.get("keys", ())),
            }
        )
    except (TypeError, KeyError) as error:
        raise unreadable(folder / STATE) from error
    return gateway if gateway.process() is not None else None


def require_gateway(folder: Path = GATEWAY_DIR) -> Gateway:
    """The gateway of this folder; `UserError` where none runs."""
    gateway = find_gateway(folder)
    if gateway is None:
        raise UserError("The gateway is not running. Start it with: make gateway")
    return gateway


@contextmanager
def operation(what: str, folder: Path = GATEWAY_DIR) -> Iterator[None]:
    """Holds the right to take nodes in and out, which only one process has at a time.

    The kernel takes it back from a holder that dies, however it dies.

    Args:
        what: the holder in words, for those who are refused meanwhile.
        folder: the gateway's.

    Raises:
        UserError: somebody else has it.
    """
    with (folder / "operation").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "something else"
            raise UserError(
                f"Not now: {holder} changes which nodes serve. Ask again when that is over."
            ) from error
        file.truncate(0)
        file.write(f"{what} (process {os.getpid()})")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the right to change `gateway.json` and nginx's configuration, for a moment."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
