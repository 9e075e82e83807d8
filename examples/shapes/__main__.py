"""Runs `make shapes`: trains, packs and serves a model, and compares the server with PyTorch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from classification_client import RequestOptions
from examples.shapes.drawing import LABELS_FILE
from examples.shapes.train import (
    EPOCHS,
    FOLDER,
    IMAGES,
    held_out,
    mean_average_precision,
    probabilities,
    save,
    train,
)
from scripts.build.model_file import read
from scripts.build.pipeline import build
from scripts.build.thresholds import EVEN
from scripts.evaluation.multilabel import MultilabelEvaluation, evaluate_labels, report_labels
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from scripts.terminal import UserError, command, console, step

# A lower mean average precision would mean a mistake in the training.
MIN_PRECISION = 0.9
# The largest difference of a probability from PyTorch's.
MAX_DIFFERENCE = 1e-4
_CONNECTIONS = 8


def pack(folder: Path, thresholds: float | Path) -> Path:
    """Build the archive of the model file with these thresholds."""
    spec = read(folder / "shapes.yaml").replace(thresholds=thresholds)
    return build(spec, folder / "model_store")


@contextmanager
def serving(archive: Path, folder: Path) -> Iterator[ServerState]:
    """Serve the archive while the context lasts."""
    running = start(archive, free_ports(), 1, run_dir=folder / "run")
    try:
        step(f"TorchServe: serving on {running.predictions_url}")
        yield running
    finally:
        stop(running, folder / "run")


def evaluated(folder: Path, part: str, running: ServerState) -> MultilabelEvaluation:
    """Evaluate a part like `make evaluate`."""
    images = folder / part
    return evaluate_labels(
        images, images / LABELS_FILE, running.predictions_url, RequestOptions(), _CONNECTIONS
    )


def main(
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    images: Annotated[int, typer.Option(min=32, help="To train on.")] = IMAGES,
    folder: Annotated[Path, typer.Option(help="For all files.")] = FOLDER,
    min_precision: Annotated[
        float, typer.Option(min=0, max=1, help="Mean average precision.")
    ] = MIN_PRECISION,
) -> None:
    """Train a multi-label model, serve it, and compare the server with PyTorch."""
    model = train(epochs, images)
    save(model, folder)
    with serving(pack(folder, EVEN), folder) as running:
        report_labels(evaluated(folder, "validation", running), folder / "validation-report")
    thresholds = folder / "validation-report" / "thresholds.json"
    with serving(pack(folder, thresholds), folder) as running:
        served = evaluated(folder, "test", running)
    report_labels(served, folder / "test-report")

    test = held_out("test")
    expected = probabilities(model, test)
    precision = {
        "in PyTorch": mean_average_precision(test.labels, expected),
        "served": served.mean_average_precision,
    }
    for where, value in precision.items():
        console.print(f"Mean average precision {where:<11} {value:.4f}")
    # Responses are in the order of their arrival.
    order = np.argsort([image.name for image in served.images])
    difference = float(np.abs(served.probabilities[order] - expected).max())
    console.print(f"Largest difference of a probability: {difference:.1e}")
    equal = math.isclose(*precision.values(), abs_tol=MAX_DIFFERENCE / 2)
    if difference > MAX_DIFFERENCE or not equal:
        raise UserError("The server's predictions differ from PyTorch's.")
    if precision["served"] < min_precision:
        raise UserError(f"The mean average precision is below {min_precision}.")


if __name__ == "__main__":
    command(main)
