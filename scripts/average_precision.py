"""How well a class's probabilities rank the pictures that show it above all others."""

import numpy as np
from numpy.typing import NDArray


def average_precisions(
    truth: NDArray[np.bool_], probabilities: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Each class's average precision.

    Args:
        truth: bool (N, classes), what each picture shows.
        probabilities: float (N, classes).

    Returns:
        float (classes,), 0 to 1; NaN where no picture shows the class.
    """
    # Commands that measure nothing start without it.
    from sklearn.metrics import average_precision_score  # noqa: PLC0415

    result = np.full(truth.shape[1], np.nan)
    for index in np.flatnonzero(truth.any(axis=0)):
        result[index] = average_precision_score(truth[:, index], probabilities[:, index])
    return result
