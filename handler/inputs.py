"""From one TorchServe request row and its headers to images and options.

TorchServe hands a handler one mapping for each request: a raw body arrives under `body`, each part
of a form under its own name, and so does each query parameter where TorchServe passes the query
on. A part that was sent as a file has a content type, any other has none.
"""

import base64
import binascii
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from handler.errors import (
    BadRequest,
    InvalidOption,
    MissingImage,
    NotAnImage,
    RepeatedPart,
    TooManyImages,
)
from handler.exchange import EMBEDDING, Options, Protocol, Purpose, Request, RequestImage, attempt
from handler.json_body import read_json
from handler.kserve import BINARY_HEADER, BinaryData, read_outputs, read_request_id, read_tensor
from handler.labels import Label
from handler.settings import Settings

# Names under which clients send an image even where nothing says that it is a file: a raw body,
# gRPC, and the tutorials' forms.
_IMAGE_NAMES = ("body", "data", "file", "image")

_OPTION_NAMES = ("topk", "threshold", "class_index", "class_id", EMBEDDING)

_FLAGS = {"true": True, "1": True, "false": False, "0": False}

# How alike two names are of which one is taken for the other's misspelling: "treshold" and "top_k"
# are; "class" and "token" are not.
_ALIKE = 0.8
_LONGEST_NAME = 20
# A look costs 20 microseconds, and 20 MB hold a million names.
_NAMES_LOOKED_AT = 100

# Under which of its keys an instance of a KServe V1 request holds the image.
_INSTANCE_KEYS = ("b64", "image", "data", "image_bytes")

_FORM_DATA = "multipart/form-data"
_FORM_URLENCODED = "application/x-www-form-urlencoded"

# What a form's part costs beside its name, its content and the boundary before it.
_FIELD_LINES = len('--\r\nContent-Disposition: form-data; name=""\r\n\r\n\r\n')
_FILE_LINES = _FIELD_LINES + len('; filename=""')
_CONTENT_TYPE_LINE = len("Content-Type: \r\n")
_LAST_LINE = len("----\r\n")

# What the frontend does not pass on: a field's own Content-Type, Content-Transfer-Encoding and
# Content-Length; of a file also its name. A name of 255 bytes, twice, once in base64 and once
# percent-encoded (as .NET writes it), takes 1,150; one of a form may be like that, the others have
# half of it.
_UNKNOWN_OF_A_FIELD = 128
_UNKNOWN_OF_A_FILE = 640
_UNKNOWN_OF_THE_LONGEST_FILE_NAME = 640

# So short a text in a file's place is the name of a file.
_LONGEST_FILE_NAME = 255

_DATA_URL = re.compile(r"\s*data:[^,]{0,300};\s*base64\s*,", re.IGNORECASE)
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_BETWEEN_LINES = b" \t\r\n"
_BASE64_GROUP = 4

# What Python reads as a number is more: "1_0", and the digits of every script.
_WHOLE_NUMBER = re.compile(r"[0-9]{1,4000}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,9})?")

_HOW_TO_SEND = (
    "Send the file as the body (curl -T cat.jpg URL) or in a form (curl -F file=@cat.jpg URL)."
)


def read(request: Request, settings: Settings, labels: Sequence[Label]) -> None:
    """Finds out what a request wants: fills in its purpose, images, options and protocol.

    Args:
        request: with its row, its headers, and the options of one that chooses nothing.
        settings: the bounds.
        labels: the classes that can be asked for.

    Raises:
        ClientError: the row holds no image, too many, or an option with a bad value. What is wrong
            with one of several images is that image's own error.
    """
    if _is_description(request):
        request.purpose = Purpose.DESCRIBE
        return
    if _is_empty(request.row.get("body")) and _prefers(request, "text/html", "application/json"):
        request.purpose = Purpose.PAGE
        return
    if request.headers.get("explain") == "True":
        request.purpose = Purpose.EXPLAIN
    _read_images(request, settings.max_images)
    if request.purpose is Purpose.EXPLAIN:
        request.class_index = _find_class(request.options, labels)
        request.as_picture = _wants_picture(request)


def _is_description(request: Request) -> bool:
    """`GET /models/{name}?customized=true` of the management API.

    It is the only call without any part: whatever header a client of the inference API sends, its
    body is one, unless it is announced as a form.
    """
    return (
        request.headers.get("describe") == "True"
        and not request.row
        and not any(
            name.lower() == "content-type" and str(value).lower().lstrip().startswith(form)
            for name, value in request.headers.items()
            for form in (_FORM_DATA, _FORM_URLENCODED)
        )
    )


def _is_empty(body: object) -> bool:
    return isinstance(body, bytes | bytearray | str) and not body


