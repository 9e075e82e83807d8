"""Runs `make shapes`: trains, packs and serves a model, and compares the server with PyTorch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from classification_client import RequestOptions
from examples.shapes.pictures import LABELS_FILE
from examples.shapes.train import (
    EPOCHS,
    FOLDER,
    PICTURES,
    held_out,
    mean_average_precision,
    probabilities,
    save,
    train,
)
from scripts.build.model_file import read
from scripts.build.pipeline import build
from scripts.build.thresholds import EVEN
from scripts.evaluation.multilabel import (
    MultilabelEvaluation,
    evaluate_labels,
    report_labels,
)
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from scripts.terminal import UserError, command, console, step

# Less would mean that something is wrong with the training.
LEAST_PRECISION = 0.9
# Of a probability, and of the mean average precision, from PyTorch's.
MOST_DIFFERENT = 1e-4
_AT_ONCE = 8


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
    """Evaluate a part as `make evaluate IMAGES=...` does."""
    images = folder / part
    return evaluate_labels(
        images, images / LABELS_FILE, running.predictions_url, RequestOptions(), _AT_ONCE
    )


def main(
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    pictures: Annotated[int, typer.Option(min=32, help="To train on.")] = PICTURES,
    folder: Annotated[Path, typer.Option(help="Where to put everything.")] = FOLDER,
    least: Annotated[
        float, typer.Option(min=0, max=1, help="Mean average precision asked for.")
    ] = LEAST_PRECISION,
) -> None:
    """Train a multi-label model, serve it, and compare the server with PyTorch."""
    model = train(epochs, pictures)
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
    # The server's answers are in the order in which they came.
    order = np.argsort([image.name for image in served.images])
    different = float(np.abs(served.probabilities[order] - expected).max())
    console.print(f"Largest difference of a probability: {different:.1e}")
    if different > MOST_DIFFERENT or not math.isclose(
        *precision.values(), abs_tol=MOST_DIFFERENT / 2
    ):
        raise UserError("The server answers otherwise than PyTorch.")
    if precision["served"] < least:
        raise UserError(f"The mean average precision is below {least}.")


if __name__ == "__main__":
    command(main)
