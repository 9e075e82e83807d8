"""Which formats are read, how their files begin, and what a file of them may cost: one table.

`survey` walks through a file's container before any decoder sees it. A kind of pixels of which it
is not exactly known how to read them is refused with its name. What goes on is a cleaned file that
holds what makes the picture and nothing else: comments, profiles, text, thumbnails, later frames
and a film behind the picture are left out, so that none of them can cost anything, and what is
wrong with them no longer counts.

Where the cost of decoding follows from what the walk found, the picture may be decoded in the
worker itself; all others go to the decoder process, whose time and memory the kernel bounds.
"""

import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass

from handler import bmp, gif, jpeg, png, tiff, webp
from handler.encoded import Contents, Piece
from handler.errors import DamagedImage

# Phones write HEIC; this package decodes it and no more. An archive serves without it too.
_HAS_HEIF = importlib.util.find_spec("pi_heif") is not None

# What servers' scripts print before a picture by mistake; anything else in front is refused.
_LEADING_JUNK = b"\r\n\t \0\xef\xbb\xbf"
_MOST_LEADING_JUNK = 256


@dataclass(frozen=True)
class Survey:
    """What is known of a picture before it is decoded.

    Attributes:
        names: Pillow's names of the formats to try.
        pieces: of the cleaned file, in order; they share the original's memory.
        size: width and height in pixels; None where only decoding tells.
        isolated: decode it in the decoder process: its cost does not follow from what is known.
        seconds: at most, of CPU, to decode it, where it is not isolated.
        fixed_bytes: of memory that decoding takes beside the pixels, where it is not isolated.
        pixel_bytes: of memory that each decoded pixel takes, likewise.
    """

    names: tuple[str, ...]
    pieces: tuple[Piece, ...]
    size: tuple[int, int] | None
    isolated: bool
    seconds: float
    fixed_bytes: int
    pixel_bytes: int

    def cleaned(self) -> bytes:
        """The cleaned file."""
        return b"".join(self.pieces)


def survey(data: bytes | bytearray) -> Survey | None:
    """Finds out what a file is, what it holds and what decoding it may cost.

    Args:
        data: the encoded picture.

    Returns:
        what was found; None where the file begins as none of the accepted formats.

    Raises:
        UnsupportedFormat: it is not exactly known how to read its pixels.
        DamagedImage: the container makes no sense.
        TooLarge: it has more parts than any real picture.
    """
    found = _format_of(data)
    if found is None:
        head = bytes(data[:_MOST_LEADING_JUNK])
        data = data[len(head) - len(head.lstrip(_LEADING_JUNK)) :]
        found = _format_of(data)
        if found not in {_JPEG, _PNG}:
            return None
    try:
        contents = found.walk(data)
    except (struct.error, IndexError) as error:
        raise DamagedImage("The image is damaged or cut off: its header cannot be read.") from error
    return _survey(found, contents)


def _survey(found: "_Format", contents: Contents) -> Survey:
    cost = found.cost
    length = sum(map(len, contents.pieces))
    pixels = contents.size[0] * contents.size[1] if contents.size is not None else 0
    return Survey(
        found.names,
        contents.pieces,
        contents.size,
        contents.isolated,
        seconds=pixels * contents.passes * cost.pixel_seconds + length * cost.byte_seconds,
        fixed_bytes=length * cost.copies + contents.kept_bytes,
        pixel_bytes=cost.pixel_bytes,
    )


def _format_of(data: bytes | bytearray) -> "_Format | None":
    candidate: _Format
    for candidate in _FORMATS:
        if any(data.startswith(start, offset) for offset, start in candidate.beginnings):
            return candidate
    return None


# --- The table ---


@dataclass(frozen=True)
class _Cost:
    """What decoding costs in the worker itself, at most, as measured.

    Attributes:
        pixel_seconds: of CPU, for each pixel and pass over it.
        byte_seconds: of CPU, for each byte of the file.
        pixel_bytes: of memory, for each pixel.
        copies: of the file, in memory.
    """

    pixel_seconds: float = 0.0
    byte_seconds: float = 0.0
    pixel_bytes: int = 0
    copies: int = 0


@dataclass(frozen=True)
class _Format:
    """One row: an accepted format.

    Attributes:
        names: what Pillow calls it; several where only decoding tells them apart.
        beginnings: offset and bytes, one of which a file of it has.
        walk: what finds out what a file of it holds.
        least_pixel_bytes: of memory that a pixel takes at least while it is decoded.
        cost: in the worker itself; none where files always go to the decoder process.
    """

    names: tuple[str, ...]
    beginnings: tuple[tuple[int, bytes], ...]
    walk: Callable[[bytes | bytearray], Contents]
    least_pixel_bytes: int
    cost: _Cost = _Cost()


def _brands(*brands: bytes) -> tuple[tuple[int, bytes], ...]:
    return tuple((4, b"ftyp" + brand) for brand in brands)


def _walk_boxes(data: bytes | bytearray) -> Contents:
    """AVIF and HEIC: their decoders find their way through boxes at no great cost."""
    return Contents((memoryview(data),))


_JPEG = _Format(
    ("JPEG",),
    ((0, b"\xff\xd8"),),
    jpeg.walk,
    0,  # at a fraction of its size
    # Pillow's copy and the upright RGB one.
    _Cost(pixel_seconds=2.5e-9, byte_seconds=40e-9, pixel_bytes=8, copies=1),
)
_PNG = _Format(
    ("PNG",),
    ((0, b"\x89PNG"),),
    png.walk,
    1,
    # Pillow's copy and the upright RGB one.
    _Cost(pixel_seconds=30e-9, byte_seconds=80e-9, pixel_bytes=9, copies=1),
)
_WEBP = _Format(
    ("WEBP",),
    ((8, b"WEBP"),),
    webp.walk,
    16,  # two canvases of the decoder, a copy of one, and Pillow's picture, 4 bytes each
    # Two canvases of the decoder, the bytes they are copied to, Pillow's copy and the upright one.
    _Cost(pixel_seconds=60e-9, byte_seconds=120e-9, pixel_bytes=21, copies=2),
)
_GIF = _Format(("GIF",), ((0, b"GIF8"),), gif.walk, 1)
_BMP = _Format(("BMP",), ((0, b"BM"),), bmp.walk, 1)
_TIFF = _Format(("TIFF",), tuple((0, start) for start in tiff.BEGINNINGS), tiff.walk, 1)
# Measured: planes of brightness and colour, RGB, and Pillow's picture.
_AVIF = _Format(("AVIF",), _brands(b"avif", b"avis"), _walk_boxes, 9)
# The last two brands say nothing of the coding.
_HEIF = _Format(
    ("HEIF", "AVIF"), _brands(b"heic", b"heix", b"hevc", b"mif1", b"msf1"), _walk_boxes, 7
)
_FORMATS = (_JPEG, _PNG, _WEBP, _GIF, _BMP, _TIFF, _AVIF, *((_HEIF,) if _HAS_HEIF else ()))

# Pillow's names of all of them.
ACCEPTED = tuple(row.names[0] for row in _FORMATS)


def least_bytes(name: str | None, size: tuple[int, int]) -> int:
    """Memory that decoding takes at least, in bytes, by Pillow's name of the format."""
    pixel_bytes = next((row.least_pixel_bytes for row in _FORMATS if row.names[0] == name), 0)
    return size[0] * size[1] * pixel_bytes
