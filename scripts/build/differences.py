"""The tolerance between a converted model's outputs and the original's."""

from typing import Any

import numpy as np

from scripts.terminal import UserError, step

# Larger differences between the exported graph's outputs and PyTorch's stop the build. Both compute
# in float32 with sums in another order; 1e-5 was measured.
MAX_DIFFERENCE = 1e-4


def scaled_difference(got: Any, expected: Any) -> float:
    """Return the largest difference; if values exceed 100, relative to 1% of the largest."""
    got, expected = np.asarray(got), np.asarray(expected)
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max() / 100))


def check_difference(
    difference: float, original: str, images: int, allowed: float, *, kind: str
) -> None:
    """Report the difference of a converted model to the original, in values of a kind (logits)."""
    step(
        f"Model: largest difference to {original} over {images} images: {difference:.1e} in "
        f"{kind}; preprocessing is not part of this comparison"
    )
    if not difference <= allowed:
        raise UserError(
            f"The converted model differs from {original} by {difference:.1e} in {kind}, more than "
            f"{allowed:.0e}. Nothing was packed; please report the versions of the packages."
        )
