"""Several TorchServe nodes on this machine behind one gateway: start, drain, replace, watch.

A node is a server of `scripts.serve` in a folder of its own, `.run/node-1` and so on, with ports
that nobody else uses and TorchServe's tokens on. It serves a copy of the archive in
`.run/releases`, so that building another archive changes nothing for the nodes that run.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import joblib

from scripts.gateway.gateway import (
    GATEWAY_DIR,
    Gateway,
    Node,
    find_gateway,
    operation,
    require_gateway,
)
from scripts.gateway.nginx import change_nodes, wait_for_drain
from scripts.serve.running import RUN_DIR, STATE, find_running, free_ports
from scripts.serve.server import start
from scripts.serve.server import stop as stop_server
from scripts.store import sha256
from scripts.terminal import UserError, step, warn

_RELEASE_DIGITS = 12


def keep_release(archive: Path, run_dir: Path = RUN_DIR) -> Path:
    """Copies an archive to where nodes serve it from, under the digits of its SHA-256."""
    if not archive.is_file():
        raise UserError(f"There is no archive {archive}. Build it with: make archive")
    target = run_dir / "releases" / sha256(archive)[:_RELEASE_DIGITS] / archive.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        shutil.copyfile(archive, unfinished)
        unfinished.replace(target)
    return target


def start_node(release: Path, workers: int, run_dir: Path = RUN_DIR) -> Node:
    """Starts a node beside those that run, and waits until its workers are ready.

    Of one that cannot start the folder stays, for its logs, until the next one takes its name.
    """
    gateway = find_gateway(run_dir / GATEWAY_DIR.name)
    # A dead node that the watch could not start again still has its place.
    taken = {node.name for node in gateway.nodes} if gateway is not None else set()
    taken |= {state.parent.name for state in run_dir.glob(f"node-*/{STATE}")}
    number = next(n for n in range(1, len(taken) + 2) if f"node-{n}" not in taken)
    folder = run_dir / f"node-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    start(release, free_ports(), workers, folder, threads=1, tokens=True)
    return Node(str(folder.resolve()), str(release.resolve()), workers)


def start_nodes(
    count: int, archive: Path, workers: int | None = None, run_dir: Path = RUN_DIR
) -> list[Node]:
    """Starts so many nodes; the CPUs are divided among them unless `workers` says otherwise."""
    release = keep_release(archive, run_dir)
    each = workers or max(1, joblib.cpu_count() // count)
    nodes: list[Node] = []
    try:
        for _ in range(count):
            nodes.append(start_node(release, each, run_dir))
            step(f"Node: {nodes[-1].name} is ready with {each} worker(s)")
    except BaseException:
        stop_nodes(nodes)
        raise
    return nodes


def start_again(node: Node) -> None:
    """Starts a node whose frontend has ended anew, in its own folder and with ports of its own."""
    start(
        Path(node.archive),
        free_ports(),
        node.workers,
        Path(node.run_dir),
        threads=1,
        tokens=True,
    )


def is_own(node: Node) -> bool:
    """Whether `start_node` started it; the server of `make run` is for others to end and start."""
    return Path(node.run_dir).name.startswith("node-")


def stop_nodes(nodes: Sequence[Node]) -> None:
    """Ends nodes that `start_node` started, and forgets them; others it leaves alone."""
    for node in nodes:
        if not is_own(node):
            continue
        folder = Path(node.run_dir)
        running = find_running(folder)
        if running is not None:
            stop_server(running, folder)
        shutil.rmtree(folder, ignore_errors=True)


def stop_unused(nodes: Sequence[Node], folder: Path = GATEWAY_DIR) -> None:
    """Ends those of these nodes that the gateway of this folder does not have."""
    gateway = find_gateway(folder)
    used = {node.run_dir for node in gateway.nodes} if gateway is not None else set()
    stop_nodes([node for node in nodes if node.run_dir not in used])


def drain(names: Sequence[str], folder: Path = GATEWAY_DIR) -> None:
    """Takes nodes out and waits until they have answered what they had.

    Raises:
        UserError: there is no such node, no other would be left, or another `operation` goes on.
    """
    with operation(f"make drain of {', '.join(names)}", folder):
        _drain(names, folder)


def _drain(names: Sequence[str], folder: Path) -> None:
    _require(names, require_gateway(folder))
    old = change_nodes(
        lambda nodes: [
            dataclasses.replace(node, drained=node.drained or node.name in names) for node in nodes
        ],
        folder,
    )
    if not wait_for_drain(old):
        warn("Some clients did not take their answers in time and were cut.")


def undrain(name: str, folder: Path = GATEWAY_DIR) -> None:
    """Lets a drained node serve again."""
    with operation(f"make undrain of {name}", folder):
        _undrain(name, folder)


def _undrain(name: str, folder: Path) -> None:
    _require([name], require_gateway(folder))
    change_nodes(
        lambda nodes: [
            dataclasses.replace(node, drained=False) if node.name == name else node
            for node in nodes
        ],
        folder,
    )


@contextmanager
def drained(name: str, folder: Path = GATEWAY_DIR) -> Iterator[None]:
    """Has a node drained for as long as this lasts, and serving afterwards, whatever happens.

    For whoever holds the `operation`.
    """
    try:
        _drain([name], folder)
        yield
    finally:
        _undrain(name, folder)


def replace(name: str, folder: Path = GATEWAY_DIR) -> Node:
    """Starts a node like this one, lets it serve, drains the old one and ends it.

    The old one may be dead already.
    """
    with operation(f"make replace of {name}", folder):
        (old,) = _require([name], require_gateway(folder))
        require_own([old])
        fresh = start_node(Path(old.archive), old.workers, folder.parent)
        try:
            change_nodes(lambda nodes: [*nodes, fresh], folder)
        except BaseException:
            stop_unused([fresh], folder)
            raise
        _drain([name], folder)
        change_nodes(lambda nodes: [node for node in nodes if node.name != name], folder)
        stop_nodes([old])
    return fresh


def require_own(nodes: Sequence[Node]) -> None:
    """Stops, by a `UserError`, what whoever started the nodes has to do."""
    others = [node.name for node in nodes if node.address]
    if others:
        raise UserError(f"{', '.join(others)} was started by others (UPSTREAMS), who replace it.")


def _require(names: Sequence[str], gateway: Gateway) -> list[Node]:
    known = {node.name: node for node in gateway.nodes}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"There is no node {unknown[0]!r}. There are: {', '.join(known)}.")
    return [known[name] for name in names]
