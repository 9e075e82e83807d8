"""Parse forms and raw bodies, as sent by the tutorials' clients, browsers and `curl -T`.

TorchServe passes one mapping per request. A raw body is the part `body`; a form's parts keep their
names, and so do query parameters on the paths for which TorchServe passes on the query. Only parts
sent as files have a content type.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from handler.archive import Archive
from handler.decoding.formats import begins_as_image
from handler.errors import BadRequest, MissingImage, NotAnImage, RepeatedPart, UnsupportedFormat
from handler.protocols.image_text import decode_if_text, is_image, reject_address
from handler.protocols.json_body import (
    JsonBody,
    announces_body,
    check_count,
    find_image,
    is_empty,
    json_image,
)
from handler.protocols.options import IMAGE_NAMES, WHOLE_NUMBER, quoted
from handler.request import (
    Body,
    Protocol,
    Request,
    RequestImage,
    Response,
    json_response,
    run_isolated,
)
from handler.results import result_of

_FORM_DATA = "multipart/form-data"
_FORM_URLENCODED = "application/x-www-form-urlencoded"

# Bytes of a form's part in addition to its name, its content and the preceding boundary; those that
# a file has in addition to its content type; and those of the last line.
_FIELD_LINES = len('--\r\nContent-Disposition: form-data; name=""\r\n\r\n\r\n')
_FILE_LINES = len('; filename=""Content-Type: \r\n')
_LAST_LINE = len("----\r\n")

# Allowance for bytes that the frontend does not pass on: a field's own Content-Type,
# Content-Transfer-Encoding and Content-Length, and a file's name. A file name of 255 bytes in
# base64 and again percent-encoded, as .NET writes it, takes 1,150 bytes; the allowance is for one
# such name per form and half of that for each other file.
_FIELD_SLACK = 128
_FILE_SLACK = 640

# No image in base64 is shorter, and few access tokens are longer.
_MIN_BASE64_LENGTH = 128

# A text up to this length in place of a file is taken for a file name.
_MAX_FILE_NAME_LENGTH = 255


class Form(Protocol):
    """A form or a raw body; the response is one result, or `{"results": [...]}` for several."""

    def parse(self, request: Request, body: JsonBody | None, archive: Archive) -> None:
        sent_as = request.header("content-type").lower()
        if sent_as.startswith("multipart/") and not is_form(request):
            raise UnsupportedFormat(
                f"The header Content-Type says {quoted(sent_as.partition(';')[0])}. Of multipart "
                "bodies, only multipart/form-data is accepted."
            )
        _check_nothing_was_lost(request)
        request.images = list(_image_parts(request, form_fields(request)))
        check_count(len(request.images), archive.settings.max_images)
        if not request.images:
            _explain_missing_image(request)

    def format(self, request: Request, archive: Archive) -> Response:
        results = [result_of(image) for image in request.images]
        if len(results) == 1:
            return json_response({**results[0], **archive.warning})
        named = zip(request.images, results, strict=True)
        body: Body = {
            "success": all(result["success"] for result in results),
            "results": [{"name": image.name, **result} for image, result in named],
            **archive.warning,
        }
        return json_response(body)


class JsonImage(Form):
    """`{"image": "<base64>"}`, a list `images` of such values, or what `find_image` finds."""

    def parse(self, request: Request, body: JsonBody | None, archive: Archive) -> None:
        assert body is not None
        body.parse_options(request)
        if isinstance(body.document.get("images"), list):
            body.parse_images(request, "images", archive.settings.max_images)
            return
        image = find_image(body.document)
        if image is None:
            raise MissingImage(
                'The JSON body holds no image. Send {"image": "<base64>"}, or a KServe request '
                'with "instances" or "inputs".'
            )
        request.images = [json_image(request, "image", image)]


def form_fields(request: Request) -> dict[str, Any]:
    """Return the parts that were not sent as files, including query parameters."""
    return {name: value for name, value in request.row.items() if not _is_file(request, name)}


def is_form(request: Request) -> bool:
    """Return whether the Content-Type is a form's."""
    return any(
        name.lower() == "content-type"
        and str(value).lower().lstrip().startswith((_FORM_DATA, _FORM_URLENCODED))
        for name, value in request.headers.items()
    )


