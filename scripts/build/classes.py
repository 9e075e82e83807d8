"""Read a list of class names in the forms in which people and frameworks keep them."""

import ast
import codecs
import csv
import itertools
import json
import re
import reprlib
import shlex
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import handler
from handler.labels import CLASS_INDEX, Label, load_class_index
from scripts.build.messages import read_bytes
from scripts.terminal import UserError

IMAGENET_CLASSES = 1000

MAX_BYTES = 10_000_000
MAX_CLASSES = 100_000
# Python's parser takes 500 bytes of memory per byte; ImageNet-21k's dictionary has 0.9 MB.
_MAX_PYTHON_LENGTH = 1_000_000

_FORMS = (
    "Accepted are: text with one name per line; CSV with lines such as 0,cat; a Hugging Face "
    'config.json; and JSON: ["cat", "dog"], {"0": "cat", "1": "dog"}, {"0": ["id-of-cat", "cat"]} '
    'or {"cat": 0, "dog": 1}.'
)
# WordNet's id and the class's name, as in "n01440764 tench, Tinca tinca".
_SYNSET = re.compile(r"(n\d{8})[\s,;]+(\S.*)")
_POSITION = re.compile(r"\d{1,9}", re.ASCII)
# Unicode categories that no name has: control characters, surrogates, line separators.
_NOT_TEXT = {"Cc", "Cs", "Zl", "Zp"}


def imagenet_classes(outputs: int) -> list[Label]:
    """Return ImageNet's classes for a model with 1000 outputs, or 1001 as TensorFlow's have."""
    background = [Label("background", "background")] * (outputs - IMAGENET_CLASSES)
    index = Path(handler.__file__).with_name(CLASS_INDEX)
    return background + load_class_index(index, IMAGENET_CLASSES)


def given_classes(classes: Path | Sequence[Any] | Mapping[str, Any] | None) -> list[Label] | None:
    """Return the classes of a model file, a path or the names themselves; None if it has none."""
    if classes is None:
        return None
    if isinstance(classes, Path):
        return read_classes(classes)
    return classes_from_json(classes, "classes of the model file")


def read_classes(path: Path) -> list[Label]:
    """Read a list of classes from a file in UTF-8, or in UTF-16 with a byte order mark."""
    data = read_bytes(path, "list of classes", MAX_BYTES)
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return classes_from_text(data.decode("utf-16" if is_utf16 else "utf-8"), str(path))
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start)
        line = data.split(b"\n")[number].strip().decode("cp1252", "replace")
        converted = path.with_name(f"{path.stem}-utf8{path.suffix}")
        raise UserError(
            f"The list of classes {path} is not {error.encoding}: line {number + 1} has the byte "
            f"0x{data[error.start]:02X}. It may be Windows-1252, in which the line reads "
            f"{_shown(line)}. If that is right, convert it: iconv -f WINDOWS-1252 -t UTF-8 "
            f"{shlex.quote(str(path))} > {shlex.quote(str(converted))}"
        ) from error


def classes_from_text(text: str, source: str) -> list[Label]:
    """Parse a list of classes: one name per line, CSV, JSON or a Python dictionary or list.

    Messages name `source`, where the list is from.

    Returns:
        the classes by position in the model's output. A class without an id gets its name as id;
        equal names get different ids, "crane" and "crane-2".
    """
    text = text.removeprefix("\ufeff")
    if text.lstrip()[:1] in {"[", "{"}:
        return classes_from_json(_structure(text, source), source)
    if not text.strip():
        _reject(source, "it names no class")
    lines = re.split(r"\r\n|\n|\r", text.rstrip(), maxsplit=MAX_CLASSES + 1)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            _reject(source, f"line {number} is empty, so that class has no name")
    positions = _from_csv(lines)
    return _labels(lines if positions is None else _by_position(positions, source), source)


def classes_from_json(value: object, source: str) -> list[Label]:
    """Convert a parsed list of classes to labels, see `classes_from_text`.

    It is a list of names; a mapping from position to name, or to id and name, or from name to
    position; or a mapping that has one of these as `id2label` or `label2id`.
    """
    if isinstance(value, Mapping):
        nested = [value.get(key) for key in ("id2label", "label2id")]
        value = next((classes for classes in nested if isinstance(classes, Mapping)), value)
        pairs = list(value.items())
        if all(type(i) is int and isinstance(name, str) for name, i in pairs):
            pairs = [(i, name) for name, i in pairs]
        value = _by_position(pairs, source)
    if not isinstance(value, list | tuple):
        _reject(source, f"{_shown(value)} is not a list of classes")
    return _labels(value, source)


