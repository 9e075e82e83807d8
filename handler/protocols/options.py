"""Parse the options of a request from form fields, query parameters or keys of a JSON body."""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    given = {name: parse(values[name]) for name, parse in _PARSERS.items() if name in values}
    return replace(options, **given)


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
        if name in _PARSERS or name in IMAGE_NAMES or len(name) > _MAX_NAME_LENGTH:
            continue
        matches = difflib.get_close_matches(name.lower(), _PARSERS, n=1, cutoff=_MIN_SIMILARITY)
        if matches:
            raise InvalidOption(
                f"There is no option {quoted(name)}: did you mean {matches[0]}? "
                f"Options are {', '.join(_PARSERS)}."
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


def _parse_embedding(value: object) -> bool:
    text = str(value) if isinstance(value, bool) else _as_text(value)
    flag = _FLAGS.get(text.strip().lower())
    if flag is None:
        raise InvalidOption(f"embedding must be true or false, got {quoted(value)}.")
    return flag


def _parse_class(value: object) -> str:
    """Return the text, which `find_class` checks, for explanations only."""
    return _as_text(value)[:_MAX_CLASS_LENGTH]


_PARSERS: dict[str, Callable[[object], Any]] = {
    "topk": _parse_topk,
    "threshold": _parse_threshold,
    "class_index": _parse_class,
    "class_id": _parse_class,
    "class_name": _parse_class,
    "embedding": _parse_embedding,
}


def find_class(options: Options, labels: Sequence[Label]) -> int | None:
    """Return the position of the class to explain; None if the request does not name one."""
    found = set()
    for name, find in _FINDERS.items():
        value = getattr(options, name)
        if value is None:
            continue
        indices = find(value, labels)
        if len(indices) > 1:
            ids = ", ".join(quoted(labels[index].class_id) for index in indices[:_MAX_SHOWN_IDS])
            raise InvalidOption(
                f"{name} {quoted(value)} is the name of {len(indices)} classes: use class_id "
                f"instead, {ids}."
            )
        if not indices:
            raise InvalidOption(_no_class(name, value, labels))
        found.update(indices)
    if len(found) > 1:
        raise InvalidOption(f"{', '.join(_FINDERS)} name different classes. Give one of them.")
    return found.pop() if found else None


def _no_class(name: str, value: str, labels: Sequence[Label]) -> str:
    message = f"{name} {quoted(value)} is no class of this model."
    if name == "class_index":
        message = f"{name} must be a whole number from 0 to {len(labels) - 1}, got {quoted(value)}."
    for other, find in _FINDERS.items():
        if find(value, labels):
            kind = other.removeprefix("class_")
            return f"{message} It is the {kind} of one: use {other} instead."
    return message


def _with_index(value: str, labels: Sequence[Label]) -> list[int]:
    index = parse_whole_number(value)
    return [] if index is None or index >= len(labels) else [index]


def _with_id(value: str, labels: Sequence[Label]) -> list[int]:
    return [i for i, label in enumerate(labels) if label.class_id == value][:1]


def _with_name(value: str, labels: Sequence[Label]) -> list[int]:
    """Return the classes with this name, or else those whose name differs only in case or `_`."""

    def plain(name: str) -> str:
        return name.casefold().replace("_", " ").strip()

    exact = [i for i, label in enumerate(labels) if label.class_name == value]
    return exact or [i for i, label in enumerate(labels) if plain(label.class_name) == plain(value)]


# The options that name the class to explain.
_FINDERS: dict[str, Callable[[str, Sequence[Label]], list[int]]] = {
    "class_index": _with_index,
    "class_id": _with_id,
    "class_name": _with_name,
}


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
