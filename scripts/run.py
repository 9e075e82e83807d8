"""`make run`: from nothing to a served model and a first answer."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from classification_client import Client, ServiceError
from classification_client.printing import show
from scripts.build.activation import SOFTMAX, choose
from scripts.build.architectures import check_architecture
from scripts.build.archive import build, obtain_for_trial, preprocessing_of, recipe
from scripts.build.commands import (
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
)
from scripts.build.guard import Bounds
from scripts.build.lower_precision import chosen
from scripts.build.packing import Said, check_choices
from scripts.samples import CAT
from scripts.serve.commands import Grpc, Workers
from scripts.serve.machine import plan
from scripts.serve.management import ready_workers
from scripts.serve.preflight import try_archive
from scripts.serve.running import RUN_DIR, Ports, Running, find_running
from scripts.serve.server import METRICS_CONFIG, check_start, start, stop
from scripts.store import DEFAULT_ARCHITECTURE, sha256
from scripts.terminal import UserError, command, console, step


def main(
    weights: Annotated[Path | None, typer.Option(help="A file of your own.")] = None,
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
    check_architecture(arch)
    lower = chosen(precision, calibrate, evaluate, max_loss, agreement)
    check_choices(name, engine, lower)
    labelling = choose(activation, thresholds)
    said = Said(resize, crop, mean, std, interpolation, fit)
    preprocessing = preprocessing_of(arch, said)
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    # What runs already must not have to end for something that cannot begin.
    check_start([], ports, workers, grpc=grpc, instead_of=find_running())
    found = obtain_for_trial(weights, weights_url, arch, head)
    archive = build(recipe(found, name, classes, preprocessing, engine, lower, labelling))
    running = _serve(archive, ports, workers, grpc=grpc)

    picture = RUN_DIR / "cat.png"
    shutil.copyfile(CAT, picture)
    try:
        with Client(running.predictions_url) as client:
            show(str(picture), client.classify(picture))
    except ServiceError as error:
        raise UserError(f"The server runs, but did not classify {picture}: {error}") from error

    console.print(f"Predictions  {running.predictions_url}")
    console.print("             in a browser it is a page to drop pictures on")
    console.print(f"Management   {running.model_url}")
    console.print(f"Metrics      {running.metrics_url}")
    console.print(f"\nTry it:      curl -T {picture} {running.predictions_url}")
    console.print("Stop it:     make stop")


def _serve(archive: Path, ports: Ports, workers: int | None, *, grpc: bool) -> Running:
    """Keeps a server that serves this very archive where it was asked to; else starts one."""
    running = find_running()
    if running is not None:
        same_archive = running.models == {archive.stem: sha256(archive)}
        same_place = running.ports.used(grpc=running.grpc) == ports.used(grpc=grpc)
        ready = ready_workers(running)
        if same_archive and same_place and ready > 0 and workers in (None, ready):
            step(f"TorchServe: already serving this archive with {ready} worker(s)")
            return running
        check_start([archive], ports, workers, grpc=grpc, instead_of=running)
        if not same_archive:
            with Status("Trying the new archive ...", console=console):
                try_archive(archive, plan(workers).threads, METRICS_CONFIG)
        step("TorchServe: stopping the running one, it differs from what was asked for")
        stop(running)
    running = start(archive, ports, workers, grpc=grpc)
    step(f"TorchServe: {ready_workers(running)} worker(s) ready, logs in {RUN_DIR / 'logs'}")
    return running


if __name__ == "__main__":
    command(main)
