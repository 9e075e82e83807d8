"""The header of an encoded image, its Exif or XMP orientation, and the error for unusual kinds."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from handler.errors import UnsupportedFormat

Piece = bytes | memoryview

UPRIGHT = 1
_ORIENTATION = 0x0112  # Exif 2.3, 4.6.4
_INTEGERS = {3: "H", 4: "I"}  # tag type to struct format
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# The maximum length of a JPEG segment; the rest of a longer XMP block is not searched.
_MAX_METADATA_BYTES = 1 << 16


@dataclass(frozen=True)
class Header:
    """The parsed header of an encoded image.

    Attributes:
        names: Pillow's names of the formats to try.
        pieces: the parts of the file for the decoder, in order, sharing the original's memory.
        size: width and height in pixels; None if only the decoder can read it.
        orientation: 1 to 8 as in Exif; None if Pillow has to read it.
        simple: an ordinary image, which may be decoded in the worker.
        pixel_bytes: memory per pixel for decoding, in bytes; set for simple images.
        fixed_bytes: memory that decoding takes in addition to that, in bytes.
        other_end: an alternative last piece for a file without its end marker; both must decode to
            equal pixels, or the image is cut off.
    """

    names: tuple[str, ...]
    pieces: Sequence[Piece]
    size: tuple[int, int] | None = None
    orientation: int | None = None
    simple: bool = False
    pixel_bytes: int = 0
    fixed_bytes: int = 0
    other_end: Piece | None = None


def unsupported(kind: str) -> UnsupportedFormat:
    """Return the error for pixels that cannot be read exactly; `kind` begins with an article."""
    return UnsupportedFormat(
        f"This is {kind}, which this server does not read. "
        "Save it as a JPEG, or as a PNG with 8 bits a channel."
    )


def orientation_of(blocks: Sequence[Piece]) -> int:
    """Return the orientation, 1 to 8, from a file's Exif blocks, or else from its XMP blocks."""
    for block in blocks:
        if (value := _exif_orientation(block)) is not None:
            return value if value in range(1, 9) else UPRIGHT
    for block in blocks:
        if match := _XMP_ORIENTATION.search(bytes(block[:_MAX_METADATA_BYTES])):
            return int(match[1])
    return UPRIGHT


def _exif_orientation(block: Piece) -> int | None:
    """Return the orientation in the first directory; None if it is missing or damaged."""
    data = bytes(block[:_MAX_METADATA_BYTES]).removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", data, position)
            if tag == _ORIENTATION and kind in _INTEGERS:
                value: int
                (value,) = struct.unpack_from(f"{order}{_INTEGERS[kind]}", data, position + 8)
                return value
    except struct.error:
        pass
    return None