def _structure(text: str, source: str) -> object:
    """Parse JSON or a Python literal."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        _check_unique((key for key, _ in pairs), source)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        _reject(source, "it is nested too deeply")
    except ValueError as error:
        reason = f"it is neither JSON ({error}) nor a Python dictionary or list"
    if len(text) > _MAX_PYTHON_LENGTH:
        _reject(source, reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a name
            tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Dict):
            _check_unique(map(ast.literal_eval, filter(None, tree.keys)), source)
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        _reject(source, reason)


def _check_unique(keys: Iterable[object], source: str) -> None:
    for key, count in Counter(keys).most_common(1):
        if count > 1:
            _reject(source, f"{_shown(key)} occurs twice")


def _from_csv(lines: Sequence[str]) -> list[tuple[str, str]] | None:
    """Return positions and names; None if the lines are names that may have commas in them."""
    for delimiter, column in itertools.product(",;\t", (0, -1)):
        try:
            rows = [next(csv.reader([line], delimiter=delimiter)) for line in lines]
        except csv.Error:
            return None
        has_header = not _POSITION.fullmatch(rows[0][column].strip())
        body = rows[has_header:]
        cells = [row.pop(column).strip() for row in body]
        if not body or not all(body) or not all(map(_POSITION.fullmatch, cells)):
            continue
        found = {int(cell) for cell in cells}
        # Other numbers are part of the names, as in "10,5 mm".
        if 0 in found or found == set(range(1, len(body) + 1)):
            return list(zip(cells, map(delimiter.join, body), strict=True))
    return None


def _by_position(pairs: Sequence[tuple[object, object]], source: str) -> list[object]:
    """Sort classes by their positions, numbers or their digits."""
    keys = [int(k) if isinstance(k, str) and _POSITION.fullmatch(k) else k for k, _ in pairs]
    _check_unique(keys, source)
    found = {k: row for k, (_, row) in zip(keys, pairs, strict=True) if type(k) is int}
    for position in range(len(pairs)):
        if position not in found:
            reason = f"no class has position {position}: they are {_shown(keys)}"
            _reject(source, f"positions must be 0 to {len(pairs) - 1}, but {reason}")
    return [found[position] for position in range(len(pairs))]


def _labels(values: Sequence[object], source: str) -> list[Label]:
    """Give each class an id of its own: the given one, or its name, with a number if taken."""
    if not values:
        _reject(source, "it names no class")
    if len(values) > MAX_CLASSES:
        _reject(source, f"it has more than {MAX_CLASSES} classes")
    rows = [_row(value, index, source) for index, value in enumerate(values)]
    _check_unique((class_id for class_id, _ in rows if class_id), source)
    wanted = {class_id or name for class_id, name in rows}
    used = {class_id for class_id, _ in rows}
    labels = []
    numbers = dict.fromkeys(wanted, 1)
    for class_id, name in rows:
        unique = class_id or name
        while class_id is None and unique in used:
            numbers[name] += 1
            numbered = f"{name}-{numbers[name]}"
            unique = unique if numbered in wanted else numbered
        used.add(unique)
        labels.append(Label(unique, name))
    return labels


def _row(value: object, index: int, source: str) -> tuple[str | None, str]:
    """Return the class's id, if it has one, and its name."""
    match value:
        case str():
            synset = _SYNSET.fullmatch(value.strip())
            class_id, name = (synset[1], synset[2]) if synset else (None, value.strip())
        case [str() as first, str() as second]:
            class_id, name = first.strip(), second.strip()
        case _:
            _reject(source, f"class {index} is {_shown(value)}, not a name in quotes")
    if not name or class_id == "":
        _reject(source, f"class {index} has an empty name or id")
    if any(unicodedata.category(character) in _NOT_TEXT for character in (class_id or "") + name):
        _reject(source, f"class {index} has a control character in {_shown(value)}")
    return class_id, name


def _shown(value: object) -> str:
    """Return a short form of a value of any size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    try:
        return short.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number"


def _reject(source: str, reason: str) -> NoReturn:
    raise UserError(f"The list of classes {source} cannot be used: {reason}. {_FORMS}")
