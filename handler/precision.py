"""Lower precision than float32: which model file, and whether it answers here as it should.

What such a model gives depends on the processor: where 8-bit products are added up in 16 bits, as
without VNNI, they saturate. So an archive carries pictures with float32's first labels, and a
worker asks its model for them as it starts. Where they differ, the archive's float32 model serves.
Of a model that gives several labels a picture, all of them count.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.cores import Cores
from handler.engines import Engine, load_engine
from handler.errors import ArchiveError
from handler.multilabel import sigmoid, thresholds
from handler.settings import ModelCard

logger = logging.getLogger(__name__)

# The file that is served in each precision; bfloat16 is made of float32's as it is loaded.
MODEL_FILES = {"float32": "model.onnx", "bf16": "model.onnx", "int8": "int8.xml"}

# The archive's pictures, uint8 (N, 3, crop, crop), and float32's answers to them, see `answers`.
CHECK_IMAGES = "check-images.npy"
CHECK_LABELS = "check-labels.npy"

# Where the archive was built the two agreed on all of the pictures. Another processor rounds
# otherwise, which may turn a near tie.
MOST_DIFFERENT = 1


def load_precise(
    model_file: Path, card: ModelCard, cores: Cores, *, gpu: int | None, required: bool
) -> tuple[Engine, str]:
    """Loads the archive's model in its precision, or in float32 where that fails.

    Args:
        model_file: the float32 model, as packed.
        card: the archive's model card.
        cores: how many CPU threads a forward pass may use.
        gpu: see `load_engine`.
        required: fail rather than serve float32.

    Returns:
        the engine, and why it is not the archive's precision; empty where it is.

    Raises:
        ArchiveError: float32 cannot be loaded either, the pictures to check with are missing, or
            what is required fails.
    """
    if card.precision == "float32":
        return load_engine(model_file, card, cores, gpu), ""
    images, labels = (_array(model_file.with_name(name)) for name in (CHECK_IMAGES, CHECK_LABELS))
    try:
        from handler.openvino_engine import OpenVinoEngine  # noqa: PLC0415  # only where it serves

        lower_file = model_file.with_name(MODEL_FILES[card.precision])
        engine = OpenVinoEngine(lower_file, card.precision, cores)
        started = time.monotonic()
        different = count_different(answers(engine.logits(images), card), labels)
        others = "other labels" if card.multilabel else "another first label"
        said = f"{different} of {len(labels)} pictures get {others} than in float32"
        logger.info("Check of %s: %s, %.2f s", card.precision, said, time.monotonic() - started)
        if different <= MOST_DIFFERENT:
            return engine, ""
        reason = f"{said}; at most {MOST_DIFFERENT} may"
    except Exception as error:  # openvino is not here, or raises kinds of its own
        reason = str(error)
    if required:
        raise ArchiveError(f"{card.precision} cannot be served here: {reason}")
    logger.warning("Serving float32 instead of %s: %s", card.precision, reason)
    return load_engine(model_file, card, cores, gpu), reason


def answers(logits: NDArray[np.float32], card: ModelCard) -> NDArray[Any]:
    """What a client is told, as far as lower precision must not change it.

    Args:
        logits: float32 (N, classes).
        card: the archive's model card.

    Returns:
        the first labels, int64 (N,); of a model that gives several labels, bool (N, classes).
    """
    return sigmoid(logits) >= thresholds(card) if card.multilabel else logits.argmax(axis=1)


def count_different(some: NDArray[Any], others: NDArray[Any]) -> int:
    """How many pictures are answered otherwise."""
    return int((some != others).reshape(len(some), -1).any(axis=1).sum())


def _array(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
