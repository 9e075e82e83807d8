"""From logits to probabilities: softmax, one class of all, or sigmoid, each class for itself.

An archive whose activation is sigmoid is multi-label: an image has several labels or none, and each
class has a threshold of its own.
"""

import numpy as np
from numpy.typing import NDArray

from handler.settings import ModelCard

# One number for all classes, or float32 (classes,); 0 to 1.
Threshold = float | NDArray[np.float32]


def to_probabilities(logits: NDArray[np.float32], card: ModelCard) -> NDArray[np.float32]:
    """Return float32 (..., classes), 0 to 1, by the model card's activation."""
    return sigmoid(logits) if card.multilabel else softmax(logits)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities of the same shape, (..., classes); each row sums to 1."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities of the same shape, each for itself."""
    # Never of a large number, which would overflow.
    small = np.exp(-np.abs(logits))
    result: NDArray[np.float32] = np.where(logits >= 0, 1, small) / (1 + small)
    return result


def thresholds(card: ModelCard) -> NDArray[np.float32]:
    """Return float32 (classes,), 0 to 1: the probability from which each class is a label."""
    return np.array(card.thresholds, np.float32)


def labels_above(probabilities: NDArray[np.float32], threshold: Threshold) -> NDArray[np.int64]:
    """Return int64 (labels,): the classes that reach the threshold, most probable first.

    Args:
        probabilities: float32 (classes,).
        threshold: of all classes, or of each.
    """
    found = np.flatnonzero(probabilities >= threshold)
    return found[np.argsort(-probabilities[found], kind="stable")]


def top_label(probabilities: NDArray[np.float32], threshold: Threshold) -> int:
    """Return the most probable label's position; without a label, the most probable class's."""
    labels = labels_above(probabilities, threshold)
    return int(labels[0]) if len(labels) else int(probabilities.argmax())
