"""Read the list of each image's labels, for multi-label models.

The file is CSV with one line per image: its path relative to the image folder, then its labels,
each an id or a name. An image without labels has only its path. A first line that begins with
`image` or `picture` is a header.

    image,labels
    0001.png,circle,star
    0002.png
    0003.png,triangle
"""

import csv
from pathlib import Path

from scripts.terminal import UserError

NAME = "labels.csv"

_HEADERS = {"image", "picture"}
FORM = 'Each line is an image and its labels, such as "0001.png,cat,dog"; one without has its name.'


def read_labels(path: Path, images: Path) -> dict[Path, tuple[str, ...]]:
    """Return the labels of each image, as written in the list.

    Args:
        path: the list.
        images: the image folder.

    Raises:
        UserError: the list cannot be read, names no image, or an image is missing or has two lines.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"The labels {path} cannot be read: {reason}. {FORM}") from error
    found: dict[Path, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line]
        if not any(cells) or (number == 1 and cells[0].lower() in _HEADERS):
            continue
        image = images / cells[0]
        if not cells[0] or not image.is_file():
            raise UserError(f"{path}, line {number}: {images} has no image {cells[0]!r}. {FORM}")
        if image in found:
            raise UserError(f"{path}, line {number}: {cells[0]} has a line already.")
        found[image] = tuple(dict.fromkeys(filter(None, cells[1:])))
    if not found:
        raise UserError(f"{path} names no image. {FORM}")
    return found
