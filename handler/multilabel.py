"""Several labels a picture: a class is there or not, whatever the others are.

A model is packed so with the activation sigmoid. Its probabilities are independent, and each class
has a threshold of its own.
"""

import numpy as np
from numpy.typing import NDArray

from handler.settings import ModelCard

# One number for all classes, or float32 (classes,); 0 to 1.
Threshold = float | NDArray[np.float32]


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 of any shape to probabilities of the same shape, each for itself."""
    # Never of a large number, which would overflow.
    small = np.exp(-np.abs(logits))
    result: NDArray[np.float32] = np.where(logits >= 0, 1, small) / (1 + small)
    return result


def thresholds(card: ModelCard) -> NDArray[np.float32]:
    """float32 (classes,): the least probability of each class, 0 to 1, that makes it a label."""
    return np.array(card.thresholds, np.float32)


def passing(probabilities: NDArray[np.float32], threshold: Threshold) -> NDArray[np.int64]:
    """The labels of one picture.

    Args:
        probabilities: float32 (classes,).
        threshold: which a class must reach.

    Returns:
        int64 (labels,), the positions of the classes, most probable first.
    """
    found = np.flatnonzero(probabilities >= threshold)
    return found[np.argsort(-probabilities[found], kind="stable")]


def foremost(probabilities: NDArray[np.float32], threshold: Threshold) -> int:
    """The position of the most probable label; without a label, of the most probable class."""
    labels = passing(probabilities, threshold)
    return int(labels[0]) if len(labels) else int(probabilities.argmax())
