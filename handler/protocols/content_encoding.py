"""Decompress gzip and deflate bodies (RFC 9110, 8.4) within the maximum request size."""

import zlib
from contextlib import suppress

from handler.errors import BadRequest, TooLarge, UnsupportedFormat
from handler.protocols.forms import is_form
from handler.protocols.json_body import is_empty
from handler.protocols.options import quoted
from handler.request import Request
from handler.settings import MAX_REQUEST_BYTES

# zlib's window parameters: detect a gzip or zlib header; raw deflate without a header.
_ANY_HEADER, _NO_HEADER = 47, -15
_GZIP = b"\x1f\x8b"
# Each has up to 64 kB in some formats, such as bgzip's.
_MAX_MEMBERS = 2_000
_PIECE_BYTES = 1 << 16


def decompress_body(request: Request) -> None:
    """Replace a compressed body by its content.

    Raises:
        UnsupportedFormat: the encoding is another one, or the body is a form, which TorchServe has
            already parsed.
        TooLarge: the content exceeds the maximum request size.
        BadRequest: the body does not match the header.
    """
    encoding = request.header("content-encoding")
    body = request.row.get("body")
    if encoding.lower() in {"", "identity"} or is_empty(body):
        return
    if encoding.lower() not in {"gzip", "x-gzip", "deflate"} or is_form(request):
        raise UnsupportedFormat(
            f"The header Content-Encoding says {quoted(encoding)}. Accepted are gzip and deflate, "
            "of an image or JSON, not of a form. Send the body without compression, and without "
            "this header."
        )
    if not isinstance(body, bytes | bytearray):
        raise BadRequest("The header Content-Encoding says that the body is compressed; it is not.")
    request.row = {**request.row, "body": _decompress(body)}


def _decompress(body: bytes | bytearray) -> bytearray:
    for window in (_ANY_HEADER, _NO_HEADER):
        with suppress(zlib.error):
            return _members(memoryview(body), window)
    raise BadRequest(
        "The header Content-Encoding says that the body is compressed, but it cannot be "
        "decompressed: it is damaged, cut off, or not compressed."
    )


def _members(body: memoryview, window: int) -> bytearray:
    """Return the content of all members, of which a gzip file may have several (RFC 1952, 2.2).

    Raises:
        zlib.error: the body is not in this format, cut off, or has data or too many members after
            the first.
    """
    content, position = bytearray(), 0
    for _ in range(_MAX_MEMBERS):
        decompressor = zlib.decompressobj(window)
        while not decompressor.eof and position < len(body):
            piece = body[position : position + _PIECE_BYTES]
            content += decompressor.decompress(piece, MAX_REQUEST_BYTES + 1 - len(content))
            if len(content) > MAX_REQUEST_BYTES:
                raise TooLarge(
                    f"The body is larger than {MAX_REQUEST_BYTES >> 20} MB after decompression."
                )
            position += len(piece) - len(decompressor.unused_data)
        if decompressor.eof and position == len(body):
            return content
        if body[position : position + len(_GZIP)] != _GZIP:
            break
    raise zlib.error
