"""Options of a request: form fields, query parameters, or keys of a JSON body."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from handler.errors import InvalidOption
from handler.labels import Label
from handler.request import Options

# Names under which clients send an image even if nothing marks it as a file: a raw body, gRPC, and
# the tutorials' forms.
IMAGE_NAMES = ("body", "data", "file", "image")

_EMBEDDING = "embedding"
_OPTION_NAMES = ("topk", "threshold", "class_index", "class_id", _EMBEDDING)

_FLAGS = {"true": True, "1": True, "false": False, "0": False}

# Two names this similar count as a misspelling: "treshold" and "top_k" do; "class" and "token" do
# not.
_MIN_SIMILARITY = 0.8
_MAX_NAME_LENGTH = 20
# A comparison costs 20 microseconds, and 20 MB hold a million names.
_MAX_NAMES = 100

# Python's int() and float() accept more: "1_0", and the digits of every script.
WHOLE_NUMBER = re.compile(r"[0-9]{1,4000}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,9})?")


def parse_options(values: Mapping[str, Any], options: Options) -> Options:
    """Return the options, overridden by form fields, a query or a JSON object."""
    _reject_misspelled(values)
    if "topk" in values:
        options = replace(options, topk=_parse_topk(values["topk"]))
    if "threshold" in values:
        options = replace(options, threshold=_parse_threshold(values["threshold"]))
    if _EMBEDDING in values:
        options = replace(options, embedding=_parse_flag(_EMBEDDING, values[_EMBEDDING]))
    # Only an explanation needs these two, and checks them itself.
    if "class_index" in values:
        options = replace(options, class_index=_as_text(values["class_index"])[:_MAX_NAME_LENGTH])
    if "class_id" in values:
        options = replace(options, class_id=_as_text(values["class_id"])[:_MAX_NAME_LENGTH])
    return options


def _reject_misspelled(names: Iterable[str]) -> None:
    """Reject names that are nearly an option's. Others are somebody else's, such as "submit"."""
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
    """Return the position of the class to explain; None if the request names none."""
    by_id = by_index = None
    if options.class_id is not None:
        ids = [label.class_id for label in labels]
        if options.class_id not in ids:
            raise InvalidOption(f"class_id {quoted(options.class_id)} is no class of this model.")
        by_id = ids.index(options.class_id)
    if options.class_index is not None:
        by_index = _parse_class_index(options.class_index, len(labels))
    if by_id is not None and by_index is not None and by_id != by_index:
        raise InvalidOption("class_index and class_id name different classes. Give one of them.")
    return by_id if by_index is None else by_index


def _parse_class_index(value: str, classes: int) -> int:
    index = parse_whole_number(value)
    if index is None or index >= classes:
        raise InvalidOption(
            f"class_index must be a whole number from 0 to {classes - 1}, got {quoted(value)}."
        )
    return index


def parse_whole_number(value: object) -> int | None:
    """Return a number of decimal digits; None for anything else."""
    text = _as_text(value).strip()
    return int(text) if WHOLE_NUMBER.fullmatch(text) else None


def _as_text(value: object) -> str:
    """Return a form's field, or a number or text of JSON, as text; "" for anything else."""
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
    """Return a client's value for an error message: short, and printable ASCII only."""
    match value:
        case list() | dict():
            return "a list" if isinstance(value, list) else "an object"
        case bool() | None:
            return json.dumps(value)
        case _:
            return ascii(_as_text(value)[:40])
