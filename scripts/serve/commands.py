"""`make start`, `make stop`, `make scale`, `make status`."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import requests
import typer
from rich.status import Status
from rich.table import Table

from handler.settings import MAX_REQUEST_BYTES
from scripts.serve.management import (
    WORKER_REPLACEMENT_SECONDS,
    model_status,
    scale,
    unresponsive_error,
)
from scripts.serve.running import (
    RESTART_HINT,
    RUN_DIR,
    Ports,
    ServerState,
    delete_server_files,
    find_running,
    is_worker_alive,
    read_server_state,
    require_running,
)
from scripts.serve.server import start, stop, supervise
from scripts.serve.upkeep import find_faults, stopped_workers
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step, warn

Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes.")]
ManagementPort = Annotated[
    int | None, typer.Option(help="TCP port of the management API instead of a Unix socket.")
]
Grpc = Annotated[bool, typer.Option(help="Open gRPC too, whose streams stop workers.")]


def start_command(
    models: Annotated[
        str, typer.Option(help="Names of model archives, separated by spaces.")
    ] = DEFAULT_ARCHITECTURE,
    workers: Workers = None,
    model_store: Annotated[Path, typer.Option(help="Folder with the archive.")] = MODEL_STORE,
    port: int = Ports.inference,
    management_port: ManagementPort = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc: Grpc = False,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
    foreground: Annotated[bool, typer.Option(help="Run until SIGTERM, for a supervisor.")] = False,
) -> int:
    """Serve model archives in the background or foreground; reject untrained weights."""
    if find_running() is not None:
        raise UserError("TorchServe is running already. Stop it with: make stop")
    archives = [model_store / f"{name}.mar" for name in models.replace(",", " ").split()]
    if not archives:
        raise UserError("MODELS names no model.")
    for archive in archives:
        card = read_card(archive)
        if card is not None and not card.trained:
            raise UserError(
                f"{archive} holds untrained random weights. Build it with trained ones: make "
                "archive, or make archive WEIGHTS=path/to/weights.pth"
            )
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    running = start(
        archives[0], ports, workers, grpc=grpc, extra_archives=archives[1:], supervised=foreground
    )
    for model in running.models:
        step(f"TorchServe: serving on {running.serving(model).predictions_url}")
    return supervise(running) if foreground else 0


def stop_command() -> None:
    """Stop the server, or delete the files of one that has exited."""
    if (running := find_running()) is not None:
        with Status("Stopping TorchServe ...", console=console):
            stop(running)
        step("TorchServe: stopped")
    elif (exited := read_server_state(RUN_DIR)) is not None:
        delete_server_files(exited, RUN_DIR)
        step("TorchServe: had already exited; its temporary files are deleted")
    else:
        step("TorchServe: not running")


def scale_command(
    workers: Annotated[int, typer.Option(min=1)],
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
) -> None:
    """Change the number of workers and wait until they are ready."""
    running = require_running()
    scale(running.serving(model) if model else running, workers)
    step(f"TorchServe: {workers} worker(s) ready")


def status_command() -> int:
    """Show workers, queue and versions; exit with status 1 if anything is wrong."""
    running = require_running()
    try:
        models = [model_status(running.serving(model)) for model in running.models]
    except requests.RequestException as error:
        raise unresponsive_error(running) from error
    for model in models:
        _show_workers(model, running)
        queue = model["jobQueueStatus"]
        waiting, free = queue["pendingRequests"], queue["remainingCapacity"]
        console.print(
            f"Queue: {waiting} of {waiting + free} requests waiting, each of up to "
            f"{MAX_REQUEST_BYTES >> 20} MB"
        )
    packages = ("torchserve", "onnxruntime", "pillow")  # every server has these
    console.print("Versions: " + ", ".join(f"{name} {version(name)}" for name in packages))
    console.print(f"Frontend: pid {running.pid}")
    for name in running.models:
        console.print(f"Predictions: {running.serving(name).predictions_url}")
    untrained = [model["modelName"] for model in models if "untrained" in model["modelVersion"]]
    if untrained:
        warn(f"UNTRAINED random weights, whose answers mean nothing: {', '.join(untrained)}.")
    faults = list(_faults(models, running))
    for fault in faults:
        warn(fault)
    return 1 if faults else 0


def _faults(models: Sequence[dict[str, Any]], running: ServerState) -> Iterator[str]:
    """Yield the faults that make requests fail now, or that would after a worker crash."""
    if lost := running.lost_files():
        yield lost
    frontend = running.process()
    if frontend is not None:
        yield from find_faults(frontend, [RUN_DIR, Path(running.temporary)])
    stopped = {worker.pid for worker in stopped_workers(frontend)} if frontend else set()
    for model in models:
        ready = sum(
            _state(worker, running) == "READY" and worker["pid"] not in stopped
            for worker in model["workers"]
        )
        wanted = max(1, model["minWorkers"])
        if ready < wanted:
            yield f"{model['modelName']}: {ready} of {wanted} worker(s) can answer. " + (
                f"If TorchServe does not replace those that exited within "
                f"{WORKER_REPLACEMENT_SECONDS:.0f} s, it never will. {RESTART_HINT}"
                if model["workers"]
                else f"Start some: make scale WORKERS={running.workers}"
            )


def _show_workers(model: dict[str, Any], running: ServerState) -> None:
    table = Table(title=f"{model['modelName']} {model['modelVersion']}")
    for heading in ("worker", "pid", "status", "memory"):
        table.add_column(heading)
    for worker in model["workers"]:
        pid = worker["pid"]
        table.add_row(worker["id"], str(pid), _state(worker, running), _memory(pid))
    console.print(table)


def _state(worker: dict[str, Any], running: ServerState) -> str:
    """Return a worker's state; TorchServe may report one as ready whose process has exited."""
    if worker["status"] == "READY" and not is_worker_alive(worker["pid"], running):
        return "exited"
    return str(worker["status"])


def _memory(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).memory_info().rss / 1e6:.0f} MB"
    except psutil.Error:
        return "-"
