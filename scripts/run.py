"""`make run`: build a model archive, serve it and classify a sample image.

The weights are torchvision's, or the user's. If torchvision's cannot be downloaded, the fallback is
a trained model whose weights are a Python package. The requested model is then served as well, with
random weights.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.status import Status
from rich.table import Table

from classification_client import Classification, Client, ServiceError
from classification_client.terminal import safe
from scripts.build.commands import ModelOptions, show, with_model_options
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.pipeline import build
from scripts.build.sources.source import DownloadError, HostUnreachableError
from scripts.samples import CAT
from scripts.serve.commands import Grpc, ManagementPort, Workers
from scripts.serve.machine import plan_workers
from scripts.serve.management import ready_per_model
from scripts.serve.preflight import check_start, try_archive
from scripts.serve.running import MANAGEMENT_SOCKET, RUN_DIR, Ports, ServerState, find_running
from scripts.serve.server import start, stop
from scripts.store import PACKAGED_ARCHITECTURE, sha256
from scripts.terminal import UserError, console, step, warn


@with_model_options
def main(
    options: ModelOptions,
    workers: Workers = None,
    port: int = Ports.inference,
    management_port: ManagementPort = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc: Grpc = False,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
) -> None:
    """Build the archive, serve it and classify a sample photograph."""
    spec = options.spec()
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    # A running server must not be stopped for one that cannot start.
    check_start([], ports, workers, grpc=grpc, instead_of=find_running())
    archives = _build(spec)
    if not options.is_model_file and (options.model_file or options.arch or options.classes):
        show(spec, archives[-1])
    if len(archives) > 1 and workers is None:
        # The models share the workers that a single model would have.
        workers = max(1, plan_workers(None, len(archives)).workers // len(archives))
    running = _serve(archives, ports, workers, grpc=grpc)

    image = RUN_DIR / "cat.png"
    shutil.copyfile(CAT, image)
    try:
        with Client(running.predictions_url) as client:
            _show(str(image), client.classify(image))
    except ServiceError as error:
        raise UserError(f"The server runs, but did not classify {image}: {error}") from error

    console.print(f"Predictions  {running.predictions_url}")
    console.print("             in a browser it is the web UI")
    for other in list(running.models)[1:]:
        console.print(f"             {running.serving(other).predictions_url} (random weights)")
    management = running.model_url
    if running.ports.management is None:
        socket = RUN_DIR / MANAGEMENT_SOCKET
        management = f"curl --unix-socket {socket} http://localhost/models/{running.model}"
    console.print(f"Management   {management}")
    console.print(f"Metrics      {running.metrics_url}")
    console.print(f"\nTry it:      curl -T {image} {running.predictions_url}")
    console.print("Stop it:     make stop")


def _show(image: str, result: Classification) -> None:
    """Print a result as a table, most probable label first."""
    table = Table(title=safe(image if result.recognized else f"{image}: nothing recognized"))
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("class id")
    if result.labels is not None:
        table.add_column("passes")
    for label in result.all_labels:
        passes = ["yes" if label in result.labels else ""] if result.labels is not None else []
        table.add_row(safe(label.label), f"{label.probability:.4f}", safe(label.class_id), *passes)
    console.print(table)
    if result.warning is not None:
        warn(result.warning)


def _build(spec: ModelFile) -> list[Path]:
    """Build the model archive; if its trained weights cannot be downloaded, build the fallbacks.

    These are, in this order, an archive of the model whose trained weights are a package, if that
    can be installed, and one of the requested model with random weights.
    """
    try:
        return [build(spec)]
    except DownloadError as error:
        # The user's own URL may be misspelled: it has a fallback only if its host is unreachable.
        if not spec.is_torchvision or (
            spec.weights is not None and not isinstance(error, HostUnreachableError)
        ):
            raise
        warn(f"{error} {spec.arch} gets random weights, and its answers mean nothing.")
    archives = []
    if spec.name != PACKAGED_ARCHITECTURE:
        step(f"Weights: serving {PACKAGED_ARCHITECTURE} too, whose trained weights are a package")
        try:
            archives = [build(ModelFile(arch=PACKAGED_ARCHITECTURE))]
        except UserError as error:
            warn(str(error))
    if not archives:
        warn("Using UNTRAINED random weights: everything works, but answers mean nothing.")
    trained = archives[0].stem if archives else ""
    random = spec.replace(weights=RANDOM, weights_key=None)
    return [*archives, build(random, trained_model=trained)]


def _serve(
    archives: Sequence[Path], ports: Ports, workers: int | None, *, grpc: bool
) -> ServerState:
    """Return the running server if it serves these archives on these ports; else start one.

    The first archive's model is the default.
    """
    running = find_running()
    if running is not None:
        same_archives = list(running.models.items()) == [(a.stem, sha256(a)) for a in archives]
        same_place = running.ports.used(grpc=running.grpc) == ports.used(grpc=grpc)
        ready = min(ready_per_model(running))
        works = ready > 0 and running.lost_files() is None
        if same_archives and same_place and works and workers in (None, ready):
            step(f"TorchServe: already serving the same with {ready} worker(s)")
            return running
        check_start(archives, ports, workers, grpc=grpc, instead_of=running)
        if not same_archives:
            with Status("Trying the new archive ...", console=console):
                for archive in archives:
                    try_archive(archive)
        step("TorchServe: stopping the running one, which differs or cannot go on")
        stop(running)
    running = start(archives[0], ports, workers, grpc=grpc, extra_archives=archives[1:])
    ready = sum(ready_per_model(running))
    step(f"TorchServe: {ready} worker(s) ready, logs in {RUN_DIR / 'logs'}")
    return running
