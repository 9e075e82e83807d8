"""What lower precision costs in accuracy, on trained models and pictures held out of training.

Each archive is built as `make archive PRECISION=...` builds it: int8 is calibrated on pictures that
were trained on, and the guard measures on the others.
"""

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import CORES, write_section
from benchmarks.trained import digits, photographs_model, pixels
from handler.cores import Cores
from handler.engines import Engine
from handler.onnx_engine import OnnxEngine
from handler.openvino_engine import OpenVinoEngine
from handler.precision import MODEL_FILES
from handler.responses import softmax
from handler.settings import PRECISIONS, Preprocessing
from scripts.build.archive import build, recipe
from scripts.build.guard import Comparison, compare
from scripts.build.lower_precision import chosen
from scripts.build.weights import load as load_weights
from scripts.terminal import command, step

TITLE = "Accuracy of lower precision"


@dataclass(frozen=True)
class Task:
    """A folder with a trained model, `train` and `test`, and what is done to its pictures."""

    folder: Path
    preprocessing: Preprocessing


def main() -> None:
    """Trains what is not trained yet, and writes benchmarks/results/accuracy.md."""
    tasks = {"photographs": Task(photographs_model(), Preprocessing()), "digits": Task(*digits())}
    found = {name: measure(task) for name, task in tasks.items()}
    lines = [
        (
            "DenseNet-121, trained by `benchmarks/trained.py` on crops of photographs (224 pixels, "
            "a class a photograph, a third of each held out) and on scikit-learn's handwritten "
            "digits (32 pixels). int8 is calibrated on 300 pictures that were trained on; all "
            "figures are of pictures that were held out, with 95 % intervals. Made by `make "
            "bench-accuracy`."
        ),
        "",
        (
            "| task | precision | pictures | top 1 | points lost | first label as in float32 "
            "| largest change of a probability |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name, comparisons in found.items():
        for precision, comparison in comparisons.items():
            lost = comparison.loss["top 1"]
            lines.append(
                f"| {name} | {precision} | {comparison.pictures} "
                f"| {comparison.accuracy['top 1'][1]} | {100 * lost.value:.2f} "
                f"({100 * lost.low:.2f} to {100 * lost.high:.2f}) | {comparison.agreement} "
                f"| {comparison.largest_change:.4f} |"
            )
    write_section("accuracy", TITLE, "Models that are trained first", lines)


def measure(task: Task) -> dict[str, Comparison]:
    """Each precision beside float32, on the held-out pictures."""
    images, classes = pixels(task.folder / "test", task.preprocessing)
    weights = load_weights(task.folder / "weights.pth")
    probabilities = {}
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as work:
            lower = chosen(
                precision,
                task.folder / "train" if precision == "int8" else None,
                None if precision == "float32" else task.folder / "test",
            )
            classes_file = task.folder / "classes.txt"
            packed = recipe(weights, precision, classes_file, task.preprocessing, lower=lower)
            with engine_of(build(packed, Path(work) / "store"), precision) as engine:
                probabilities[precision] = softmax(engine.logits(images))
        step(f"{task.folder}: {precision} was measured")
    exact, truth = probabilities["float32"], classes.tolist()
    return {name: compare(exact, found, truth) for name, found in probabilities.items()}


@contextmanager
def engine_of(archive: Path, precision: str) -> Iterator[Engine]:
    """Yield what a worker would classify with, without the guard of a worker's start."""
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(archive) as content:
            content.extractall(work)
        cores = Cores(CORES, CORES, Path(work) / "busy")
        file = Path(work) / MODEL_FILES[precision]
        if precision == "float32":
            yield OnnxEngine(file, cores)
        else:
            yield OpenVinoEngine(file, precision, cores)


if __name__ == "__main__":
    command(main)
