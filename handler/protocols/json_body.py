"""Parse JSON bodies within limits of time and memory, and extract their images."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from handler.errors import BadRequest, TooManyImages
from handler.protocols.image_text import decode_if_text, from_base64, is_address, is_image
from handler.protocols.options import WHOLE_NUMBER, parse_options, quoted
from handler.request import Request, RequestImage, run_isolated

# Header with the length of the JSON if KServe V2's binary tensors follow it (Triton's "binary
# tensor data" extension).
BINARY_HEADER = "inference-header-content-length"

# Maximum number of lists, objects and their members. A byte of JSON can take 30 bytes of memory,
# since each empty list or object is a Python object. 16 images with names and options have some
# hundreds; images as lists of numbers would have more, and are not accepted.
_MAX_PARTS = 100_000

# Keys under which clients send an image, and the maximum depth at which they are searched.
_IMAGE_KEYS = ("image", "b64", "base64", "data", "image_bytes", "image_base64")
_MAX_DEPTH = 4


class BinaryData:
    """The bytes after a request's JSON; the tensors take them in order."""

    def __init__(self, data: bytes | memoryview = b"") -> None:
        self._left = memoryview(data)

    def take(self, size: object) -> memoryview:
        """Return the next `size` bytes, a tensor's `binary_data_size`, or raise `BadRequest`."""
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(self._left):
            raise BadRequest(
                '"binary_data_size" must be the number of the tensor\'s bytes behind the JSON, of '
                f"which {len(self._left)} are left. They begin where the header "
                "Inference-Header-Content-Length says."
            )
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def check_used(self) -> None:
        """Raise `BadRequest` if bytes are left after all tensors."""
        if self._left:
            raise BadRequest(
                f"{len(self._left)} bytes behind the JSON belong to no tensor. Each tensor's "
                '"parameters" must hold its "binary_data_size".'
            )


@dataclass
class JsonBody:
    """A JSON body that is an object, and the bytes after it."""

    document: Mapping[str, Any]
    binary: BinaryData

    def list(self, key: str) -> list[Any]:
        """Return the list under a key; raise `BadRequest` if there is none."""
        value = self.document.get(key)
        if not isinstance(value, list):
            raise BadRequest(f'"{key}" must be a list.')
        return value

    def parse_options(self, request: Request) -> None:
        """Set the request's options from the object and from its `parameters`."""
        parameters = self.document.get("parameters")
        for values in (parameters if isinstance(parameters, dict) else {}, self.document):
            request.options = parse_options(values, request.options)

    def parse_images(self, request: Request, key: str, max_images: int) -> None:
        """Set the request's images from the list under a key."""
        values = self.list(key)
        check_count(len(values), max_images)
        request.images = [
            json_image(request, f"{key}[{i}]", value) for i, value in enumerate(values)
        ]


def parse_json(request: Request) -> JsonBody | None:
    """Parse the body if it is JSON.

    JSON is recognized without a JSON content type too, as a browser's `fetch` sends it: no image
    format begins with a brace or a quotation mark.

    Returns:
        the body; None if the request is a form, a file or a `GET`.

    Raises:
        BadRequest: the content type is JSON or the body begins like JSON, but it is not valid JSON
            or not an object.
    """
    body = request.row.get("body")
    announced = "json" in request.header("content-type").lower()
    binary = BinaryData()
    if body is None or (is_empty(body) and not announces_body(request)):
        return None
    if isinstance(body, bytes | bytearray) and (length := request.header(BINARY_HEADER)):
        if not WHOLE_NUMBER.fullmatch(length) or int(length) > len(body):
            raise BadRequest(
                f"{BINARY_HEADER.title()} must be the length of the JSON in bytes, at most "
                f"{len(body)}, got {quoted(length)}."
            )
        body, binary = body[: int(length)], BinaryData(memoryview(body)[int(length) :])
        announced = True
    # TorchServe decodes a JSON text whose content type is JSON.
    if isinstance(body, bytes | bytearray) or (isinstance(body, str) and not announced):
        if not announced and not _begins_as_json(body):
            return None
        try:
            body = _loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("The body is not valid JSON.") from error
    if isinstance(body, str):
        body = {"image": body}
    if not isinstance(body, dict):
        raise BadRequest('The JSON body must be an object, such as {"image": "<base64>"}.')
    return JsonBody(body, binary)


def _begins_as_json(body: bytes | bytearray | str) -> bool:
    """Return whether the body begins like an object, or like an image's text in JSON."""
    head = body[:64].lstrip()
    start = head.encode("utf-8", "replace") if isinstance(head, str) else head
    return start.startswith((b"{", b'"'))


def _loads(body: bytes | bytearray | str) -> Any:
    """Parse JSON in UTF-8, UTF-16 or UTF-32; raise `ValueError` or `BadRequest`."""
    text = body if isinstance(body, str) else body.decode(json.detect_encoding(body))
    if sum(map(text.count, "[{,")) > _MAX_PARTS:
        raise BadRequest(
            f"The JSON body has more than {_MAX_PARTS:,} lists, objects and values. Send images "
            "in base64, not as lists of numbers."
        )
    return json.loads(text)


def is_empty(body: object) -> bool:
    """Return whether a body has no bytes."""
    return isinstance(body, bytes | bytearray | str) and not body


def announces_body(request: Request) -> bool:
    """Return whether a request without content is an upload, not a `GET`.

    TorchServe does not pass on the method, and its frontend adds a Content-Length in lower case to
    requests that have none.
    """
    names = [name for name in request.headers if name != "content-length"]
    return any(name.lower() in {"content-length", "transfer-encoding"} for name in names)


def release_body(request: Request) -> None:
    """Free the memory of a body after its images were extracted; TorchServe keeps a reference."""
    body = request.row.get("body")
    if isinstance(body, bytearray):
        with suppress(BufferError):  # an image is still a view of it
            body.clear()


def json_image(request: Request, name: str, value: object) -> RequestImage:
    """Return an image from a JSON body; if its value is malformed, the error is stored on it.

    The value is text in base64, bytes, or an object that holds one of them; see `find_image`.
    """
    image = RequestImage(request.request_id, name)

    def fill_in(image: RequestImage) -> None:
        found = find_image(value) if isinstance(value, dict) else value
        if isinstance(found, bytes | bytearray):
            image.data = decode_if_text(found)
        elif isinstance(found, str):
            image.data = from_base64(found)
        else:
            raise BadRequest("An image in JSON must be a text in base64.")

    run_isolated(image, fill_in)
    return image


def find_image(document: Mapping[str, Any], depth: int = _MAX_DEPTH) -> object:
    """Return the image in an object; None if there is none.

    It is the value of one of `_IMAGE_KEYS`, or else the first text that is an image or an address.
    """
    named = next((document[key] for key in _IMAGE_KEYS if key in document), None)
    values = document.values() if named is None else (named,)
    for value in values:
        if isinstance(value, dict) and depth:
            found = find_image(value, depth - 1)
            if found is not None:
                return found
        elif isinstance(value, str) and (is_image(value) or is_address(value)):
            return value
    return named


def check_count(images: int, max_images: int) -> None:
    """Raise `TooManyImages` if a request holds more than `max_images`."""
    if images > max_images:
        raise TooManyImages(
            f"The request holds {images} images; at most {max_images} are accepted. "
            "Send the others in another request."
        )
