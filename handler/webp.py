"""WebP (RFC 9649): what a file holds."""

import struct
from collections.abc import Sequence

from handler.encoded import Contents, Orientation, Piece, too_many
from handler.errors import DamagedImage

# Real files have some tens.
_MOST_CHUNKS = 1_000

_VP8X_HEADER = 10
_ALPHA, _EXIF, _ANIMATION = 0x10, 0x08, 0x02


def walk(data: bytes | bytearray) -> Contents:  # noqa: C901  # one loop, a case for each chunk
    """What a WebP holds.

    Raises:
        DamagedImage: its chunks make no sense.
        TooLarge: it has more of them than any real picture.
        struct.error: a chunk's header is cut off.
        IndexError: a picture's header is cut off.
    """
    view = memoryview(data)
    extended: bytes | None = None
    pieces: list[Piece] = []
    orientation = Orientation()
    is_lossy, position = False, 12
    has_picture = False
    for _ in range(_MOST_CHUNKS):
        if position + 8 > len(view):
            break
        kind, length = struct.unpack_from("<4sI", view, position)
        content = view[position + 8 : position + 8 + length]
        whole = view[position : position + 8 + length + length % 2]
        position += 8 + length + length % 2
        if kind == b"VP8X" and extended is None:
            extended = bytes(content[:_VP8X_HEADER])
            if len(extended) < _VP8X_HEADER:
                raise DamagedImage("The WEBP image is damaged: its header is too short.")
        elif kind in {b"VP8 ", b"VP8L", b"ANMF"} and not has_picture:
            has_picture, is_lossy = True, kind == b"VP8 "
            pieces.append(whole)
        elif kind in {b"ALPH", b"ANIM"} and not has_picture:
            pieces.append(whole)
        elif kind == b"EXIF":
            orientation.read_exif(content)
        elif kind == b"XMP ":
            orientation.read_xmp(content)
    else:
        if not has_picture:
            raise too_many("chunks", _MOST_CHUNKS)
    if not has_picture:
        raise DamagedImage("The WEBP image is damaged or cut off: it holds no picture.")
    block = orientation.block
    if extended is not None:
        flags = extended[0] & (_ALPHA | _ANIMATION) | (_EXIF if block else 0)
        header = struct.pack("<4sIB", b"VP8X", _VP8X_HEADER, flags) + extended[1:]
        exif = struct.pack("<4sI", b"EXIF", len(block)) + block if block else b""
        pieces = [header, *pieces, exif]
        is_lossy = is_lossy and not flags & (_ALPHA | _ANIMATION)
    length = sum(map(len, pieces))
    return Contents(
        pieces=(b"RIFF", struct.pack("<I", length + 4), b"WEBP", *pieces),
        size=_size(pieces),
        # Lossless coding, of transparency too, takes 11 kB for each of its groups of codes.
        isolated=not is_lossy,
    )


def _size(pieces: Sequence[Piece]) -> tuple[int, int] | None:
    """The canvas's, or a single picture's own; None where its header makes no sense."""
    for piece in pieces:
        kind = bytes(piece[:4])
        if kind == b"VP8X":
            return _24_bits(piece, 12) + 1, _24_bits(piece, 15) + 1
        if kind == b"VP8 " and bytes(piece[11:14]) == b"\x9d\x01\x2a":  # RFC 6386, 9.1
            width, height = struct.unpack_from("<HH", piece, 14)
            return width & 0x3FFF, height & 0x3FFF
        if kind == b"VP8L" and piece[8] == 0x2F:  # noqa: PLR2004  # RFC 9649, 3.4
            (bits,) = struct.unpack_from("<I", piece, 9)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _24_bits(piece: Piece, position: int) -> int:
    return int.from_bytes(piece[position : position + 3], "little")