def _read_images(request: Request, max_images: int) -> None:
    row = request.row
    fields = {name: value for name, value in row.items() if not _is_file(request, name)}
    request.options = _read_options(fields, request.options)
    document, binary = _json_document(request)
    if document is not None:
        _read_json(request, document, binary, max_images)
        del binary
        _release(request.row.get("body"))
    else:
        _check_nothing_was_lost(request)
        request.images = list(_image_parts(request, fields))
        _check_count(len(request.images), max_images)
    if not request.images:
        _refuse_json_in_a_form(request)
        raise MissingImage(f"The request holds no image. {_HOW_TO_SEND}")


def _wants_picture(request: Request) -> bool:
    """A picture, unless the `Accept` header or KServe's protocol asks for JSON."""
    if request.protocol is not Protocol.PLAIN or _prefers(request, "application/json", "image/png"):
        return False
    if len(request.images) > 1:
        raise BadRequest(
            f"The request holds {len(request.images)} images, and a picture can explain only one. "
            "Send one, or ask for numbers with the header Accept: application/json."
        )
    return True


def _check_count(images: int, max_images: int) -> None:
    if images > max_images:
        raise TooManyImages(
            f"The request holds {images} images; at most {max_images} are accepted. "
            "Send the others in another request."
        )


# --- What the client accepts ---


def _prefers(request: Request, media_type: str, other: str) -> bool:
    """Whether the `Accept` header weighs one media type more than another.

    Where it weighs them alike, only a type that it names is preferred: a wildcard asks for nothing.
    """
    weights = _accepted(request.header("accept"))
    weight, others = _weight(weights, media_type), _weight(weights, other)
    return weight > others or (weight == others > 0 and media_type in weights)


