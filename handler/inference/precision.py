"""Load the model in the archive's precision, or in float32 if its labels differ on this processor.

The outputs of a model in reduced precision depend on the processor: without VNNI, 8-bit products
are summed in 16 bits and saturate. An archive therefore contains images and their labels in
float32. A worker classifies them when it starts, and serves float32 if the labels differ.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import ArchiveError
from handler.inference.activation import sigmoid, thresholds
from handler.inference.cores import Cores
from handler.inference.engines import Engine, load_engine
from handler.settings import ModelCard

logger = logging.getLogger(__name__)

# The model file of each precision; bf16 is converted from float32's file while loading.
MODEL_FILES = {"float32": "model.onnx", "bf16": "model.onnx", "int8": "int8.xml"}

# The check images, uint8 (N, 3, crop, crop), and their labels in float32, see `predict`.
CHECK_IMAGES = "check-images.npy"
CHECK_LABELS = "check-labels.npy"

# On the machine that built the archive, both precisions agreed on all images. Another processor
# rounds differently, which may flip a near tie.
MAX_MISMATCHES = 1


def load_with_fallback(
    model_file: Path, card: ModelCard, cores: Cores, *, gpu: int | None, required: bool
) -> tuple[Engine, str]:
    """Load the archive's model in its precision, or in float32 if that fails.

    With `required`, fail instead. `model_file` is the float32 model, as packed.

    Returns:
        the engine, and the reason for the fallback; empty without a fallback.

    Raises:
        ArchiveError: float32 cannot be loaded either, the check images are missing, or `required`
            is set and the precision's check fails.
    """
    if card.precision == "float32":
        return load_engine(model_file, card, cores, gpu), ""
    images, labels = (_array(model_file.with_name(name)) for name in (CHECK_IMAGES, CHECK_LABELS))
    try:
        from handler.inference.openvino_engine import OpenVinoEngine  # optional package

        reduced_file = model_file.with_name(MODEL_FILES[card.precision])
        engine = OpenVinoEngine(reduced_file, card.precision, cores)
        started = time.monotonic()
        mismatches = count_mismatches(predict(engine.run(images).logits, card), labels)
        kind = "other labels" if card.multilabel else "another top-1 label"
        result = f"{mismatches} of {len(labels)} images get {kind} than in float32"
        logger.info("Check of %s: %s, %.2f s", card.precision, result, time.monotonic() - started)
        if mismatches <= MAX_MISMATCHES:
            return engine, ""
        reason = f"{result}; at most {MAX_MISMATCHES} may"
    except Exception as error:  # openvino is not installed, or raises its own errors
        reason = str(error)
    if required:
        raise ArchiveError(f"{card.precision} cannot be served here: {reason}")
    logger.warning("Serving float32 instead of %s: %s", card.precision, reason)
    return load_engine(model_file, card, cores, gpu), reason


def predict(logits: NDArray[np.float32], card: ModelCard) -> NDArray[Any]:
    """Return the labels that reduced precision must not change.

    They are int64 (N,), the top-1 labels of logits (N, classes), or bool (N, classes), all labels
    of a multi-label model.
    """
    return sigmoid(logits) >= thresholds(card) if card.multilabel else logits.argmax(axis=1)


def count_mismatches(some: NDArray[Any], others: NDArray[Any]) -> int:
    """Return the number of images whose labels differ."""
    return int((some != others).reshape(len(some), -1).any(axis=1).sum())


def _array(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
