"""What the walks through encoded pictures have in common: what they find, and how they refuse.

Each format has a module of its own with all that its files say of themselves. Its `walk` goes
through a file's container in a bounded number of steps, none of which touches a pixel.
"""

import re
import struct
from dataclasses import dataclass

from handler.errors import TooLarge, UnsupportedFormat

Piece = bytes | memoryview


@dataclass(frozen=True)
class Contents:
    """What a walk through a file found.

    Attributes:
        pieces: of the cleaned file, in order; they share the original's memory.
        size: width and height in pixels; None where only decoding tells.
        isolated: decode it in the decoder process: its cost does not follow from what is known.
        passes: how often the decoder goes over all pixels.
        kept_bytes: of memory that the decoder keeps beside the file and the pixels.
    """

    pieces: tuple[Piece, ...]
    size: tuple[int, int] | None = None
    isolated: bool = True
    passes: int = 1
    kept_bytes: int = 0


def unsupported(what: str) -> UnsupportedFormat:
    """The error for pixels of which it is not exactly known how to read them.

    Args:
        what: the file is, with its article.
    """
    return UnsupportedFormat(
        f"This is {what}, which this server does not read. "
        "Save it as a JPEG, or as a PNG with 8 bits a channel."
    )


def too_many(what: str, most: int) -> TooLarge:
    """The error for a file that has more parts than any real picture."""
    return TooLarge(f"The image's file has more than {most} {what}. Save it again as a JPEG.")


# --- Orientation: all that counts of a picture's metadata ---

_ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4
_UPRIGHT = 1
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_LONGEST_XMP = 100_000
# Cameras write some tens.
_MOST_TAGS = 1_000


@dataclass
class Orientation:
    """What a file's Exif says, and its XMP where that says nothing; the first of each counts."""

    exif: int | None = None
    xmp: int | None = None

    def read_exif(self, block: Piece) -> None:
        """Notes what an Exif block says."""
        if self.exif is None:
            self.exif = _exif_orientation(bytes(block[: 1 << 16]))

    def read_xmp(self, block: Piece) -> None:
        """Notes what an XMP block says."""
        if self.xmp is None:
            self.xmp = _xmp_orientation(bytes(block[:_LONGEST_XMP]))

    @property
    def block(self) -> bytes:
        """A small Exif block that says the same; empty where the picture is upright."""
        value = self.exif if self.exif is not None else self.xmp
        if value in (None, _UPRIGHT):
            return b""
        return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(
            ">HHIHHI", _ORIENTATION, _SHORT, 1, value, 0, 0
        )


def _exif_orientation(block: bytes) -> int | None:
    """The first directory's orientation; None where there is none or the block is damaged."""
    if block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for position in range(start + 2, start + 2 + 12 * min(count, _MOST_TAGS), 12):
            tag, kind, _ = struct.unpack_from(f"{order}HHI", block, position)
            if tag == _ORIENTATION and kind in {_SHORT, _LONG}:
                number = f"{order}{'H' if kind == _SHORT else 'I'}"
                value: int
                (value,) = struct.unpack_from(number, block, position + 8)
                return value if value in range(1, 9) else _UPRIGHT
    except struct.error:
        pass
    return None


def _xmp_orientation(block: bytes) -> int | None:
    match = _XMP_ORIENTATION.search(block)
    return int(match[1]) if match else None
