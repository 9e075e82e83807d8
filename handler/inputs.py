"""From one TorchServe request row and its headers to images and options.

TorchServe hands a handler one mapping for each request: a raw body arrives under `body`, each part
of a form under its own name, and so does each query parameter where TorchServe passes the query
on. A part that was sent as a file has a content type, any other has none.
"""

import base64
import binascii
import enum
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from handler.errors import (
    BadRequest,
    ClientError,
    InvalidOption,
    MissingImage,
    RepeatedPart,
    TooManyImages,
)
from handler.labels import Label
from handler.settings import Settings

# Names under which clients send an image even where nothing says that it is a file: a raw body,
# gRPC, and the tutorials' forms.
_IMAGE_NAMES = ("body", "data", "file", "image")

# Under which of its keys an instance of a KServe V1 request holds the image.
_INSTANCE_KEYS = ("b64", "image", "data", "image_bytes")

# A form's part needs less than this for its header lines: a file name of 255 characters, written
# twice and each byte in three, is what the longest ones consist of.
_PART_HEADER_BYTES = 4096

# Names and ids go back to the client; an answer over max_response_size would end the worker.
_LONGEST_NAME = 200

_DATA_URL = re.compile(r"^data:[\w.+/-]*;base64,")

HOW_TO_SEND = (
    "Send the file as the body (curl -T cat.jpg URL) or in a form (curl -F file=@cat.jpg URL)."
)


class Form(enum.Enum):
    """How a request asked, which is how it is answered."""

    PLAIN = "plain"
    KSERVE_V1 = "KServe V1"
    KSERVE_V2 = "KServe V2"


@dataclass(frozen=True)
class Options:
    """What a request may choose.

    Attributes:
        topk: predictions wanted, 1 or more; more than there are classes gives all classes.
        threshold: least probability, 0 to 1, that counts as recognised.
        class_index: position of the class to explain, as the client wrote it.
        class_id: id of the class to explain, such as "n02124075".
    """

    topk: int
    threshold: float
    class_index: str | None = None
    class_id: str | None = None

    @classmethod
    def defaults(cls, settings: Settings) -> "Options":
        """The options of a request that chooses nothing."""
        return cls(topk=settings.topk, threshold=settings.threshold)


@dataclass(frozen=True)
class ImagePart:
    """One encoded image and the name under which the client sent it.

    `data` may be what is wrong with it: each image of a request fails alone.
    """

    name: str
    data: bytes | bytearray | ClientError


@dataclass(frozen=True)
class ImagesRequest:
    """A request to classify images, at least one.

    Attributes:
        images: in the order in which they were sent.
        options: of the whole request.
        form: how to answer.
        request_id: the client's own id for the request, where the form has one.
    """

    images: list[ImagePart]
    options: Options
    form: Form = Form.PLAIN
    request_id: str | None = None


@dataclass(frozen=True)
class ExplainRequest:
    """A request to say where in its images a class shows.

    Attributes:
        asked: the images and options.
        class_index: the class to explain; None for each image's best one.
        as_picture: answer with a picture instead of numbers; then there is one image.
    """

    asked: ImagesRequest
    class_index: int | None
    as_picture: bool


@dataclass(frozen=True)
class PageRequest:
    """A `GET` from a browser: it gets the page."""


@dataclass(frozen=True)
class DescribeRequest:
    """`GET /models/{name}?customized=true` of the management API."""


Request = ImagesRequest | ExplainRequest | PageRequest | DescribeRequest


def read_request(
    row: Mapping[str, Any],
    headers: Mapping[str, Any],
    settings: Settings,
    labels: Sequence[Label],
) -> Request:
    """Reads one request.

    Args:
        row: part name to value, as TorchServe delivers it.
        headers: the request's headers; TorchServe mixes each part's own into them, as a mapping
            under the part's name.
        settings: the defaults of the options, and the bounds.
        labels: the classes that can be asked for.

    Raises:
        ClientError: the row holds no image, too many, or an option with a bad value.
    """
    if headers.get("describe") == "True":
        return DescribeRequest()
    if row.get("body") == b"" and "text/html" in _header(headers, "accept"):
        return PageRequest()
    asked = _read_images(row, headers, settings)
    if headers.get("explain") == "True":
        class_index = _find_class(asked.options, labels)
        return ExplainRequest(asked, class_index, _wants_picture(asked, headers))
    return asked


