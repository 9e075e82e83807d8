"""Several TorchServe nodes on this machine behind one gateway: start, drain, replace, watch.

A node is a server of `scripts.server` in a folder of its own, `.run/node-1` and so on, with ports
that nobody else uses and TorchServe's tokens on. It serves a copy of the archive in
`.run/releases`, so that building another archive changes nothing for the nodes that run.
"""

import dataclasses
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import joblib
import requests
import typer
from rich.status import Status
from rich.table import Table

from scripts import gateway as gateways
from scripts.gateway import (
    GATEWAY_DIR,
    Gateway,
    Node,
    Options,
    change_nodes,
    check_keys,
    find_gateway,
    find_lost,
    operation,
    require_gateway,
    stop_lost,
    wait_for_drain,
)
from scripts.server import (
    HOST,
    RUN_DIR,
    STATE,
    Ports,
    find_running,
    model_status,
    ready_workers,
    start,
)
from scripts.server import stop as stop_server
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card, sha256
from scripts.terminal import UserError, console, run, step, warn

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


def _require(names: Sequence[str], gateway: Gateway) -> list[Node]:
    known = {node.name: node for node in gateway.nodes}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"There is no node {unknown[0]!r}. There are: {', '.join(known)}.")
    return [known[name] for name in names]


def free_ports() -> Ports:
    """Ports that nobody uses now."""
    sockets = [socket.create_server((HOST, 0)) for _ in dataclasses.fields(Ports)]
    numbers = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return Ports(*numbers)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("start")
def start_command(
    nodes: Annotated[int | None, typer.Option(min=1, help="TorchServe nodes to start.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes a node.")] = None,
    host: str = Options.host,
    http_port: int = Options.http_port,
    https_port: int = Options.https_port,
    certificate: str = "",
    certificate_key: str = "",
    keys: str = "",
    rate: int = Options.rate,
    burst: int = Options.burst,
    connections: int = Options.connections,
    metrics_port: int = Options.metrics_port,
    model: Annotated[str | None, typer.Option(help="Name of the archive.")] = None,
) -> None:
    """Puts a gateway before the server of `make run`, or before nodes of its own."""
    if find_gateway() is not None:
        raise UserError("The gateway is running already. Stop it with: make gateway-stop")
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
    )
    gateways.check(options)
    own = nodes is not None
    if nodes:
        archive = MODEL_STORE / f"{model or DEFAULT_ARCHITECTURE}.mar"
        members = start_nodes(nodes, archive, workers)
    else:
        members = [_server_of_make_run(model)]
    try:
        started = gateways.start(options, members)
    except BaseException:
        stop_nodes(members if own else [])
        raise
    step(f"Gateway: {len(members)} node(s), logs in {GATEWAY_DIR}")
    card = read_card(Path(members[0].archive))
    if card is not None and card.warning:
        warn(card.warning)
    if not options.keys:
        warn("Nobody needs a key: only this machine can reach it. KEYS=file asks for one.")
    console.print(f"Pictures     {started.url}/predict")
    console.print(f"Page         {started.url}/")
    console.print(f"HTTPS        {started.https_url}/")
    if options.keys:
        console.print(f"Sign in      {started.https_url}/sign-in")
    console.print(f"Ready        {started.url}/readyz")
    console.print(f"Metrics      http://{HOST}:{options.metrics_port}/metrics")


def _server_of_make_run(model: str | None) -> Node:
    running = find_running()
    if running is None:
        raise UserError("There is nothing to stand before. Run make run first, or give NODES=2.")
    archive = MODEL_STORE / f"{model or running.model}.mar"
    if not archive.is_file() or sha256(archive) != running.models.get(archive.stem):
        raise UserError(f"The server does not serve {archive} as it is now. Run: make run")
    release = keep_release(archive)
    return Node(str(RUN_DIR.resolve()), str(release.resolve()), max(1, ready_workers(running)))


@app.command("stop")
def stop_command() -> None:
    """Stops the gateway and the nodes that were started for it."""
    gateway = find_gateway()
    lost = [] if gateway is not None else find_lost()
    strays = _running_nodes()
    if gateway is None and not lost and not strays:
        step("Gateway: not running")
        return
    with Status("Stopping the gateway ...", console=console):
        if gateway is not None:
            refuse_during_an_operation(gateway)
            gateways.stop(gateway)
        stop_lost(lost)
        stop_nodes(strays)
    step("Gateway: stopped")


def _running_nodes(run_dir: Path = RUN_DIR) -> list[Node]:
    """All nodes of this folder, also those of an upgrade that was cut off."""
    folders = sorted(run_dir.glob("node-*"))
    return [Node(str(folder.resolve()), "", 0) for folder in folders]


def refuse_during_an_operation(gateway: Gateway, folder: Path = GATEWAY_DIR) -> None:
    """Stops, by a `UserError`, while somebody else changes the nodes; the watch ends with nginx."""
    try:
        with operation("make gateway-stop", folder):
            pass
    except UserError as error:
        if f"(process {gateway.watch_pid})" not in str(error):
            raise


@app.command("status")
def status_command() -> None:
    """Shows the nodes."""
    gateway = require_gateway()
    table = Table(title=f"behind {gateway.url} and {gateway.https_url}")
    for heading in ("node", "port", "state", "workers", "waiting", "version", "archive"):
        table.add_column(heading)
    for node in gateway.nodes:
        table.add_row(node.name, *_describe(node))
    console.print(table)
    try:
        check_keys(gateway)
    except UserError as error:
        warn(str(error))
    if gateway.watch() is None:
        warn(
            "The watch has ended: hanging and dead nodes stay, tokens are not renewed, and nothing "
            "is counted. Start the gateway anew."
        )


def _describe(node: Node) -> list[str]:
    archive = Path(node.archive).parent.name
    running = find_running(Path(node.run_dir))
    if running is None:
        return ["-", "dead", "-", "-", "-", archive]
    state = "drained" if node.drained else "serving" if node.healthy else "unhealthy"
    try:
        model = model_status(running)
    except (requests.RequestException, OSError, ValueError):
        return [str(running.ports.inference), "not answering", "-", "-", "-", archive]
    ready = ready_workers(running)
    waiting = model["jobQueueStatus"]["pendingRequests"]
    port = str(running.ports.inference)
    return [port, state, str(ready), str(waiting), model["modelVersion"], archive]


NodeName = Annotated[str, typer.Option(help="As `make gateway-status` calls it.")]


@app.command("drain")
def drain_command(node: NodeName) -> None:
    """Takes a node out and waits until it has answered what it had."""
    drain([node])
    step(f"Node: {node} is drained; make undrain NODE={node} lets it serve again")


@app.command("undrain")
def undrain_command(node: NodeName) -> None:
    """Lets a drained node serve again."""
    undrain(node)
    step(f"Node: {node} serves")


@app.command("replace")
def replace_command(node: NodeName) -> None:
    """Replaces a node, dead or alive, by a new one."""
    fresh = replace(node)
    step(f"Node: {fresh.name} serves in place of {node}")


if __name__ == "__main__":
    run(app)
