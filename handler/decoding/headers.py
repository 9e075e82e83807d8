"""What is known about an encoded image before it is decoded, and how unusual kinds are rejected."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from handler.errors import UnsupportedFormat

Piece = bytes | memoryview

UPRIGHT = 1
_ORIENTATION = 0x0112  # the tag (Exif 2.3, 4.6.4)
_INTEGERS = {3: "H", 4: "I"}  # types of tags
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# A JPEG segment holds no more; more of an XMP block is not searched.
_MAX_METADATA_BYTES = 1 << 16


@dataclass(frozen=True)
class Header:
    """What a file's header says about the image.

    Attributes:
        names: Pillow's names of the formats to try.
        pieces: the file as the decoder gets it, in order, sharing the original's memory.
        size: width and height in pixels; None if only the decoder can tell.
        orientation: 1 to 8 as in Exif; None if Pillow has to read it.
        simple: an ordinary image, which may be decoded in the worker.
        pixel_bytes: of memory that each decoded pixel takes, of a simple image.
        fixed_bytes: of memory that the decoder needs beside that, of any image.
        other_end: another last piece, of a file that lacks its end: what it shows must not depend
            on which of the two it gets.
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
    """Return the error for pixels that cannot be read exactly.

    Args:
        kind: what the file is, with its article.
    """
    return UnsupportedFormat(
        f"This is {kind}, which this server does not read. "
        "Save it as a JPEG, or as a PNG with 8 bits a channel."
    )


def orientation_of(blocks: Sequence[Piece]) -> int:
    """Return the orientation, 1 to 8, in a file's Exif blocks, or else in its XMP blocks."""
    for block in blocks:
        if (value := _exif_orientation(block)) is not None:
            return value if value in range(1, 9) else UPRIGHT
    for block in blocks:
        if match := _XMP_ORIENTATION.search(bytes(block[:_MAX_METADATA_BYTES])):
            return int(match[1])
    return UPRIGHT


def _exif_orientation(block: Piece) -> int | None:
    """Return the first directory's value; None if there is none or the block is damaged."""
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