def _read_images(
    row: Mapping[str, Any], headers: Mapping[str, Any], settings: Settings
) -> ImagesRequest:
    options = _read_options(row, Options.defaults(settings))
    document = _json_document(row, headers)
    if document is not None:
        request = _read_json(document, options, settings.max_images)
    else:
        _check_nothing_was_lost(row, headers)
        request = ImagesRequest(list(_image_parts(row, headers)), options)
        _check_count(len(request.images), settings.max_images)
    if not request.images:
        raise MissingImage(f"The request holds no image. {HOW_TO_SEND}")
    return request


def _wants_picture(asked: ImagesRequest, headers: Mapping[str, Any]) -> bool:
    """A picture, unless the `Accept` header or KServe's form asks for JSON."""
    if asked.form is not Form.PLAIN or "application/json" in _header(headers, "accept"):
        return False
    if len(asked.images) > 1:
        raise BadRequest(
            f"The request holds {len(asked.images)} images, and a picture can explain only one. "
            "Send one, or ask for numbers with the header Accept: application/json."
        )
    return True


def _check_count(images: int, max_images: int) -> None:
    if images > max_images:
        raise TooManyImages(
            f"The request holds {images} images; at most {max_images} are accepted. "
            "Send the others in another request."
        )


# --- Bodies and forms ---


