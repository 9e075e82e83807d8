"""Recognize the accepted formats by their signatures and read the headers.

JPEG, PNG and WebP are parsed in a bounded number of steps. Their decoders get the image without
metadata, and ordinary ones may be decoded in the worker. All other files go to the decoder process
unchanged.
"""

import importlib.util
import struct
from collections.abc import Callable
from typing import NamedTuple

from handler.decoding import jpeg, png, webp
from handler.decoding.foreign_formats import identify, is_other_image
from handler.decoding.headers import Header
from handler.errors import ClientError, NotAnImage, UnsupportedFormat

# The optional package `pi_heif` decodes HEIC, the format of many phones.
_HAS_HEIF = importlib.util.find_spec("pi_heif") is not None

# White space, zeros or a byte order mark that servers' scripts print before an image by mistake.
_LEADING_JUNK = b"\r\n\t \0\xef\xbb\xbf"
_MAX_LEADING_JUNK = 256


class _Format(NamedTuple):
    """An accepted format.

    Attributes:
        names: Pillow's names; several if only the decoder can distinguish them.
        offset: position of the signature.
        signatures: alternatives, of which a file has one.
        min_pixel_bytes: measured minimum memory per pixel while decoding, in bytes; set only for
            decoders that report a failed allocation as damage.
        parse: parses the header; None for formats that only Pillow parses.
    """

    names: tuple[str, ...]
    offset: int
    signatures: tuple[bytes, ...]
    min_pixel_bytes: int = 0
    parse: Callable[[bytes | bytearray], Header | None] | None = None


# The last two can hold HEVC or AV1.
_HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")

_JPEG = _Format(("JPEG",), 0, (b"\xff\xd8",), parse=jpeg.parse)
_PNG = _Format(("PNG",), 0, (b"\x89PNG",), parse=png.parse)
_FORMATS = (
    _JPEG,
    _PNG,
    # 16 bytes per pixel: two canvases of the decoder, a copy of one, and Pillow's image.
    _Format(("WEBP",), 8, (b"WEBP",), 16, webp.parse),
    _Format(("GIF",), 0, (b"GIF8",)),
    _Format(("BMP",), 0, (b"BM",)),
    _Format(("TIFF",), 0, (b"II*\0", b"MM\0*", b"II+\0")),
    _Format(("AVIF",), 4, (b"ftypavif", b"ftypavis"), 9),
    *([_Format(("HEIF", "AVIF"), 4, _HEIF_BRANDS, 7)] if _HAS_HEIF else []),
)

# Pillow's names of all accepted formats.
ACCEPTED = tuple(each.names[0] for each in _FORMATS)


def probe(data: bytes | bytearray) -> Header:
    """Read the header of an encoded image.

    Raises:
        NotAnImage: the bytes have the signature of no known file format.
        UnsupportedFormat: the format, or the pixel format of a JPEG or PNG, is not accepted.
        DamagedImage: the header contradicts itself.
    """
    known = _format_of(data)
    if known is None:
        head = bytes(data[:_MAX_LEADING_JUNK])
        clean = data[len(head) - len(head.lstrip(_LEADING_JUNK)) :]
        known = _format_of(clean)
        if known not in {_JPEG, _PNG}:
            raise _unidentified(data)
        data = clean
    assert known is not None
    if known.parse is not None:
        try:
            header = known.parse(data)
        except (struct.error, IndexError):  # cut off; the decoder reports the error
            header = None
        if header is not None:
            return header
    return Header(known.names, (memoryview(data),))


def begins_as_image(data: bytes | bytearray) -> bool:
    """Return whether the bytes have the signature of an accepted format."""
    return _format_of(data) is not None


def _format_of(data: bytes | bytearray) -> _Format | None:
    return next((each for each in _FORMATS if data.startswith(each.signatures, each.offset)), None)


def _unidentified(data: bytes | bytearray) -> ClientError:
    accepted = ", ".join(ACCEPTED)
    if (name := identify(data)) is not None:
        return UnsupportedFormat(f"This is {name} file. Accepted are: {accepted}.")
    if is_other_image(data):
        return UnsupportedFormat(f"The image has an unsupported format. Accepted are: {accepted}.")
    return NotAnImage(f"The bytes are not an image. Accepted are: {accepted}.")


def min_bytes(name: str | None, size: tuple[int, int]) -> int:
    """Return the minimum memory for decoding, in bytes; `name` is Pillow's name of the format."""
    pixel_bytes = next((each.min_pixel_bytes for each in _FORMATS if name in each.names), 0)
    return size[0] * size[1] * pixel_bytes
