"""`make run`: from nothing to a served model and a first answer.

The weights are torchvision's, or the user's. If torchvision's cannot be fetched, a trained model
whose weights are a Python package answers instead, and the one that was asked for is served as
well, with random weights.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.status import Status
from rich.table import Table

from classification_client import Classification, Client, ServiceError
from classification_client.terminal import safe
from scripts.build.commands import (
    ActivationOption,
    ArchOption,
    ChannelsOption,
    ClassesOption,
    ImagesOption,
    ModelFileOption,
    NameOption,
    PrecisionOption,
    WeightsKeyOption,
    WeightsOption,
    spec_of,
)
from scripts.build.commands import show as show_model_file
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.pipeline import build
from scripts.build.sources.source import DownloadError, HostUnreachableError
from scripts.samples import CAT
from scripts.serve.commands import Grpc, Workers
from scripts.serve.machine import plan
from scripts.serve.management import ready_workers
from scripts.serve.preflight import try_archive
from scripts.serve.running import RUN_DIR, Ports, Running, find_running
from scripts.serve.server import METRICS_CONFIG, check_start, start, stop
from scripts.store import PACKAGED_ARCHITECTURE, sha256
from scripts.terminal import UserError, console, step, warn


def main(
    model_file: ModelFileOption = None,
    arch: ArchOption = None,
    weights: WeightsOption = None,
    weights_key: WeightsKeyOption = None,
    classes: ClassesOption = None,
    name: NameOption = None,
    precision: PrecisionOption = None,
    images: ImagesOption = None,
    channels: ChannelsOption = None,
    activation: ActivationOption = None,
    workers: Workers = None,
    port: int = Ports.inference,
    management_port: int = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc: Grpc = False,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
) -> None:
    """Build the archive, serve it and classify a sample photograph."""
    spec = spec_of(
        model_file=model_file,
        arch=arch,
        weights=weights,
        weights_key=weights_key,
        classes=classes,
        name=name,
        precision=precision,
        images=images,
        channels=channels,
        activation=activation,
    )
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    # What runs already must not be stopped for something that cannot start.
    check_start([], ports, workers, grpc=grpc, instead_of=find_running())
    archives = _build(spec)
    if any((model_file, arch, classes)):
        show_model_file(spec, archives[-1], model_file)
    if len(archives) > 1 and workers is None:
        # As many as one model would have, shared.
        workers = max(1, plan(None, len(archives)).workers // len(archives))
    running = _serve(archives, ports, workers, grpc=grpc)

    picture = RUN_DIR / "cat.png"
    shutil.copyfile(CAT, picture)
    try:
        with Client(running.predictions_url) as client:
            _show(str(picture), client.classify(picture))
    except ServiceError as error:
        raise UserError(f"The server runs, but did not classify {picture}: {error}") from error

    console.print(f"Predictions  {running.predictions_url}")
    console.print("             in a browser it is the web UI")
    for other in list(running.models)[1:]:
        console.print(f"             {running.serving(other).predictions_url} (random weights)")
    console.print(f"Management   {running.model_url}")
    console.print(f"Metrics      {running.metrics_url}")
    console.print(f"\nTry it:      curl -T {picture} {running.predictions_url}")
    console.print("Stop it:     make stop")


def _show(image: str, result: Classification) -> None:
    """Print a result as a table, best label first."""
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
    """Return the model archive; if its trained weights cannot be fetched, one with random weights.

    Before that then comes one of the model whose trained weights are a package, if that can be
    installed.
    """
    try:
        return [build(spec)]
    except DownloadError as error:
        # An address of the user's own may be misspelled.
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
        warn("Going on with UNTRAINED random weights: everything works, but answers mean nothing.")
    trained = archives[0].stem if archives else ""
    random = spec.replace(weights=RANDOM, weights_key=None)
    return [*archives, build(random, trained_model=trained)]


def _serve(archives: Sequence[Path], ports: Ports, workers: int | None, *, grpc: bool) -> Running:
    """Keeps a server that serves these very archives where it was asked to; else starts one.

    The first archive's model is the one that a client gets who names none.
    """
    running = find_running()
    if running is not None:
        same_archives = list(running.models.items()) == [(a.stem, sha256(a)) for a in archives]
        same_place = running.ports.used(grpc=running.grpc) == ports.used(grpc=grpc)
        ready = min(ready_workers(running.serving(model)) for model in running.models)
        if same_archives and same_place and ready > 0 and workers in (None, ready):
            step(f"TorchServe: already serving the same with {ready} worker(s)")
            return running
        check_start(archives, ports, workers, grpc=grpc, instead_of=running)
        if not same_archives:
            with Status("Trying the new archive ...", console=console):
                for archive in archives:
                    try_archive(archive, plan(workers).threads, METRICS_CONFIG)
        step("TorchServe: stopping the running one, it differs from what was asked for")
        stop(running)
    running = start(archives[0], ports, workers, grpc=grpc, beside=archives[1:])
    ready = sum(ready_workers(running.serving(model)) for model in running.models)
    step(f"TorchServe: {ready} worker(s) ready, logs in {RUN_DIR / 'logs'}")
    return running