def _image_parts(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Iterator[ImagePart]:
    """Every part that was sent as a file, or under a name that is an image's."""
    for name, value in row.items():
        is_file = bool(_content_type(headers, name))
        if not is_file and name not in _IMAGE_NAMES:
            continue  # an option, or a field that is not for us
        content = _as_bytes(name, value)
        if not content and name == "body":
            continue  # a GET, or a body without bytes
        yield ImagePart(name[:_LONGEST_NAME], content)


def _content_type(headers: Mapping[str, Any], part: str) -> str:
    """The content type of a part; empty where it was not sent as a file."""
    own = headers.get(part)
    return str(own.get("content-type", "")) if isinstance(own, Mapping) else ""


def _check_nothing_was_lost(row: Mapping[str, Any], headers: Mapping[str, Any]) -> None:
    """Notices parts of one name: the frontend keeps the last one of them, and says nothing.

    The request's length tells: what was received, with room for each part's header lines, must
    account for it. Parts that were lost and are smaller than that room are not noticed.
    """
    sent_as = _header(headers, "content-type")
    if not sent_as.startswith("multipart/form-data"):
        return
    try:
        declared = int(_header(headers, "content-length"))
    except ValueError:
        return
    boundary = len(sent_as.partition("boundary=")[2])
    received = sum(len(_as_bytes(name, value)) + len(name) for name, value in row.items())
    overhead = (len(row) + 1) * (boundary + _PART_HEADER_BYTES)
    if declared > received + overhead:
        raise RepeatedPart(
            "Two parts of the form have the same name, and TorchServe passes on only one of them. "
            "Give each image a name of its own (curl -F a=@1.jpg -F b=@2.jpg URL)."
        )


def _header(headers: Mapping[str, Any], name: str) -> str:
    """A request header, whatever its case; empty where there is none."""
    return next(
        (v for k, v in headers.items() if k.lower() == name and isinstance(v, str)), ""
    ).strip()


def _as_bytes(name: str, value: object) -> bytes | bytearray:
    match value:
        case bytes() | bytearray():
            return value
        case str():
            # TorchServe decodes parts announced as text/*.
            return value.encode("utf-8")
        case _:
            raise BadRequest(f"{name[:40]!a} must hold an image, not JSON.")


# --- JSON ---


def _json_document(row: Mapping[str, Any], headers: Mapping[str, Any]) -> dict[str, Any] | None:
    """The body, where it is JSON: TorchServe decodes it only if its content type says so.

    No image format begins with a brace, so a body without the right content type is noticed too.
    """
    body = row.get("body")
    if isinstance(body, bytes | bytearray):
        announced = "json" in _header(headers, "content-type")
        if not announced and not body[:64].lstrip().startswith(b"{"):
            return None
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("The body is not valid JSON.") from error
    elif body is None or isinstance(body, str):
        return None
    if not isinstance(body, dict):
        raise BadRequest('The JSON body must be an object, such as {"image": "<base64>"}.')
    return body


def _read_json(document: dict[str, Any], options: Options, max_images: int) -> ImagesRequest:
    parameters = document.get("parameters")
    if isinstance(parameters, dict):
        options = _read_options(parameters, options)
    options = _read_options(document, options)
    if "instances" in document:
        instances = _list(document, "instances")
        _check_count(len(instances), max_images)
        images = [_instance(i, instance) for i, instance in enumerate(instances)]
        return ImagesRequest(images, options, Form.KSERVE_V1)
    if "inputs" in document:
        return _read_kserve_v2(document, options, max_images)
    if "image" in document:
        return ImagesRequest([ImagePart("image", _from_base64(document["image"]))], options)
    raise MissingImage(
        'The JSON body holds no image. Send {"image": "<base64>"}, or a KServe request with '
        '"instances" or "inputs".'
    )


def _instance(index: int, instance: object) -> ImagePart:
    """`{"b64": "..."}`, the same one level down under an image's name, or the text itself."""
    value = instance
    while isinstance(value, dict):
        value = next((value[key] for key in _INSTANCE_KEYS if key in value), None)
    return ImagePart(f"instances[{index}]", _from_base64(value))


def _read_kserve_v2(document: dict[str, Any], options: Options, max_images: int) -> ImagesRequest:
    images: list[ImagePart] = []
    tensors = _list(document, "inputs")
    _check_count(len(tensors), max_images)
    for tensor in tensors:
        if not isinstance(tensor, dict) or tensor.get("datatype") != "BYTES":
            raise BadRequest(
                'Each of "inputs" must be a tensor of datatype "BYTES" whose data are images in '
                "base64."
            )
        name = str(tensor.get("name", "input"))[:_LONGEST_NAME]
        data = _flat(_list(tensor, "data"))
        _check_count(len(images) + len(data), max_images)
        images += [ImagePart(f"{name}[{i}]", _from_base64(item)) for i, item in enumerate(data)]
    request_id = document.get("id")
    return ImagesRequest(
        images,
        options,
        Form.KSERVE_V2,
        request_id[:_LONGEST_NAME] if isinstance(request_id, str) else None,
    )


def _list(mapping: Mapping[str, Any], key: str) -> list[Any]:
    value = mapping.get(key)
    if not isinstance(value, list):
        raise BadRequest(f'"{key}" must be a list.')
    return value


def _flat(data: list[Any]) -> list[Any]:
    """A tensor's data may be nested once, as rows of a batch."""
    if data and all(isinstance(row, list) for row in data):
        return [item for row in data for item in row]
    return data


def _from_base64(value: object) -> bytes | ClientError:
    if not isinstance(value, str):
        return BadRequest("An image in JSON must be a text in base64.")
    try:
        return base64.b64decode(_DATA_URL.sub("", value[:100]) + value[100:], validate=True)
    except (binascii.Error, ValueError):
        return BadRequest("The image's text is not valid base64.")


# --- Options ---


def _read_options(values: Mapping[str, Any], options: Options) -> Options:
    if "topk" in values:
        options = replace(options, topk=_read_topk(values["topk"]))
    if "threshold" in values:
        options = replace(options, threshold=_read_threshold(values["threshold"]))
    # Only an explanation needs these two, and checks them.
    if "class_index" in values:
        options = replace(options, class_index=_as_text(values["class_index"]))
    if "class_id" in values:
        options = replace(options, class_id=_as_text(values["class_id"]))
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


def _find_class(options: Options, labels: Sequence[Label]) -> int | None:
    """The position of the class asked for; None where none was."""
    by_id = by_index = None
    if options.class_id is not None:
        ids = [label.class_id for label in labels]
        if options.class_id not in ids:
            raise InvalidOption(f"class_id {_quoted(options.class_id)} is no class of this model.")
        by_id = ids.index(options.class_id)
    if options.class_index is not None:
        by_index = _read_class_index(options.class_index, len(labels))
    if by_id is not None and by_index is not None and by_id != by_index:
        raise InvalidOption("class_index and class_id name different classes. Give one of them.")
    return by_id if by_index is None else by_index


def _read_class_index(value: str, classes: int) -> int:
    try:
        index = int(value)
    except ValueError:
        index = -1
    if not 0 <= index < classes:
        raise InvalidOption(
            f"class_index must be a whole number from 0 to {classes - 1}, got {_quoted(value)}."
        )
    return index


def _as_text(value: object) -> str:
    """A form's field, or a number or text of JSON; anything else is no option's value."""
    match value:
        case bytes() | bytearray():
            return value.decode("utf-8", errors="replace")
        case bool():
            return ""
        case int() | float() | str():
            return str(value)
        case _:
            return ""


def _quoted(value: object) -> str:
    """A client's value for an error message: short, and printable ASCII only."""
    text = _as_text(value) if isinstance(value, bytes | bytearray | str) else repr(value)[:80]
    return ascii(text[:40])
