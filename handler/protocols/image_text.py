"""Decode images sent as text in base64 or a data URL, and reject addresses."""

import base64
import binascii
import re

from handler.decoding.formats import begins_as_image
from handler.errors import BadRequest

_DATA_URL = re.compile(r"\s*data:[^,]{0,300};\s*base64\s*,", re.IGNORECASE)
# Python's representation of bytes, as `str(base64.b64encode(content))` returns it.
_PYTHON_BYTES = re.compile(r"\s*b(['\"])")
_ESCAPES = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.:-]{1,30}://", re.IGNORECASE)
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n"
_BASE64_GROUP = 4
# Enough characters to distinguish base64 from binary files and other text.
_HEAD = 64
# The beginning of a data URL, and so many characters after it.
_MAX_FRAME = 8 * _HEAD
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]*")


def from_base64(text: str) -> bytes:
    """Decode standard or URL-safe base64, with or without padding or line breaks.

    The text may be a data URL, percent-encoded or not, or Python's `b'...'`.

    Raises:
        BadRequest: the text is an address or not base64.
    """
    reject_address(text)
    try:
        content = _without_frame(text).encode("ascii").translate(_STANDARD_ALPHABET, _WHITE_SPACE)
        if not content.endswith(b"="):
            content += b"=" * (-len(content) % _BASE64_GROUP)
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(
            "The image's text is not valid base64. Send the content of the file, not its name."
        ) from error


def _without_frame(text: str) -> str:
    """Return the base64 in a data URL or in Python's `b'...'`; any other text unchanged."""
    if url := _DATA_URL.match(text):
        content = text[url.end() :]
        if "%" in content:  # `unquote` would take 250 MB for 20 MB of escapes
            for escape, character in _ESCAPES.items():
                content = content.replace(escape, character).replace(escape.lower(), character)
        return content
    if python := _PYTHON_BYTES.match(text):
        return text[python.end() :].rstrip().removesuffix(python[1])
    return text


def is_address(text: str) -> bool:
    """Return whether a text is an address, such as https://... or s3://..."""
    return _ADDRESS.match(text) is not None


def reject_address(text: str) -> None:
    """Raise `BadRequest` if a text is an address."""
    if is_address(text):
        raise BadRequest(
            "This is an address, not an image. The service downloads nothing, or a client could "
            "make it read what only its own network can reach. Download the image, and send its "
            "bytes, or these in base64."
        )


def is_image(text: str) -> bool:
    """Return whether a text is the beginning of an image in base64."""
    head = _without_frame(text[:_MAX_FRAME])[:_HEAD]
    if _BASE64.fullmatch(head) is None:
        return False
    try:
        return begins_as_image(from_base64(head[: len(head) // _BASE64_GROUP * _BASE64_GROUP]))
    except BadRequest:
        return False


def decode_if_text(data: bytes | bytearray) -> bytes | bytearray:
    """Decode a file or raw body that holds an image in base64; return any other data unchanged.

    Raises:
        BadRequest: the data is an address, or the base64 is damaged.
    """
    head = bytes(data[:_MAX_FRAME])
    if not head.isascii():
        return data
    text = head.decode("ascii")
    if is_address(text) or is_image(text):
        return from_base64(data.decode("ascii", "replace"))
    return data
