"""`make run`: from nothing to a served model and a first answer."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from scripts.architectures import check_architecture
from scripts.archive import (
    ArchOption,
    Channels,
    Pixels,
    build,
    customized,
    obtain_for_trial,
    recipe,
)
from scripts.classify import show
from scripts.client import Client
from scripts.photographs import CAT
from scripts.server import RUN_DIR, Ports, Running, find_running, ready_workers, start, stop
from scripts.store import DEFAULT_ARCHITECTURE, sha256
from scripts.terminal import command, console, step


def main(
    weights: Annotated[Path | None, typer.Option(help="A file of your own.")] = None,
    url: Annotated[str | None, typer.Option(help="A mirror of torchvision's file.")] = None,
    arch: ArchOption = DEFAULT_ARCHITECTURE,
    classes: Annotated[Path | None, typer.Option(help="A list of your own classes.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the archive.")] = None,
    resize: Pixels = None,
    crop: Pixels = None,
    mean: Channels = None,
    std: Channels = None,
    interpolation: str | None = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes.")] = None,
    port: int = Ports.inference,
    management_port: int = Ports.management,
    metrics_port: int = Ports.metrics,
    grpc_inference_port: int = Ports.grpc_inference,
    grpc_management_port: int = Ports.grpc_management,
) -> None:
    """Builds the archive, serves it and classifies a sample photograph."""
    check_architecture(arch)
    preprocessing = customized(arch, resize, crop, mean, std, interpolation)
    found = obtain_for_trial(weights, url, arch)
    archive = build(recipe(found, name, classes, preprocessing))
    ports = Ports(port, management_port, metrics_port, grpc_inference_port, grpc_management_port)
    running = _serve(archive, ports, workers)

    picture = RUN_DIR / "cat.png"
    shutil.copyfile(CAT, picture)
    with Client(running.predictions_url) as client:
        show(str(picture), client.classify(picture))

    console.print(f"Predictions  {running.predictions_url}")
    console.print("             in a browser it is a page to drop pictures on")
    console.print(f"Management   {running.model_url}")
    console.print(f"Metrics      {running.metrics_url}")
    console.print(f"\nTry it:      curl -T {picture} {running.predictions_url}")
    console.print("Stop it:     make stop")


def _serve(archive: Path, ports: Ports, workers: int | None) -> Running:
    """Keeps a server that serves this very archive where it was asked to; else starts one."""
    running = find_running()
    if running is not None:
        served = {archive.stem: sha256(archive)}
        up_to_date = running.models == served and running.ports == ports
        ready = ready_workers(running)
        if up_to_date and ready > 0 and workers in (None, ready):
            step(f"TorchServe: already serving this archive with {ready} worker(s)")
            return running
        step("TorchServe: stopping the running one, it differs from what was asked for")
        stop(running)
    running = start(archive, ports, workers)
    step(f"TorchServe: {ready_workers(running)} worker(s) ready, logs in {RUN_DIR / 'logs'}")
    return running


if __name__ == "__main__":
    command(main)
