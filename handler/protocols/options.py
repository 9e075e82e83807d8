"""Parse the options of a request from form fields, query parameters or keys of a JSON body."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

from handler.errors import InvalidOption
from handler.labels import Label
from handler.request import Options, Request

# Names of parts that hold an image even if they are not marked as files: those of a raw body, gRPC
# and the tutorials' forms.
IMAGE_NAMES = ("body", "data", "file", "image")

_EMBEDDING = "embedding"
_CLASSES = ("class_index", "class_id", "class_name")
_OPTION_NAMES = ("topk", "threshold", *_CLASSES, _EMBEDDING)

# The gateway and the container send the query in this header, since TorchServe drops it on most
# paths.
_QUERY = "x-query"

_FLAGS = {"true": True, "1": True, "false": False, "0": False}

# Minimum similarity of a misspelled name: "treshold" and "top_k" are above it, "class" and "token"
# below.
_MIN_SIMILARITY = 0.8
_MAX_NAME_LENGTH = 20
# Maximum length of a class's id or name.
_MAX_CLASS_LENGTH = 500
_MAX_SHOWN_IDS = 5
# Names to compare. A comparison takes 20 microseconds, and 20 MB hold a million names.
_MAX_NAMES = 100

# Stricter than Python's int() and float(), which accept "1_0" and the digits of every script.
WHOLE_NUMBER = re.compile(r"[0-9]{1,4000}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,9})?")


def parse_options(values: Mapping[str, Any], options: Options) -> Options:
    """Return the options, overridden by the values of form fields, a query or a JSON object.

    Raises:
        InvalidOption: a value is invalid, or a name is nearly that of an option.
    """
    _reject_misspelled(values)
    if "topk" in values:
        options = replace(options, topk=_parse_topk(values["topk"]))
    if "threshold" in values:
        options = replace(options, threshold=_parse_threshold(values["threshold"]))
    if _EMBEDDING in values:
        options = replace(options, embedding=_parse_flag(_EMBEDDING, values[_EMBEDDING]))
    # `find_class` checks these, for explanations only.
    classes: dict[str, Any] = {
        name: _as_text(values[name])[:_MAX_CLASS_LENGTH] for name in _CLASSES if name in values
    }
    return replace(options, **classes)


def parse_query(request: Request) -> dict[str, str]:
    """Return the query parameters if the gateway or the container sends them."""
    try:
        query = parse_qsl(request.header(_QUERY), keep_blank_values=True, max_num_fields=_MAX_NAMES)
    except ValueError as error:
        raise InvalidOption(f"The query has more than {_MAX_NAMES} parameters.") from error
    return dict(query)


def _reject_misspelled(names: Iterable[str]) -> None:
    """Reject names that are nearly those of options; ignore unrelated ones, such as "submit"."""
    for name in islice(names, _MAX_NAMES):
        if name in _OPTION_NAMES or name in IMAGE_NAMES or len(name) > _MAX_NAME_LENGTH:
            continue
        matches = difflib.get_close_matches(
            name.lower(), _OPTION_NAMES, n=1, cutoff=_MIN_SIMILARITY
        )
        if matches:
            raise InvalidOption(
                f"There is no option {quoted(name)}: did you mean {matches[0]}? "
                f"Options are {', '.join(_OPTION_NAMES)}."
            )


def _parse_topk(value: object) -> int:
    topk = parse_whole_number(value)
    if topk is None or topk < 1:
        raise InvalidOption(f"topk must be a whole number of 1 or more, got {quoted(value)}.")
    return topk


def _parse_threshold(value: object) -> float:
    text = _as_text(value).strip()
    threshold = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0 <= threshold <= 1:
        raise InvalidOption(f"threshold must be a number from 0 to 1, got {quoted(value)}.")
    return threshold


def _parse_flag(name: str, value: object) -> bool:
    text = str(value).lower() if isinstance(value, bool) else _as_text(value).strip().lower()
    if text not in _FLAGS:
        raise InvalidOption(f"{name} must be true or false, got {quoted(value)}.")
    return _FLAGS[text]


def find_class(options: Options, labels: Sequence[Label]) -> int | None:
    """Return the position of the class to explain; None if the request does not name one."""
    found = set()
    if options.class_id is not None:
        found.add(_find_id(options.class_id, labels))
    if options.class_index is not None:
        found.add(_parse_class_index(options.class_index, len(labels)))
    if options.class_name is not None:
        found.add(_find_name(options.class_name, labels))
    if len(found) > 1:
        raise InvalidOption(f"{', '.join(_CLASSES)} name different classes. Give one of them.")
    return found.pop() if found else None


def _find_id(class_id: str, labels: Sequence[Label]) -> int:
    ids = [label.class_id for label in labels]
    if class_id in ids:
        return ids.index(class_id)
    hint = "."
    if _indices_of(class_id, labels):
        hint = ", but the name of one: use class_name instead."
    raise InvalidOption(f"class_id {quoted(class_id)} is no class of this model{hint}")


def _find_name(class_name: str, labels: Sequence[Label]) -> int:
    found = _indices_of(class_name, labels)
    if not found:
        raise InvalidOption(f"class_name {quoted(class_name)} is no class of this model.")
    if len(found) > 1:
        ids = ", ".join(quoted(labels[index].class_id) for index in found[:_MAX_SHOWN_IDS])
        raise InvalidOption(
            f"class_name {quoted(class_name)} is the name of {len(found)} classes: use class_id "
            f"instead, {ids}."
        )
    return found[0]


def _indices_of(class_name: str, labels: Sequence[Label]) -> list[int]:
    """Return the classes with this name, or else those whose name differs only in case or `_`."""

    def plain(name: str) -> str:
        return name.casefold().replace("_", " ").strip()

    exact = [i for i, label in enumerate(labels) if label.class_name == class_name]
    return exact or [
        i for i, label in enumerate(labels) if plain(label.class_name) == plain(class_name)
    ]


def _parse_class_index(value: str, classes: int) -> int:
    index = parse_whole_number(value)
    if index is None or index >= classes:
        raise InvalidOption(
            f"class_index must be a whole number from 0 to {classes - 1}, got {quoted(value)}."
        )
    return index


def parse_whole_number(value: object) -> int | None:
    """Return the number if the value consists of decimal digits; None otherwise."""
    text = _as_text(value).strip()
    return int(text) if WHOLE_NUMBER.fullmatch(text) else None


def _as_text(value: object) -> str:
    """Return a form field, or a number or text from JSON, as text; "" for other types."""
    match value:
        case bytes() | bytearray():
            return value.decode("utf-8", errors="replace")
        case bool():
            return ""
        case float() if value.is_integer():
            return str(int(value))
        case int() | float() | str():
            return str(value)
        case _:
            return ""


def quoted(value: object) -> str:
    """Return a client's value for an error message, truncated and in printable ASCII."""
    match value:
        case list() | dict():
            return "a list" if isinstance(value, list) else "an object"
        case bool() | None:
            return json.dumps(value)
        case _:
            return ascii(_as_text(value)[:40])
