"""Measures the accuracy of reduced precision for EfficientNet-Lite0 with its ImageNet weights.

int8 is calibrated on crops of one half of the photographs. All precisions are measured on crops of
the other half and on whole photographs.
"""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.known import IMAGENET, KNOWN, PHOTOGRAPHS
from benchmarks.report import CORES, table, write_section
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.activation import softmax
from handler.inference.cores import Cores
from handler.inference.engines import Engine
from handler.inference.onnx_engine import OnnxEngine
from handler.inference.openvino_engine import OpenVinoEngine
from handler.inference.precision import MODEL_FILES
from handler.labels import CLASS_INDEX, load_class_index
from handler.settings import MODEL_CARD, PRECISIONS, ModelCard, Preprocessing
from scripts.build.guard import NEAR_TIE_MARGIN, Limits, compare
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.store import PACKAGED_ARCHITECTURE
from scripts.terminal import step

# Crops of each half, and their share of the photograph's shorter side.
_CROPS = 300
_CROP_SHARES = (0.6, 1.0)
_SEED = 5
_MAX_PIXELS = 10**8

# By kind of image and precision: probabilities (N, 1000).
Found = dict[str, dict[str, NDArray[np.float32]]]


def main() -> None:
    """Write benchmarks/results/accuracy.md."""
    paths = sorted({*PHOTOGRAPHS, *(known.path for known in KNOWN)}, key=lambda path: path.name)
    with tempfile.TemporaryDirectory() as folder:
        calibrate, evaluate = Path(folder, "calibrate"), Path(folder, "evaluate")
        write_crops(paths[::2], calibrate)
        write_crops(paths[1::2], evaluate)
        images = {
            "crops": sorted(evaluate.iterdir()),
            "photographs": [known.path for known in KNOWN],
            "imagenet": list(IMAGENET),
        }
        found: Found = {kind: {} for kind in images}
        for precision in PRECISIONS:
            # The guard must not reject an archive before it is measured.
            wanted: dict[str, Any] = {"type": precision, "agreement": 0}
            if precision != "float32":
                wanted["evaluation"] = evaluate
            if precision == "int8":
                wanted["calibration"] = calibrate
            spec = from_options(name=precision, arch=PACKAGED_ARCHITECTURE, precision=wanted)
            archive = build(spec, Path(folder, "store"))
            with _engine(archive, precision) as (engine, preprocessing):
                for kind, paths in images.items():
                    found[kind][precision] = _probabilities(engine, paths, preprocessing)
            step(f"{PACKAGED_ARCHITECTURE}: {precision} was measured")
    headings = (
        *("precision", "top-1 as in float32", "float32's top-1 among the five best"),
        *("largest change of a probability", "default AGREEMENT"),
        *("labels changed, and wrong after it", "ImageNet's labels right"),
    )
    write_section(
        *("accuracy", "Accuracy of reduced precision", "EfficientNet-Lite0 with ImageNet weights"),
        f"{len(paths)} photographs of scikit-image, scikit-learn and foolbox in two halves. int8 "
        f"is calibrated on {_CROPS} random crops of one half. The first three columns are of "
        f"{_CROPS} crops of the other half, compared with float32, with 95 % intervals; then the "
        "guard's default decision, which does not count near ties. The last two columns are of "
        "whole photographs: "
        f"{len(KNOWN)} whose content is beyond doubt (`benchmarks/known.py`), and foolbox's "
        f"{len(IMAGENET)} of ImageNet's validation set with their labels.",
        table(headings, (_row(name, found) for name in PRECISIONS)),
        _margins(found["crops"]),
    )


@contextmanager
def _engine(archive: Path, precision: str) -> Iterator[tuple[Engine, Preprocessing]]:
    """Yield the engine of an archive, without the accuracy check of a worker's start."""
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(archive) as content:
            content.extractall(work)
        preprocessing = ModelCard.load(Path(work, MODEL_CARD)).preprocessing
        cores = Cores(CORES, CORES, Path(work) / "busy")
        file = Path(work) / MODEL_FILES[precision]
        if precision == "float32":
            yield OnnxEngine(file, cores), preprocessing
        else:
            yield OpenVinoEngine(file, precision, cores), preprocessing


def write_crops(paths: Sequence[Path], folder: Path) -> None:
    """Write random square crops of photographs as PNG files, with a fixed seed."""
    folder.mkdir()
    random = np.random.default_rng(_SEED)
    for number in range(_CROPS):
        with Image.open(paths[number % len(paths)]) as file:
            photograph = file.convert("RGB")
        side = int(min(photograph.size) * random.uniform(*_CROP_SHARES))
        left = int(random.integers(0, photograph.width - side + 1))
        top = int(random.integers(0, photograph.height - side + 1))
        photograph.crop((left, top, left + side, top + side)).save(folder / f"{number:03}.png")


def _probabilities(
    engine: Engine, paths: Sequence[Path], preprocessing: Preprocessing
) -> NDArray[np.float32]:
    """Return float32 (N, classes)."""
    images = [
        decode(path.read_bytes(), preprocessing, PixelBudget(_MAX_PIXELS)).pixels for path in paths
    ]
    return np.concatenate([softmax(engine.run(image[None]).logits) for image in images])


def _row(precision: str, measured: Found) -> list[str]:
    crops, photographs, imagenet = measured.values()
    # float32's predictions count as correct here.
    truth = np.eye(1000, dtype=bool)[crops["float32"].argmax(axis=1)]
    found = compare(crops["float32"], crops[precision], truth)
    judged = compare(crops["float32"], crops[precision]).excess(Limits())
    names = [label.class_name for label in load_class_index(Path("handler", CLASS_INDEX), 1000)]
    before, after = (
        [names[row.argmax()] for row in photographs[name]] for name in ("float32", precision)
    )
    changed = [
        f"{known.path.name}: {old} to {new}"
        for known, old, new in zip(KNOWN, before, after, strict=True)
        if old != new
    ]
    right = int((imagenet[precision].argmax(axis=1) == list(IMAGENET.values())).sum())
    wrong = sum(label not in known.labels for known, label in zip(KNOWN, after, strict=True))
    return [
        *(precision, *(f"{loss.after:.2%}" for loss in found.losses)),
        *(f"{found.largest_change:.4f}", "rejected" if judged else "accepted"),
        *(f"{'; '.join(changed) or 'none'}; {wrong} wrong", f"{right} of {len(IMAGENET)}"),
    ]


def _margins(crops: Mapping[str, NDArray[np.float32]]) -> str:
    """Return the margins of float32's predictions that differ in another precision."""
    exact = crops["float32"]
    best = np.sort(exact, axis=1)
    margins = best[:, -1] - best[:, -2]
    parts = []
    for precision in PRECISIONS[1:]:
        differ = exact.argmax(axis=1) != crops[precision].argmax(axis=1)
        widest = margins[differ].max() if differ.any() else 0.0
        parts.append(
            f"{differ.sum()} of {len(exact)} crops in {precision} (the widest margin between "
            f"float32's two best is {widest:.3f} there)"
        )
    tied = (margins < NEAR_TIE_MARGIN).mean()
    return (
        f"Top-1 differs on {' and '.join(parts)}. Of all crops {tied:.0%} have a margin below "
        f"{NEAR_TIE_MARGIN} in float32: parts of photographs often show no class clearly."
    )
