"""`make start`, `make stop`, `make scale`, `make status`."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import requests
import typer
from rich.status import Status
from rich.table import Table

from scripts.serve.management import (
    AFRESH,
    REPLACED_WITHIN,
    model_status,
    not_answering,
    scale,
)
from scripts.serve.preflight import (
    check_archives,
)
from scripts.serve.running import (
    RUN_DIR,
    Ports,
    Running,
    find_running,
    forget_server,
    last_started,
    lives,
    require_running,
)
from scripts.serve.server import start, stop, supervise
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step, warn

Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes.")]
Grpc = Annotated[bool, typer.Option(help="Reachable over gRPC too, whose streams end workers.")]


def start_command(
    models: Annotated[str, typer.Option(help="Names of archives.")] = DEFAULT_ARCHITECTURE,
    workers: Workers = None,
    model_store: Annotated[Path, typer.Option(help="Folder with the archive.")] = MODEL_STORE,
    port: int = Ports.inference,
    management_port: int = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc: Grpc = False,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
    foreground: Annotated[bool, typer.Option(help="Run until SIGTERM, for a supervisor.")] = False,
) -> int:
    """Serve archives in the background, or in the foreground; reject untrained weights."""
    if find_running() is not None:
        raise UserError("TorchServe is running already. Stop it with: make stop")
    archives = [model_store / f"{name}.mar" for name in models.replace(",", " ").split()]
    if not archives:
        raise UserError("MODELS names no model.")
    for archive in archives:
        _check_trained(archive)
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    began = start(
        archives[0], ports, workers, grpc=grpc, beside=archives[1:], supervised=foreground
    )
    for model in began.models:
        step(f"TorchServe: serving on {began.serving(model).predictions_url}")
    return supervise(began) if foreground else 0


def _check_trained(archive: Path) -> None:
    if not archive.is_file():
        others = sorted(path.stem for path in archive.parent.glob("*.mar"))
        raise UserError(
            f"There is no model archive {archive}. Build it with make archive."
            + (f" There are archives of: {', '.join(others)}." if others else "")
        )
    check_archives([archive])
    card = read_card(archive)
    if card is not None and not card.trained:
        raise UserError(
            f"{archive} holds untrained random weights. Build it with trained ones: make archive, "
            "or make archive WEIGHTS=path/to/weights.pth"
        )


def stop_command() -> None:
    """Stops the server, and clears what a dead one left behind."""
    running = find_running()
    dead = None if running is not None else last_started(RUN_DIR)
    if running is not None:
        with Status("Stopping TorchServe ...", console=console):
            stop(running)
        step("TorchServe: stopped")
    elif dead is not None:
        forget_server(dead, RUN_DIR)
        step("TorchServe: had ended already; what it left is cleared")
    else:
        step("TorchServe: not running")


def scale_command(
    workers: Annotated[int, typer.Option(min=1)],
    model: Annotated[str | None, typer.Option(help="Which, of several.")] = None,
) -> None:
    """Changes the number of workers and waits for the result."""
    running = require_running()
    scale(running.serving(model) if model else running, workers)
    step(f"TorchServe: {workers} worker(s) ready")


def status_command() -> None:
    """Shows workers, queue and versions."""
    running = require_running()
    try:
        models = [model_status(running.serving(model)) for model in running.models]
    except requests.RequestException as error:
        raise not_answering(running) from error
    for model in models:
        _show_workers(model, running)
        queue = model["jobQueueStatus"]
        console.print(
            f"Queue: {queue['pendingRequests']} waiting, {queue['remainingCapacity']} places free"
        )
    packages = ("torchserve", "torch", "onnxruntime", "pillow")
    console.print("Versions: " + ", ".join(f"{name} {version(name)}" for name in packages))
    console.print(f"Frontend: pid {running.pid}, {running.predictions_url}")
    untrained = [model["modelName"] for model in models if "untrained" in model["modelVersion"]]
    if untrained:
        warn(f"UNTRAINED random weights, whose answers mean nothing: {', '.join(untrained)}.")
    dead = sum(_ended(worker, running) for model in models for worker in model["workers"])
    if dead:
        warn(
            f"{dead} worker(s) that TorchServe counts as ready have ended. If it puts no others in "
            f"their place within {REPLACED_WITHIN:.0f} s, it will not. {AFRESH}"
        )


def _show_workers(model: dict[str, Any], running: Running) -> None:
    table = Table(title=f"{model['modelName']} {model['modelVersion']}")
    for heading in ("worker", "pid", "status", "memory"):
        table.add_column(heading)
    for worker in model["workers"]:
        state = "ended" if _ended(worker, running) else worker["status"]
        table.add_row(worker["id"], str(worker["pid"]), state, _memory(worker["pid"]))
    console.print(table)


def _ended(worker: dict[str, Any], running: Running) -> bool:
    """Whether TorchServe calls a worker ready whose process is gone."""
    return worker["status"] == "READY" and not lives(worker["pid"], running)


def _memory(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).memory_info().rss / 1e6:.0f} MB"
    except psutil.Error:
        return "-"
