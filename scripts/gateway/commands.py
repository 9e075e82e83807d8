"""`make gateway` and what is done to its nodes: drain, undrain, replace, upgrade, status, stop."""

from pathlib import Path
from typing import Annotated

import requests
import typer
from rich.status import Status
from rich.table import Table

from scripts.gateway.gateway import (
    GATEWAY_DIR,
    Gateway,
    Node,
    Options,
    find_gateway,
    operation,
    require_gateway,
)
from scripts.gateway.nginx import check_keys
from scripts.gateway.nodes import (
    drain,
    keep_release,
    replace,
    start_nodes,
    stop_nodes,
    undrain,
)
from scripts.gateway.start import check, find_lost, start, stop, stop_lost
from scripts.gateway.upgrade import AGREEMENT, TRIAL_SECONDS, upgrade
from scripts.gateway.upstreams import find_nodes
from scripts.serve.management import model_status, ready_workers
from scripts.serve.running import HOST, RUN_DIR, find_running
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card, sha256
from scripts.terminal import UserError, console, run, step, warn

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
    upstreams: Annotated[
        str, typer.Option(help="Nodes that others start: HOST:PORT, with spaces between.")
    ] = "",
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
        upstreams=upstreams,
    )
    if upstreams and (nodes or workers):
        raise UserError("UPSTREAMS are started by others: leave NODES and WORKERS out.")
    check(options)
    own = nodes is not None
    if upstreams:
        members = find_nodes(upstreams, model or DEFAULT_ARCHITECTURE)
        if not members:
            raise UserError(f"UPSTREAMS has no address just now: {upstreams}")
    elif nodes:
        archive = MODEL_STORE / f"{model or DEFAULT_ARCHITECTURE}.mar"
        members = start_nodes(nodes, archive, workers)
    else:
        members = [_server_of_make_run(model)]
    try:
        started = start(options, members)
    except BaseException:
        stop_nodes(members if own else [])
        raise
    where = "of others" if upstreams else "on this machine"
    step(f"Gateway: {len(members)} node(s) {where}, logs in {GATEWAY_DIR}")
    card = None if upstreams else read_card(Path(members[0].archive))
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
            stop(gateway)
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
    if node.address:
        state = "drained" if node.drained else "serving" if node.healthy else "not answering"
        return [node.address, state, "-", "-", "-", "-"]
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


@app.command("upgrade")
def upgrade_command(
    archive: Annotated[Path, typer.Option(help="The new archive.")] = MODEL_STORE
    / f"{DEFAULT_ARCHITECTURE}.mar",
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples whose label(s) must stay.")
    ] = AGREEMENT,
    trial_seconds: Annotated[
        float, typer.Option(min=0, help="Time of serving clients before the old nodes end.")
    ] = TRIAL_SECONDS,
) -> None:
    """Upgrades what the gateway serves, or leaves everything as it is."""
    upgrade(archive, agreement, trial_seconds)


if __name__ == "__main__":
    run(app)
