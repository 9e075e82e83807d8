"""How far a model's outputs may be from those of what it was made of."""

from typing import Any

import numpy as np

# Larger differences than this between the exported graph's outputs and PyTorch's stop the build.
# Both compute in float32 with sums in another order; 1e-5 was seen. Where outputs are above 100, it
# is a part of a hundredth of the greatest.
MAX_DIFFERENCE = 1e-4


def scaled_difference(got: Any, expected: Any) -> float:
    """The largest difference; of values above 100 as a part of a hundredth of the greatest."""
    got, expected = np.asarray(got), np.asarray(expected)
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max() / 100))
