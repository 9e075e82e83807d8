"""Convert logits to probabilities with softmax, or with sigmoid for multi-label models.

In a multi-label model an image has any number of labels, and each class has its own threshold.
"""

import numpy as np
from numpy.typing import NDArray

from handler.settings import ModelCard

# One threshold for all classes, or float32 (classes,); 0 to 1.
Threshold = float | NDArray[np.float32]


def to_probabilities(logits: NDArray[np.float32], card: ModelCard) -> NDArray[np.float32]:
    """Return float32 (..., classes), 0 to 1, with the model card's activation."""
    return sigmoid(logits) if card.multilabel else softmax(logits)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities of the same shape, (..., classes); each row sums to 1."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return independent probabilities of the same shape."""
    # A positive exponent could overflow.
    small = np.exp(-np.abs(logits))
    result: NDArray[np.float32] = np.where(logits >= 0, 1, small) / (1 + small)
    return result


def thresholds(card: ModelCard) -> NDArray[np.float32]:
    """Return each class's minimum probability to count as a label: float32 (classes,), 0 to 1."""
    return np.array(card.thresholds, np.float32)


def labels_above(probabilities: NDArray[np.float32], threshold: Threshold) -> NDArray[np.int64]:
    """Return int64 (labels,): the classes that reach the threshold, most probable first."""
    found = np.flatnonzero(probabilities >= threshold)
    return found[np.argsort(-probabilities[found], kind="stable")]


def top_label(probabilities: NDArray[np.float32], threshold: Threshold) -> int:
    """Return the position of the most probable label, or of the most probable class if none."""
    labels = labels_above(probabilities, threshold)
    return int(labels[0]) if len(labels) else int(probabilities.argmax())
