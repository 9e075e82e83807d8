"""Prints pairs of images whose embeddings have a cosine similarity close to 1.

$ make classify IMAGES=folder OUTPUT=vectors.npy
$ .venv/bin/python -m examples.duplicates vectors.npy
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from scripts.terminal import UserError, command, console

# Images whose similarities to all others are computed at once.
_BLOCK = 1000


def pairs(vectors: NDArray[np.float32], min_similarity: float) -> list[tuple[float, int, int]]:
    """Return pairs of at least this cosine similarity of the centered vectors, highest first.

    Args:
        vectors: float32 (images, channels).
        min_similarity: -1 to 1.

    Returns:
        for each pair its similarity and the two row numbers.
    """
    centered = vectors - vectors.mean(axis=0)
    lengths = np.linalg.norm(centered, axis=1, keepdims=True)
    unit = centered / np.maximum(lengths, np.finfo(np.float32).tiny)
    found = []
    for start in range(0, len(unit), _BLOCK):
        alike = unit[start : start + _BLOCK] @ unit.T
        for row, column in zip(*np.nonzero(alike >= min_similarity), strict=True):
            if start + row < column:
                found.append((float(alike[row, column]), int(start + row), int(column)))
    return sorted(found, reverse=True)


def main(
    file: Annotated[Path, typer.Argument(help="Embeddings of make classify, as .npy.")],
    min_similarity: Annotated[float, typer.Option(min=-1, max=1)] = 0.95,
) -> None:
    """Print pairs of near-duplicate images."""
    try:
        rows = np.load(file, allow_pickle=False)
        names, vectors = rows["picture"], rows["embedding"]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{file} holds no embeddings: {error}.") from error
    for similarity, one, other in pairs(vectors, min_similarity):
        console.print(f"{similarity:.3f}  {names[one]}  {names[other]}")


if __name__ == "__main__":
    command(main)
