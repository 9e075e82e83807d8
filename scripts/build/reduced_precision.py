"""Add a model in bf16 or int8 to an archive, if it predicts as float32 does on the user's images.

Images are decoded as a server decodes them. The cost is measured on images that calibration did not
see; if it exceeds the limits, the build stops.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from classification_client.images import Found, search
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.errors import ArchiveError, ClientError
from handler.inference.activation import sigmoid, softmax, thresholds
from handler.inference.cores import Cores
from handler.inference.engines import Engine
from handler.inference.onnx_engine import OnnxEngine
from handler.inference.precision import CHECK_IMAGES, CHECK_LABELS, MODEL_FILES, predict
from handler.labels import Label
from handler.settings import ModelCard, Preprocessing, Settings
from scripts.build.guard import MIN_CLEAR_IMAGES, Comparison, compare, margins, near_ties
from scripts.build.messages import listed
from scripts.build.model_file import Precision
from scripts.labels_file import FORM, read_labels
from scripts.labels_file import NAME as LABELS_FILE
from scripts.matching import match, meanings
from scripts.terminal import UserError, console, step, warn

# NNCF's default; more images do not calibrate better.
CALIBRATION_IMAGES = 300
# With fewer, the ranges of values that calibration sees are those of a few images.
_MIN_CALIBRATION_IMAGES = 100
# The interval of 4,000 images is narrow enough for every sensible limit.
MAX_EVALUATION_IMAGES = 4_000
# Images that a worker checks when it starts, in a third of a second.
CHECKED = 24
# Shares of the layers that stay in float32, per attempt.
_KEPT = (0, 0.05, 0.15)
_SHOWN_LAYERS = 6

Images = Sequence[NDArray[np.uint8]]


def digest(wanted: Precision) -> str:
    """Return a digest of the options and images that the result depends on."""
    found = hashlib.sha256(f"{wanted.type} {wanted.limits}".encode())
    for folder in filter(None, (wanted.calibration, wanted.evaluation)):
        listed = folder / LABELS_FILE
        found.update(listed.read_bytes() if listed.is_file() else b"")
        for path in search(folder, Found()):
            found.update(f"{path.relative_to(folder)}\n".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def add_reduced_precision(
    wanted: Precision,
    model_file: Path,
    card: ModelCard,
    labels: Sequence[Label],
    folder: Path,
) -> None:
    """Write to `folder` what an archive has in addition to its float32 model, an ONNX file."""
    if not card.trained:
        raise UserError(
            f"{wanted.type} needs trained weights. Predictions of random weights are near ties, so "
            "they do not show what reduced precision costs."
        )
    try:
        from handler.inference.openvino_engine import OpenVinoEngine
    except ImportError as error:
        raise UserError(
            f"{wanted.type} needs packages that are not installed: make setup-precision"
        ) from error
    for_calibration, for_evaluation, classes = split(wanted, labels, multilabel=card.multilabel)
    calibration = list(_decoded(for_calibration, card.preprocessing, fast=True).values())
    decoded = _decoded(for_evaluation, card.preprocessing, fast=True)
    evaluation = list(decoded.values())
    truth = None if classes is None else _truth([classes[path] for path in decoded], card.classes)
    limits = thresholds(card) if card.multilabel else None
    probabilities = sigmoid if card.multilabel else softmax
    with tempfile.TemporaryDirectory() as temporary:
        cpus = joblib.cpu_count()
        cores = Cores(cpus, cpus, Path(temporary) / "busy")
        as_float32_does = list(_decoded(list(decoded), card.preprocessing).values())
        exact = _logits(OnnxEngine(model_file, cores), as_float32_does)
        expected = probabilities(exact)
        if truth is None:
            _check_clear(wanted, near_ties(expected, limits), multilabel=card.multilabel)

        def measure(reduced_file: Path) -> tuple[NDArray[np.float32], Comparison]:
            try:
                engine = OpenVinoEngine(reduced_file, wanted.type, cores)
            except ArchiveError as error:
                raise UserError(f"{wanted.type} cannot be checked: {error}.") from error
            logits = _logits(engine, evaluation)
            return logits, compare(expected, probabilities(logits), truth, limits)

        if wanted.type == "int8":
            target = folder / MODEL_FILES["int8"]
            reduced = _quantized(wanted, model_file, calibration, target, measure)
        else:
            reduced, found = measure(model_file)
            _judge(wanted, found)
    order = np.argsort(-margins(expected, limits), kind="stable")
    _write_check(predict(exact, card), predict(reduced, card), order, evaluation, folder)


def _write_check(
    exact: NDArray[Any], reduced: NDArray[Any], order: NDArray[Any], images: Images, folder: Path
) -> None:
    """Write images on which both agree, evenly spaced in `order`, for workers to check."""
    agreed = [index for index in order if np.array_equal(exact[index], reduced[index])]
    if not agreed:
        raise UserError("float32 and reduced precision agree on no image.")
    chosen = np.linspace(0, len(agreed) - 1, min(CHECKED, len(agreed))).astype(int)
    rows = [agreed[index] for index in chosen]
    np.save(folder / CHECK_IMAGES, np.stack([images[row] for row in rows]), allow_pickle=False)
    np.save(folder / CHECK_LABELS, exact[rows], allow_pickle=False)


def _check_clear(wanted: Precision, near: NDArray[np.bool_], *, multilabel: bool) -> None:
    """Raise `UserError` if agreement would have to be judged on near ties."""
    clear = len(near) - int(near.sum())
    if clear < MIN_CLEAR_IMAGES and wanted.limits.agreement > 0:
        classes = f"a {LABELS_FILE}" if multilabel else "folders named as the classes"
        raise UserError(
            f"Whether {wanted.type} predicts as float32 does cannot be judged, and no archive was "
            f"written: {clear} of {len(near)} images are not near ties in float32, and it takes "
            f"{MIN_CLEAR_IMAGES}. Add images that the model recognizes, or let accuracy decide: "
            f"use {classes}. To accept {wanted.type} unjudged, set agreement: 0 under precision in "
            "the model file."
        )


def _quantized(
    wanted: Precision,
    model_file: Path,
    calibration: Images,
    target: Path,
    measure: Callable[[Path], tuple[NDArray[np.float32], Comparison]],
) -> NDArray[np.float32]:
    """Quantize all layers and, if that costs too much, all but the costliest; return logits."""
    from scripts.build.quantize import Layer, costliest, quantize  # only for int8

    count, layers = len(calibration), list[Layer]()
    if count < _MIN_CALIBRATION_IMAGES:
        warn(
            f"{count} images are few to calibrate on: their values stand for all that the model "
            f"will get. Use {_MIN_CALIBRATION_IMAGES} to {CALIBRATION_IMAGES}."
        )
    for share in _KEPT:
        kept = layers[: math.ceil(share * len(layers))]
        step(f"Precision: quantizing, calibrated on {count} images; layers in float32: {len(kept)}")
        quantize(model_file, calibration, target, [layer.name for layer in kept])
        logits, found = measure(target)
        if not found.excess(wanted.limits):
            break
        step(f"Precision: {found.excess(wanted.limits)}")
        layers = layers or costliest(model_file, target, calibration)
    named = [layer.weights for layer in layers if layer.weights][:_SHOWN_LAYERS]
    _judge(wanted, found, f" Most noise is added by {', '.join(named)}." if named else "")
    return logits


def _judge(wanted: Precision, found: Comparison, layers: str = "") -> None:
    """Report the cost; raise `UserError` if it exceeds the limits."""
    for line in found.report():
        step(f"Precision: {line}")
    excess = found.excess(wanted.limits)
    if excess:
        calibrate = "Calibrate on more images such as the model will get, or c"
        raise UserError(
            f"{wanted.type} costs too much, and no archive was written: {excess}.{layers} "
            f"{calibrate if wanted.type == 'int8' else 'C'}hange "
            f"{'max_loss' if found.losses else 'agreement'} under precision in the model file."
        )
    doubt = found.doubt(wanted.limits)
    if doubt:
        warn(f"{doubt}.")


def _logits(engine: Engine, images: Images) -> NDArray[np.float32]:
    """Return float32 (N, classes)."""
    shown = track(images, f"Classifying with {engine.name} ...", console=console, transient=True)
    return np.concatenate([engine.run(image[None]).logits for image in shown])


def _decoded(
    paths: Sequence[Path], preprocessing: Preprocessing, *, fast: bool = False
) -> dict[Path, NDArray[np.uint8]]:
    """Decode images as a server does, resized the fast way in reduced precision; leave out those
    that it rejects.
    """
    found, rejected = {}, ""
    for path in paths:
        try:
            budget = PixelBudget(Settings.max_pixels, Settings.max_seconds)
            data = path.read_bytes()
            found[path] = decode(data, preprocessing, budget, fast_resize=fast).pixels
        except (ClientError, OSError) as error:  # each image on its own
            rejected = f"{path}: {error}"
    if rejected:
        warn(f"{len(paths) - len(found)} of {len(paths)} images cannot be read, as {rejected}")
    if paths and not found:
        raise UserError("None of the images can be read.")
    return found


def _truth(classes: Sequence[Sequence[int]], count: int) -> NDArray[np.bool_]:
    """Return bool (N, count): which classes each image shows."""
    found = np.zeros((len(classes), count), bool)
    for row, of_image in zip(found, classes, strict=True):
        row[list(of_image)] = True
    if not found.any():
        raise UserError(f"{LABELS_FILE} has no label for the {len(classes)} images used. {FORM}")
    return found


def split(
    wanted: Precision, labels: Sequence[Label], *, multilabel: bool = False
) -> tuple[list[Path], list[Path], dict[Path, tuple[int, ...]] | None]:
    """Return images to calibrate on, others to evaluate on, and the latter's classes, if labeled.

    Of a folder for both, half or more is held back. Copies of an image count once. For multi-label
    models the classes come from the folder's list, and only images on the list are evaluated on.
    """
    seen: set[bytes] = set()

    def drawn(folder: Path) -> list[Path]:
        """Return a folder's images in an order that is random and always the same."""
        found = {}
        for path in search(folder, Found()):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in seen:
                seen.add(digest)
                found[digest] = path
        return [found[digest] for digest in sorted(found)]

    calibration = drawn(wanted.calibration) if wanted.calibration else []
    count = CALIBRATION_IMAGES
    if wanted.evaluation is not None:
        folder, evaluation = wanted.evaluation, drawn(wanted.evaluation)
    else:
        assert wanted.calibration is not None
        count = min(count, len(calibration) // 2)
        folder, evaluation = wanted.calibration, calibration[count:]
    classes = _listed(folder, labels) if multilabel else None
    if classes is not None:
        unlisted = [path for path in evaluation if path not in classes]
        if unlisted:
            warn(
                f"{folder / LABELS_FILE} does not name {len(unlisted)} of the images, such as "
                f"{unlisted[0]}: they are not used to evaluate."
            )
        evaluation = [path for path in evaluation if path in classes]
    if not evaluation or (wanted.calibration and not calibration[:count]):
        raise UserError(
            f"There are too few images in {wanted.calibration or folder}, or the same ones as in "
            f"{folder}."
        )
    evaluation = evaluation[:MAX_EVALUATION_IMAGES]
    if not multilabel:
        classes = _of_folders(evaluation, folder, labels)
    return calibration[:count], evaluation, classes


def _listed(folder: Path, labels: Sequence[Label]) -> dict[Path, tuple[int, ...]] | None:
    """Return the classes of each image on the folder's list; None if it has none."""
    file = folder / LABELS_FILE
    if not file.is_file():
        return None
    listed = read_labels(file, folder)
    names = {name for of_image in listed.values() for name in of_image}
    meant = match(names, labels, f"as {file} has it", "Call it by id")
    return {path: tuple(meant[name] for name in of_image) for path, of_image in listed.items()}


def _of_folders(
    images: Sequence[Path], folder: Path, labels: Sequence[Label]
) -> dict[Path, tuple[int, ...]] | None:
    """Return the class of each image if the folder has one folder per class; None otherwise."""
    named = {path: path.relative_to(folder).parts[0] for path in images}
    meant = meanings(named.values(), labels)
    strange = sorted(name for name, found in meant.items() if not found)
    if not strange:
        truth = match(meant, labels, "as a folder is called", "Call the folder by id")
        return {path: (truth[name],) for path, name in named.items()}
    if len(strange) < len(meant):
        raise UserError(
            f"Some folders of {folder} are named as classes, but not {listed(strange)}. "
            "Name all of them so, or none."
        )
    return None
