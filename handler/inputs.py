"""From one TorchServe request row and its headers to images and options.

TorchServe hands a handler one mapping for each request: a raw body arrives under `body`, each part
of a form under its own name. Values are bytes, or text where the part's content type said so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from handler.errors import BadRequest, InvalidOption, MissingImage
from handler.settings import Settings

# Form fields that are options; every other part of a form is an image.
OPTION_NAMES = frozenset({"topk", "threshold"})


@dataclass(frozen=True)
class Options:
    """What a request may choose.

    Attributes:
        topk: predictions wanted, 1 or more; more than there are classes gives all classes.
        threshold: least probability, 0 to 1, that counts as recognised.
    """

    topk: int
    threshold: float

    @classmethod
    def defaults(cls, settings: Settings) -> "Options":
        """The options of a request that chooses nothing."""
        return cls(topk=settings.topk, threshold=settings.threshold)


@dataclass(frozen=True)
class ImagePart:
    """One encoded image and the name under which the client sent it."""

    name: str
    data: bytes | bytearray


@dataclass(frozen=True)
class ImagesRequest:
    """A request to classify images, at least one."""

    images: list[ImagePart]
    options: Options


@dataclass(frozen=True)
class DescribeRequest:
    """`GET /models/{name}?customized=true` of the management API."""


def read_request(
    row: Mapping[str, Any], headers: Mapping[str, Any], defaults: Options
) -> ImagesRequest | DescribeRequest:
    """Reads one request.

    Args:
        row: part name to value, as TorchServe delivers it.
        headers: the request's headers; TorchServe mixes each part's own into them, as a mapping
            under the part's name.
        defaults: the options where the request does not choose.

    Raises:
        ClientError: the row holds no image, or an option with a bad value.
    """
    if headers.get("describe") == "True":
        return DescribeRequest()
    options = _read_options(row, defaults)
    images = [
        ImagePart(name, _as_bytes(name, value))
        for name, value in row.items()
        if name not in OPTION_NAMES
    ]
    if not images or (len(images) == 1 and images[0].name == "body" and not images[0].data):
        raise MissingImage(
            "The request holds no image. Send the file as the body (curl -T cat.jpg URL) "
            "or in a form (curl -F file=@cat.jpg URL)."
        )
    return ImagesRequest(images, options)


def _as_bytes(name: str, value: object) -> bytes | bytearray:
    match value:
        case bytes() | bytearray():
            return value
        case str():
            # TorchServe decodes parts announced as text/*.
            return value.encode("utf-8")
        case _:
            raise BadRequest(f"{name!r} must hold an image, not JSON.")


def _read_options(row: Mapping[str, Any], defaults: Options) -> Options:
    options = defaults
    if "topk" in row:
        options = replace(options, topk=_read_topk(row["topk"]))
    if "threshold" in row:
        options = replace(options, threshold=_read_threshold(row["threshold"]))
    return options


def _read_topk(value: object) -> int:
    try:
        topk = int(_as_text(value))
    except ValueError:
        topk = 0
    if topk < 1:
        raise InvalidOption(f"topk must be a whole number of 1 or more, got {_quoted(value)}.")
    return topk


def _read_threshold(value: object) -> float:
    try:
        threshold = float(_as_text(value))
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise InvalidOption(f"threshold must be a number from 0 to 1, got {_quoted(value)}.")
    return threshold


def _as_text(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", errors="replace")
    return str(value)


def _quoted(value: object) -> str:
    """The value for an error message: short, and printable ASCII only."""
    return ascii(_as_text(value)[:40])
