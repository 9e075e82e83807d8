"""The list that says what each picture shows, where that can be several labels or none.

CSV with a line a picture: the picture's file, relative to the folder of the pictures, and then each
of its labels, by id or by name. A picture that shows none has its name alone. A first line that
begins with `picture` is a header.

    picture,labels
    0001.png,circle,star
    0002.png
    0003.png,triangle
"""

import csv
from pathlib import Path

from scripts.terminal import UserError

NAME = "labels.csv"

_HEADER = "picture"
FORM = (
    'Each line is a picture and its labels, such as "0001.png,cat,dog"; one without has its name.'
)


def read_labels(path: Path, images: Path) -> dict[Path, tuple[str, ...]]:
    """The labels of each picture, as they are written.

    Args:
        path: the list.
        images: the folder of the pictures.

    Raises:
        UserError: the list cannot be read, or names no picture, or one that is not there or has two
            lines.
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
        if not any(cells) or (number == 1 and cells[0].lower() == _HEADER):
            continue
        picture = images / cells[0]
        if not cells[0] or not picture.is_file():
            raise UserError(f"{path}, line {number}: {images} has no picture {cells[0]!r}. {FORM}")
        if picture in found:
            raise UserError(f"{path}, line {number}: {cells[0]} has a line already.")
        found[picture] = tuple(dict.fromkeys(filter(None, cells[1:])))
    if not found:
        raise UserError(f"{path} names no picture. {FORM}")
    return found
