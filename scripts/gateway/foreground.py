"""The gateway as the first process of a container, before nodes that others start.

Ends with SIGTERM, after nginx has answered what it had. What nginx and the watch write down goes to
standard output, and no file of it grows without bound.
"""

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import joblib
import typer

from scripts.gateway.gateway import Gateway, Node, Options
from scripts.gateway.start import check, start, start_watch, stop
from scripts.gateway.upstreams import find_nodes, read_upstreams
from scripts.store import DEFAULT_ARCHITECTURE
from scripts.terminal import UserError, command, step

_POLL = 0.5
# nginx's processes do little more than pass bytes on.
_MOST_PROCESSES = 4
_LONGEST_LOG = 8_000_000


class Log:
    """Copies what a file gained to standard output."""

    def __init__(self, path: Path) -> None:
        """Args: path of the file, which need not be there yet."""
        self.path = path
        self._place = 0

    def copy(self) -> int:
        """Copies; returns how long the file is."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._place)
            sys.stdout.buffer.write(file.read())
            self._place = file.tell()
        sys.stdout.buffer.flush()
        return self._place

    def roll(self) -> None:
        """Moves the file away, whose writer has to open another, and begins anew."""
        self.path.replace(self.path.with_suffix(".old"))
        self._place = 0


def main(
    upstreams: Annotated[str, typer.Option(help="Nodes: HOST:PORT, with spaces between.")],
    model: Annotated[str, typer.Option(help="Which model they serve.")] = DEFAULT_ARCHITECTURE,
    host: str = "0.0.0.0",  # noqa: S104  # a container's own addresses
    published: Annotated[
        str, typer.Option(help="Address at which the container's ports are published.")
    ] = "",
    http_port: int = Options.http_port,
    https_port: int = Options.https_port,
    certificate: str = "",
    certificate_key: str = "",
    keys: str = "",
    rate: int = Options.rate,
    burst: int = Options.burst,
    connections: int = Options.connections,
    metrics_port: int = Options.metrics_port,
    metrics_host: str = Options.metrics_host,
) -> None:
    """Serves until SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    options = Options(
        host,
        http_port,
        https_port,
        certificate,
        certificate_key,
        keys,
        rate,
        burst,
        connections,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        published=published,
        upstreams=upstreams,
        processes=min(joblib.cpu_count(), _MOST_PROCESSES),
    )
    folder = Path(tempfile.gettempdir()) / "gateway"
    check(options, folder)
    nodes = _wait_for_nodes(options, model, ended)
    if not nodes:
        return
    gateway = start(options, nodes, folder)
    logs = [Log(folder / name) for name in ("access.log", "error.log", "watch.log")]
    step(f"Gateway: before {upstreams}, {len(nodes)} address(es) so far")
    try:
        while not ended.wait(_POLL):
            for log in logs:
                _copy(log, gateway)
            gateway = _keep(gateway, folder)
    finally:
        stop(gateway, folder)
        for log in logs:
            log.copy()


def _wait_for_nodes(options: Options, model: str, ended: threading.Event) -> list[Node]:
    """Waits until a name has an address; none where the container is told to end before."""
    read_upstreams(options.upstreams)
    said = False
    while not (nodes := find_nodes(options.upstreams, model)):
        if not said:
            step(f"Gateway: {options.upstreams} has no address yet")
            said = True
        if ended.wait(_POLL):
            break
    return nodes


def _copy(log: Log, gateway: Gateway) -> None:
    if log.copy() > _LONGEST_LOG and log.path.name == "access.log":
        log.roll()
        os.kill(gateway.pid, signal.SIGUSR1)


def _keep(gateway: Gateway, folder: Path) -> Gateway:
    """Starts the watch again where it has ended.

    Raises:
        UserError: nginx itself has ended, which the container's restart mends.
    """
    if gateway.process() is None:
        raise UserError("nginx has ended.")
    if gateway.watch() is not None:
        return gateway
    os.waitpid(gateway.watch_pid, 0)
    step("Gateway: the watch has ended and is started again")
    return start_watch(gateway, folder)


if __name__ == "__main__":
    command(main)
