"""Draws images with up to three of six shapes from a seed; nothing is downloaded."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
MAX_SHAPES = 3
LABELS_FILE = "labels.csv"

# Pixels.
_RADII = (10, 15)
# Attempts to find a free place.
_TRIES = 30
# Ranges of the colors: shapes are brighter than the background.
_BACKGROUND, _SHAPE = (0, 90), (110, 256)
# Oversampling, for smooth edges.
_SCALE = 3

_Point = tuple[float, float]


def _polygon(corners: int, turned: float, radii: Sequence[float] = (1,)) -> list[_Point]:
    """Return a polygon around (0, 0), whose corners cycle through these radii."""
    angles = [turned + 2 * math.pi * i / corners for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


def _circle(_: float) -> list[list[_Point]]:
    return [_polygon(40, 0, (0.9,))]


def _ring(_: float) -> list[list[_Point]]:
    """Return one outline that follows the outer circle, then the inner one backward."""
    outer, inner = _polygon(40, 0, (1,)), _polygon(40, 0, (0.55,))
    return [[*outer, outer[0], inner[0], *reversed(inner)]]


def _square(turned: float) -> list[list[_Point]]:
    return [_polygon(4, turned)]


def _triangle(turned: float) -> list[list[_Point]]:
    return [_polygon(3, turned)]


def _star(turned: float) -> list[list[_Point]]:
    return [_polygon(10, turned, (1.1, 0.45))]


def _cross(turned: float) -> list[list[_Point]]:
    def bar(angle: float) -> list[_Point]:
        along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        ends = ((1, 0.28), (1, -0.28), (-1, -0.28), (-1, 0.28))
        return [(a * along[0] + b * across[0], a * along[1] + b * across[1]) for a, b in ends]

    return [bar(turned), bar(turned + math.pi / 2)]


# Each returns outlines of about radius 1, rotated by an angle.
_OUTLINES: dict[str, Callable[[float], list[list[_Point]]]] = {
    "circle": _circle,
    "cross": _cross,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
NAMES = tuple(_OUTLINES)


@dataclass(frozen=True)
class Drawn:
    """Images and the shapes on each.

    Attributes:
        images: RGB, SIDE x SIDE.
        labels: bool (N, classes), in the order of `NAMES`.
    """

    images: list[Image.Image]
    labels: np.ndarray


def draw(count: int, seed: int) -> Drawn:
    """Draw `count` images; the same seed gives the same ones."""
    random = np.random.default_rng(seed)
    labels = np.zeros((count, len(NAMES)), bool)
    images = []
    for row in labels:
        shapes = random.choice(len(NAMES), random.integers(0, MAX_SHAPES + 1), replace=False)
        row[shapes] = True
        images.append(_draw_one(shapes, random))
    return Drawn(images, labels)


def _draw_one(shapes: np.ndarray, random: np.random.Generator) -> Image.Image:
    background = random.integers(*_BACKGROUND, 3)
    large = Image.new("RGB", (SIDE * _SCALE,) * 2, tuple(int(value) for value in background))
    pencil = ImageDraw.Draw(large)
    places: list[tuple[float, float, float]] = []
    for shape in shapes:
        radius = random.uniform(*_RADII)
        place = _free_place(radius, places, random)
        places.append((*place, radius))
        color = random.integers(*_SHAPE, 3)
        for outline in _OUTLINES[NAMES[shape]](random.uniform(0, 2 * math.pi)):
            corners = [
                ((place[0] + radius * x) * _SCALE, (place[1] + radius * y) * _SCALE)
                for x, y in outline
            ]
            pencil.polygon(corners, fill=tuple(int(value) for value in color))
    small = np.asarray(large.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    noisy = small + random.normal(0, 6, small.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _free_place(
    radius: float, taken: Sequence[tuple[float, float, float]], random: np.random.Generator
) -> _Point:
    """Return a random position without overlap, or with one after `_TRIES` attempts."""
    for _ in range(_TRIES):
        x, y = (float(value) for value in random.uniform(radius, SIDE - radius, 2))
        if all(math.hypot(x - a, y - b) > radius + other for a, b, other in taken):
            break
    return x, y


def write(drawn: Drawn, folder: Path) -> None:
    """Write PNG files and `labels.csv`, a line per image with a column per label."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:04}.png" for number in range(len(drawn.images))]
    for image, file in zip(drawn.images, files, strict=True):
        image.save(file)
    with (folder / LABELS_FILE).open("w", encoding="utf-8", newline="") as list_file:
        lines = csv.writer(list_file)
        lines.writerow(("image", "labels"))
        for file, row in zip(files, drawn.labels, strict=True):
            lines.writerow((file.name, *(NAMES[index] for index in np.flatnonzero(row))))
