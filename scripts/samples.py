"""Decode sample photographs, for trials without a download; sources: photographs/README.md."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.settings import Preprocessing

FOLDER = Path(__file__).parent / "photographs"
CAT = FOLDER / "chelsea.png"

_NAMES = (
    "astronaut.jpg",
    "chelsea.png",
    "coffee.jpg",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
)


def sample_batch(preprocessing: Preprocessing, every: int = 1) -> NDArray[np.uint8]:
    """Return six photographs in three views each, decoded: uint8 (18, 3, crop, crop), 0 to 255.

    Args:
        preprocessing: how to decode them.
        every: step between the views that are used; 1 for all 18.
    """
    views = islice(_views(), 0, None, every)
    return np.stack(
        [decode(_png(view), preprocessing, PixelBudget(10**8)).pixels for view in views]
    )


def sample_views(preprocessing: Preprocessing, count: int) -> NDArray[np.uint8]:
    """Return random crops of the photographs, with a fixed seed: uint8 (count, 3, crop, crop)."""
    random = np.random.default_rng(11)
    photographs = [Image.open(FOLDER / name).convert("RGB") for name in _NAMES]
    views = []
    for i in range(count):
        image = photographs[i % len(photographs)]
        side = int(random.integers(96, min(image.size) + 1))
        left = int(random.integers(0, image.width - side + 1))
        top = int(random.integers(0, image.height - side + 1))
        view = image.crop((left, top, left + side, top + side))
        views.append(decode(_png(view), preprocessing, PixelBudget(10**8)).pixels)
    return np.stack(views)


def sample_photographs() -> Iterator[bytes]:
    """Return the 18 views of `sample_batch` as PNG files."""
    return map(_png, _views())


def _views() -> Iterator[Image.Image]:
    for name in _NAMES:
        with Image.open(FOLDER / name) as photograph:
            yield photograph
            yield photograph.transpose(Image.Transpose.ROTATE_90)
            yield photograph.crop((0, 0, 200, 200))


def _png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()
