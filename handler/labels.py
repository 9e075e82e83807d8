"""Read the class index, which maps a position in the logits to a class id and a class name."""

import json
from pathlib import Path
from typing import NamedTuple

from handler.errors import ArchiveError

CLASS_INDEX = "index_to_name.json"


class Label(NamedTuple):
    """One class, such as `Label("n02124075", "Egyptian_cat")`."""

    class_id: str
    class_name: str


def load_class_index(path: Path, classes: int) -> list[Label]:
    """Read `{"0": ["n01440764", "tench"], ...}` into a list by position.

    Raises:
        ArchiveError: the file is missing or malformed, or its keys are not "0" to "classes - 1".
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name}: cannot be read: {error}") from error
    if not isinstance(rows, dict) or rows.keys() != {str(i) for i in range(classes)}:
        found = len(rows) if isinstance(rows, dict) else "no"
        raise ArchiveError(
            f'{path.name}: expected the keys "0" to "{classes - 1}", one for each class of the '
            f"model, found {found} keys"
        )
    labels = []
    for i in range(classes):
        match rows[str(i)]:
            case [str() as class_id, str() as class_name]:
                labels.append(Label(class_id, class_name))
            case row:
                raise ArchiveError(
                    f'{path.name}: row "{i}" must be ["class id", "class name"], got {row!r}'
                )
    return labels