def _is_file(request: Request, name: str) -> bool:
    """Return whether a part was sent as a file, which has a content type.

    If the request has a header with the part's name, TorchServe replaces the part's headers by it;
    then everything except a short text counts as a file.
    """
    own = request.headers.get(name)
    if isinstance(own, Mapping):
        return bool(own.get("content-type"))
    return isinstance(own, str) and not _is_short_text(request.row[name])


def _is_short_text(value: object) -> bool:
    return (
        isinstance(value, bytes | bytearray | str)
        and len(value) <= _MAX_FILE_NAME_LENGTH
        and value.isascii()
    )


def _image_parts(request: Request, fields: Mapping[str, Any]) -> Iterator[RequestImage]:
    """Yield each part that was sent as a file or under an image's name, or that is an image."""
    for name, value in request.row.items():
        is_field = name in fields
        if is_field and name not in IMAGE_NAMES and not _is_image(value):
            continue  # an option or an unrelated field
        if name == "body" and is_empty(value) and not announces_body(request):
            continue  # a GET request
        image = RequestImage(request.request_id, name)
        run_isolated(image, partial(_fill_in, value=value, is_field=is_field and is_form(request)))
        yield image


def _fill_in(image: RequestImage, value: object, *, is_field: bool) -> None:
    if not isinstance(value, bytes | bytearray | str):
        raise BadRequest(f"{quoted(image.name)} must hold an image, not JSON.")
    data = decode_if_text(_as_bytes(value))
    if is_field and data and _is_short_text(data):
        raise NotAnImage(
            f'The field "{image.name}" holds a short text, not a file. To send a file with curl, '
            f"write @ before its name: curl -F {image.name}=@cat.jpg URL"
        )
    image.data = data


def _is_image(value: object) -> bool:
    """Return whether a field of any name holds an image, as bytes or in base64.

    A signature is not sufficient: a text may begin with "BM" like a BMP, and a random token of 64
    characters may begin like a JPEG in base64.
    """
    if not isinstance(value, bytes | bytearray):
        return False
    if begins_as_image(value) and b"\0" in value:
        return True
    head = bytes(value[:_MIN_BASE64_LENGTH])
    return len(head) == _MIN_BASE64_LENGTH and head.isascii() and is_image(head.decode("ascii"))


def _check_nothing_was_lost(request: Request) -> None:
    """Raise `RepeatedPart` if parts share a name, of which the frontend silently keeps the last.

    The parts that arrived must account for the request's length, with an allowance for the bytes
    that the frontend does not pass on. The README lists the cases that remain undetected.
    """
    sent_as, length = request.header("content-type"), request.header("content-length")
    if not sent_as.lower().startswith(_FORM_DATA) or not WHOLE_NUMBER.fullmatch(length):
        return
    given = re.split("boundary=", sent_as, flags=re.IGNORECASE)[-1]
    boundary = len(given.split(";")[0].strip('" '))
    accounted, files = boundary + _LAST_LINE, 0
    for name, value in request.row.items():
        if not isinstance(value, bytes | bytearray | str):
            return  # TorchServe parsed it; its length is unknown
        accounted += boundary + _FIELD_LINES + len(_as_bytes(name)) + len(_as_bytes(value))
        if _is_file(request, name):
            files += 1
            own = request.headers[name]
            content_type = own["content-type"] if isinstance(own, Mapping) else ""
            accounted += _FILE_LINES + len(content_type)
    slack = _FIELD_SLACK * len(request.row) + _FILE_SLACK * (files + min(files, 1))
    if int(length) > accounted + slack:
        raise RepeatedPart(
            "Two parts of the form have the same name, and TorchServe passes on only one of them. "
            "Give each image a name of its own (curl -F a=@1.jpg -F b=@2.jpg URL)."
        )


def _explain_missing_image(request: Request) -> None:
    """Raise `BadRequest` if the request holds JSON sent as a form, or an address."""
    if is_form(request) and any(name.lstrip()[:1] in {"{", "["} for name in request.row):
        raise BadRequest(
            "The body looks like JSON, but the header Content-Type announces a form, as curl's -d "
            "does. Send the header Content-Type: application/json as well "
            "(curl -H 'Content-Type: application/json' -d @request.json URL)."
        )
    for value in form_fields(request).values():
        if isinstance(value, bytes | bytearray):
            reject_address(value[:_MAX_FILE_NAME_LENGTH].decode("ascii", "replace"))


def _as_bytes(value: bytes | bytearray | str) -> bytes | bytearray:
    """Encode a part that TorchServe decoded as text; JSON may contain unpaired surrogates."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
