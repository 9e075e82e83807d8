"""Runs `make digits`: trains, packs and serves a model, and compares the server with PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from classification_client import Classification, Client, Row, classify_all
from examples.digits.train import EPOCHS, FOLDER, NAMES, load, predict, save, train
from scripts.build.model_file import read
from scripts.build.pipeline import build
from scripts.serve.running import free_ports
from scripts.serve.server import start, stop
from scripts.terminal import UserError, command, console, step

# A lower accuracy would mean a mistake in the training.
MIN_ACCURACY = 0.97
_CONNECTIONS = 8


def main(
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    folder: Annotated[Path, typer.Option(help="For all files.")] = FOLDER,
    min_accuracy: Annotated[float, typer.Option(min=0, max=1)] = MIN_ACCURACY,
) -> None:
    """Train a model, serve it, and check that the server returns its predictions."""
    seen, held_out = load()
    model = train(seen, epochs)
    in_pytorch = predict(model, held_out)
    files = save(model, held_out, folder)

    archive = build(read(folder / "digits.yaml"), folder / "model_store")
    running = start(archive, free_ports(), run_dir=folder / "run")
    try:
        step(f"TorchServe: serving on {running.predictions_url}")
        served = _classify(files, running.predictions_url)
    finally:
        stop(running, folder / "run")

    right = np.array(held_out.digits)
    accuracy = {
        "in PyTorch": float(np.mean(np.array(in_pytorch) == right)),
        "served": float(np.mean(np.array(served) == right)),
    }
    for where, share in accuracy.items():
        console.print(f"Accuracy {where:<11} {share:.2%} of {len(files)} held-out digits")
    different = sum(a != b for a, b in zip(in_pytorch, served, strict=True))
    if different:
        raise UserError(f"Server and PyTorch disagree on {different} images.")
    if accuracy["served"] <= min_accuracy:
        raise UserError(f"The accuracy is not above {min_accuracy:.0%}.")


def _classify(files: Sequence[Path], url: str) -> list[int]:
    """Return the server's top-1 prediction for each image, in the order of the files."""
    found: dict[str, int] = {}

    def take(row: Row) -> None:
        if not isinstance(row.answer, Classification):
            raise UserError(f"{row.image}: {row.problem}")
        found[row.image] = NAMES.index(row.answer.label)

    with Client(url, connections=_CONNECTIONS) as client:
        classify_all(files, client, _CONNECTIONS, take)
    return [found[str(file)] for file in files]


if __name__ == "__main__":
    command(main)