def _accepted(header: str) -> dict[str, float]:
    """Media type or range to its weight, 0 to 1 (RFC 9110, 12.5.1)."""
    weights = {}
    for entry in header.lower().split(","):
        media_type, *parameters = (part.strip() for part in entry.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        is_weight = re.fullmatch(r"[01](\.[0-9]{0,9})?", weight)
        weights[media_type] = min(1.0, float(weight)) if is_weight else 1.0
    return weights


def _weight(weights: Mapping[str, float], media_type: str) -> float:
    ranges = (media_type, media_type.partition("/")[0] + "/*", "*/*")
    return next((weights[found] for found in ranges if found in weights), 0.0)


# --- Bodies and forms ---


def _is_file(request: Request, name: str) -> bool:
    """Whether a part was sent as a file: those have a content type.

    Where the request has a header of the part's name, TorchServe puts that in the place of the
    part's own; then whatever is no short text is a file.
    """
    own = request.headers.get(name)
    if isinstance(own, Mapping):
        return bool(own.get("content-type"))
    return isinstance(own, str) and not _is_short_text(request.row[name])


def _is_short_text(value: object) -> bool:
    return (
        isinstance(value, bytes | bytearray | str)
        and len(value) <= _LONGEST_FILE_NAME
        and value.isascii()
    )


def _image_parts(request: Request, fields: Mapping[str, Any]) -> Iterator[RequestImage]:
    """Every part that was sent as a file, or under a name that is an image's."""
    for name, value in request.row.items():
        is_field = name in fields
        if is_field and name not in _IMAGE_NAMES:
            continue  # an option, or a field that is not for us
        if name == "body" and _is_empty(value) and not _announces_a_body(request):
            continue  # a GET
        image = RequestImage(request.request_id, name)
        if is_field and value and _is_form(request) and _is_short_text(value):
            image.error = NotAnImage(
                f'The field "{name}" holds a short text, not a file. To send a file with curl, '
                f"write @ before its name: curl -F {name}=@cat.jpg URL"
            )
        elif isinstance(value, bytes | bytearray | str):
            image.data = _as_bytes(value)
        else:
            image.error = BadRequest(f"{_quoted(name)} must hold an image, not JSON.")
        yield image


def _announces_a_body(request: Request) -> bool:
    """Tells an upload of nothing from a `GET`, whose method TorchServe does not pass on.

    To a request without a length TorchServe's frontend adds one, in lower case.
    """
    names = [name for name in request.headers if name != "content-length"]
    return any(name.lower() in {"content-length", "transfer-encoding"} for name in names)


def _is_form(request: Request) -> bool:
    return request.header("content-type").lower().startswith((_FORM_DATA, _FORM_URLENCODED))


def _check_nothing_was_lost(request: Request) -> None:
    """Notices parts of one name: the frontend keeps the last one of them, and says nothing.

    The request's length tells: what was received must account for it, but for what the frontend
    does not pass on of a part. See the README for what that leaves unnoticed.
    """
    sent_as = request.header("content-type")
    length = request.header("content-length")
    if not sent_as.lower().startswith(_FORM_DATA) or not _WHOLE_NUMBER.fullmatch(length):
        return
    boundary = len(
        re.split("boundary=", sent_as, flags=re.IGNORECASE)[-1].split(";")[0].strip('" ')
    )
    accounted, unknown = boundary + _LAST_LINE, 0
    files = 0
    for name, value in request.row.items():
        if not isinstance(value, bytes | bytearray | str):
            return  # TorchServe parsed it, and its length is not known
        accounted += boundary + _FIELD_LINES + len(_as_bytes(name)) + len(_as_bytes(value))
        if _is_file(request, name):
            files += 1
            own = request.headers[name]
            content_type = own["content-type"] if isinstance(own, Mapping) else ""
            accounted += _FILE_LINES - _FIELD_LINES + _CONTENT_TYPE_LINE + len(content_type)
            unknown += _UNKNOWN_OF_A_FILE
        unknown += _UNKNOWN_OF_A_FIELD
    if files:
        unknown += _UNKNOWN_OF_THE_LONGEST_FILE_NAME
    if int(length) > accounted + unknown:
        raise RepeatedPart(
            "Two parts of the form have the same name, and TorchServe passes on only one of them. "
            "Give each image a name of its own (curl -F a=@1.jpg -F b=@2.jpg URL)."
        )


def _refuse_json_in_a_form(request: Request) -> None:
    """Says which header is missing where curl's -d announced JSON as a form."""
    if _is_form(request) and any(name.lstrip()[:1] in {"{", "["} for name in request.row):
        raise BadRequest(
            "The body looks like JSON, but the header Content-Type announces a form, as curl's -d "
            "does. Send the header Content-Type: application/json as well "
            "(curl -H 'Content-Type: application/json' -d @request.json URL)."
        )


def _as_bytes(value: bytes | bytearray | str) -> bytes | bytearray:
    """TorchServe decodes parts announced as text/*; a JSON text may hold half a character."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


# --- JSON ---


def _json_document(request: Request) -> tuple[dict[str, Any] | None, BinaryData]:
    """The body, where it is JSON, and the binary data that follow it in KServe V2.

    TorchServe decodes it only if its content type says so, if at all. No image format begins with a
    brace, so that a body of another content type is noticed too, as a browser's `fetch` sends it.
    """
    body = request.row.get("body")
    announced = "json" in request.header("content-type").lower()
    binary = BinaryData(b"")
    if body is None or (_is_empty(body) and not _announces_a_body(request)):
        return None, binary  # a form, or a GET
    if isinstance(body, bytes | bytearray) and (length := request.header(BINARY_HEADER)):
        body, binary = _split(body, length)
        announced = True
    # Of an announced body TorchServe makes a text only where it is a JSON text.
    if isinstance(body, bytes | bytearray) or (isinstance(body, str) and not announced):
        if not announced and not _begins_as_an_object(body):
            return None, binary
        try:
            body = read_json(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("The body is not valid JSON.") from error
    if not isinstance(body, dict):
        raise BadRequest('The JSON body must be an object, such as {"image": "<base64>"}.')
    return body, binary


def _release(body: object) -> None:
    """The memory of a body whose images were taken out of it; TorchServe holds on to the body."""
    if isinstance(body, bytearray):
        with suppress(BufferError):  # an image is still a part of it
            body.clear()


def _begins_as_an_object(body: bytes | bytearray | str) -> bool:
    head = body[:64].lstrip()
    return head.startswith("{") if isinstance(head, str) else head.startswith(b"{")


def _split(body: bytes | bytearray, length: str) -> tuple[bytes | bytearray, BinaryData]:
    """JSON and the tensors' data behind it."""
    if not _WHOLE_NUMBER.fullmatch(length) or int(length) > len(body):
        raise BadRequest(
            f"{BINARY_HEADER.title()} must be the length of the JSON in bytes, at most "
            f"{len(body)}, got {_quoted(length)}."
        )
    return body[: int(length)], BinaryData(memoryview(body)[int(length) :])


def _read_json(
    request: Request, document: dict[str, Any], binary: BinaryData, max_images: int
) -> None:
    parameters = document.get("parameters")
    if isinstance(parameters, dict):
        request.options = _read_options(parameters, request.options)
    request.options = _read_options(document, request.options)
    if "instances" in document:
        request.protocol = Protocol.KSERVE_V1
        instances = _list(document, "instances")
        _check_count(len(instances), max_images)
        values = {f"instances[{i}]": _instance(value) for i, value in enumerate(instances)}
        request.images = [_image(request, name, value) for name, value in values.items()]
    elif "inputs" in document:
        request.protocol = Protocol.KSERVE_V2
        request.client_id = read_request_id(document)
        request.outputs = read_outputs(
            document,
            explained=request.purpose is Purpose.EXPLAIN,
            multilabel=request.multilabel,
        )
        tensors = _list(document, "inputs")
        _check_count(len(tensors), max_images)
        for tensor in tensors:
            name, images = read_tensor(tensor, binary, max_images)
            request.images += [
                _image(request, f"{name}[{i}]", value) for i, value in enumerate(images)
            ]
            _check_count(len(request.images), max_images)
    elif "image" in document:
        request.images = [_image(request, "image", document["image"])]
    else:
        raise MissingImage(
            'The JSON body holds no image. Send {"image": "<base64>"}, or a KServe request with '
            '"instances" or "inputs".'
        )
    binary.check_used()


def _instance(value: object) -> object:
    """`{"b64": "..."}`, the same one level down under an image's name, or the text itself."""
    while isinstance(value, dict):
        value = next((value[key] for key in _INSTANCE_KEYS if key in value), None)
    return value


def _list(mapping: Mapping[str, Any], key: str) -> list[Any]:
    value = mapping.get(key)
    if not isinstance(value, list):
        raise BadRequest(f'"{key}" must be a list.')
    return value


def _image(request: Request, name: str, value: object) -> RequestImage:
    """An image of a JSON body: text in base64, or its bytes."""
    image = RequestImage(request.request_id, name)

    def fill_in(image: RequestImage) -> None:
        image.data = value if isinstance(value, bytes | bytearray) else _from_base64(value)

    attempt(image, fill_in)
    return image


def _from_base64(value: object) -> bytes:
    """Standard or URL-safe, padded or not, with line breaks or not, in a data URL or not."""
    if not isinstance(value, str):
        raise BadRequest("An image in JSON must be a text in base64.")
    data_url = _DATA_URL.match(value)
    try:
        text = (value[data_url.end() :] if data_url else value).encode("ascii")
        text = text.translate(_STANDARD_ALPHABET, _BETWEEN_LINES)
        if not text.endswith(b"="):
            text += b"=" * (-len(text) % _BASE64_GROUP)
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("The image's text is not valid base64.") from error


# --- Options ---


def _read_options(values: Mapping[str, Any], options: Options) -> Options:
    _refuse_misspelt(values)
    if "topk" in values:
        options = replace(options, topk=_read_topk(values["topk"]))
    if "threshold" in values:
        options = replace(options, threshold=_read_threshold(values["threshold"]))
    if EMBEDDING in values:
        options = replace(options, embedding=_read_flag(EMBEDDING, values[EMBEDDING]))
    # Only an explanation needs these two, and checks them.
    if "class_index" in values:
        options = replace(options, class_index=_as_text(values["class_index"])[:_LONGEST_NAME])
    if "class_id" in values:
        options = replace(options, class_id=_as_text(values["class_id"])[:_LONGEST_NAME])
    return options


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Names that are nearly an option's; all others are somebody else's, such as "submit"."""
    for name in islice(names, _NAMES_LOOKED_AT):
        if name in _OPTION_NAMES or name in _IMAGE_NAMES or len(name) > _LONGEST_NAME:
            continue
        meant = difflib.get_close_matches(name.lower(), _OPTION_NAMES, n=1, cutoff=_ALIKE)
        if meant:
            raise InvalidOption(
                f"There is no option {_quoted(name)}: did you mean {meant[0]}? "
                f"Options are {', '.join(_OPTION_NAMES)}."
            )


def _read_topk(value: object) -> int:
    topk = _whole_number(value)
    if topk is None or topk < 1:
        raise InvalidOption(f"topk must be a whole number of 1 or more, got {_quoted(value)}.")
    return topk


def _read_threshold(value: object) -> float:
    text = _as_text(value).strip()
    threshold = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0 <= threshold <= 1:
        raise InvalidOption(f"threshold must be a number from 0 to 1, got {_quoted(value)}.")
    return threshold


def _read_flag(name: str, value: object) -> bool:
    text = str(value).lower() if isinstance(value, bool) else _as_text(value).strip().lower()
    if text not in _FLAGS:
        raise InvalidOption(f"{name} must be true or false, got {_quoted(value)}.")
    return _FLAGS[text]


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
    index = _whole_number(value)
    if index is None or index >= classes:
        raise InvalidOption(
            f"class_index must be a whole number from 0 to {classes - 1}, got {_quoted(value)}."
        )
    return index


def _whole_number(value: object) -> int | None:
    text = _as_text(value).strip()
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else None


def _as_text(value: object) -> str:
    """A form's field, or a number or text of JSON; anything else is no option's value."""
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


def _quoted(value: object) -> str:
    """A client's value for an error message: short, and printable ASCII only."""
    match value:
        case list() | dict():
            return "a list" if isinstance(value, list) else "an object"
        case bool() | None:
            return json.dumps(value)
        case _:
            return ascii(_as_text(value)[:40])
