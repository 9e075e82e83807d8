"""Reads a person's own list of classes, in the forms in which such lists are kept."""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from handler.labels import Label
from scripts.terminal import UserError

IMAGENET_CLASSES = 1000

# Control characters, and halves of characters.
_NO_TEXT = {"Cc", "Cs"}

_FORMS = (
    'a text with one class a line, or JSON: ["cat", "dog"], {"0": "cat", "1": "dog"}, '
    '{"0": ["id-of-cat", "cat"], ...} or {"cat": 0, "dog": 1}'
)


def read_class_names(path: Path) -> list[Label]:
    """Classes by their position in the logits.

    A class without an id of its own gets its name as the id.

    Args:
        path: text with a name a line, or JSON in one of the forms that the error names, among them
            torchvision's `class_to_idx` and the class index of the tutorials.

    Raises:
        UserError: the file is missing, in no known form, or names a class twice or not at all.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The classes {path} cannot be read: {error}.") from error
    labels = _from_json(text, path) if text.lstrip()[:1] in {"[", "{"} else _from_lines(text)
    if not labels:
        raise UserError(f"{path} names no class. It can be {_FORMS}.")
    for number, label in enumerate(labels):
        if not all(part.strip() for part in label):
            raise UserError(f"{path}: class {number} has no name.")
        if any(unicodedata.category(character) in _NO_TEXT for part in label for character in part):
            raise UserError(f"{path}: the name of class {number} holds what is no text: {label!r}.")
    counts = Counter(label.class_id for label in labels)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"{path} names a class twice: {', '.join(twice[:5])}.")
    return labels


def _from_lines(text: str) -> list[Label]:
    lines = text.rstrip().splitlines()
    return [Label(line.strip(), line.strip()) for line in lines]


def _from_json(text: str, path: Path) -> list[Label]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    rows = _by_position(content) if isinstance(content, dict) else content
    if rows is None:
        raise UserError(
            f"{path}: the positions of {len(content)} classes must be 0 to {len(content) - 1}."
        )
    return [_label(row, path) for row in rows]


def _by_position(content: Mapping[str, object]) -> list[object] | None:
    """The rows in order; None where the positions are not 0, 1, 2 and so on."""
    if all(isinstance(value, int) for value in content.values()):  # class_to_idx
        if len(set(content.values())) < len(content):
            return None
        content = {str(position): name for name, position in content.items()}
    rows = [content.get(str(position)) for position in range(len(content))]
    return None if None in rows else rows


def _label(row: object, path: Path) -> Label:
    match row:
        case str():
            return Label(row, row)
        case [str() as class_id, str() as class_name]:
            return Label(class_id, class_name)
        case _:
            raise UserError(f"{path}: {row!r} is no class. The file can be {_FORMS}.")
