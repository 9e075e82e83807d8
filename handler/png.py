"""PNG (W3C, Portable Network Graphics): what a file holds."""

import struct
import zlib
from collections.abc import Iterator, Sequence

from handler.encoded import Contents, Orientation, Piece, too_many, unsupported
from handler.errors import DamagedImage

# libpng writes chunks of 8 KiB, some programs of 4 KiB: 5,000 in 20 MB.
_MOST_CHUNKS = 10_000

# The header comes first and has one length.
_BEGINNING = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_KEPT = {b"PLTE", b"tRNS"}
# The longest of them: 256 colours of 3 bytes.
_LONGEST_KEPT = 768
_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"


def walk(data: bytes | bytearray) -> Contents:  # noqa: C901  # one loop, a case for each chunk
    """What a PNG holds.

    Raises:
        UnsupportedFormat: only iOS reads it. Every kind that the standard has is read.
        DamagedImage: its chunks make no sense.
        TooLarge: it has more of them than any real picture.
        struct.error: its header is cut off.
    """
    _check_beginning(data)
    view = memoryview(data)
    pieces: list[Piece] = [view[8:33]]
    pixels: list[Piece] = []
    orientation = Orientation()
    position, after_pixels = 33, False
    for _ in range(_MOST_CHUNKS):
        if position + 8 > len(view):
            break
        length, kind = struct.unpack_from(">I4s", view, position)
        content = view[position + 8 : position + 8 + length]
        whole = view[position : position + 12 + length]
        position += 12 + length
        if not kind.isalpha() or kind == b"IHDR":
            break  # damage; what comes behind cannot be found any more, or is another's
        if kind == b"IDAT" and not after_pixels:
            pixels.append(content)
            continue
        # The pixels of one picture stand together; others would be another's.
        after_pixels = bool(pixels)
        if kind in _KEPT and not after_pixels:
            if length > _LONGEST_KEPT:
                raise DamagedImage("The PNG image is damaged: its palette is too long.")
            pieces.append(whole)
        elif kind == b"eXIf":
            orientation.read_exif(content)
        elif kind == b"iTXt" and bytes(content[: len(_XMP)]) == _XMP:
            orientation.read_xmp(content)
        elif kind == b"IEND":
            break
    else:
        if not pixels or not after_pixels:
            raise too_many("chunks", _MOST_CHUNKS)
    width, height, bits = struct.unpack_from(">IIB", view, 16)
    block = orientation.block
    return Contents(
        pieces=(
            _BEGINNING[:8],
            *pieces,
            *(_chunk(b"eXIf", [block]) if block else ()),
            *_chunk(b"IDAT", pixels),
            *_chunk(b"IEND", []),
        ),
        size=(width, height),
        isolated=bits > 8,  # noqa: PLR2004
    )


def _check_beginning(data: bytes | bytearray) -> None:
    if data[12:16] == b"CgBI":
        raise unsupported("a PNG in the form that only iOS reads (CgBI)")
    if not data.startswith(_BEGINNING):
        raise DamagedImage("The PNG image is damaged: its first bytes were changed.")


def _chunk(kind: bytes, content: Sequence[Piece]) -> Iterator[Piece]:
    """A chunk; of pixels Pillow does not look at the checksum."""
    yield struct.pack(">I4s", sum(map(len, content)), kind)
    yield from content
    yield struct.pack(">I", 0 if kind == b"IDAT" else zlib.crc32(b"".join((kind, *content))))
