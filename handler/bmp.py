"""BMP: which are read, and what a file may cost."""

import struct

from handler.encoded import Contents, unsupported
from handler.errors import TooLarge

_BITS = {1, 4, 8, 16, 24, 32}
_UNREAD = {4: "a BMP with a JPEG inside", 5: "a BMP with a PNG inside"}
_BIT_FIELDS = 3
# The sizes of its header, of which the second begins with what is read here.
_OLDEST_HEADER, _INFO_HEADER, _OS2_HEADER, _ALPHA_HEADER = 12, 40, 64, 56
# Which bits of a pixel are red, green, blue and transparency, by the bits a pixel has.
_MASKS = {
    (16, 0x7C00, 0x3E0, 0x1F, 0),
    (16, 0xF800, 0x7E0, 0x1F, 0),
    (24, 0xFF0000, 0xFF00, 0xFF, 0),
    (32, 0xFF0000, 0xFF00, 0xFF, 0),
    (32, 0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    (32, 0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    (32, 0xFF000000, 0xFF0000, 0xFF00, 0),
    (32, 0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    (32, 0xFF000000, 0xFF00, 0xFF, 0),
    (32, 0xFF000000, 0xFF00, 0xFF, 0xFF0000),
}
_MOST_BITS = 64

_RUN_LENGTHS = {1, 2}
# Pillow reads these in Python: 0.11 microseconds a pixel were measured.
_MOST_RUN_LENGTH_PIXELS = 8_000_000


def walk(data: bytes | bytearray) -> Contents:
    """A BMP, all of it.

    Raises:
        UnsupportedFormat: it is of a kind that is not read.
        TooLarge: decoding it would take too long.
        struct.error: its header is cut off.
    """
    if (kind := _unread(data)) is not None:
        raise unsupported(kind)
    (header,) = struct.unpack_from("<I", data, 14)
    if header >= _INFO_HEADER:  # the first one that says how pixels are compressed
        width, height, compression = struct.unpack_from("<ii4xI", data, 18)
        if compression in _RUN_LENGTHS and abs(width * height) > _MOST_RUN_LENGTH_PIXELS:
            raise TooLarge(
                f"The run-length coded BMP has {abs(width)} x {abs(height)} pixels; at most "
                f"{_MOST_RUN_LENGTH_PIXELS} are read. Save it as a PNG."
            )
    return Contents((memoryview(data),))


def bits_per_pixel(data: bytes | bytearray) -> int:
    """Bits a pixel of a BMP whose header is whole."""
    (header,) = struct.unpack_from("<I", data, 14)
    bits: int
    (bits,) = struct.unpack_from("<H", data, 24 if header == _OLDEST_HEADER else 28)
    return bits


def _unread(data: bytes | bytearray) -> str | None:
    if len(data) < 14 + _INFO_HEADER:
        return None
    bits = bits_per_pixel(data)
    if bits not in _BITS and 0 < bits <= _MOST_BITS:
        return f"a BMP with {bits} bits a pixel"
    header, compression = struct.unpack_from("<I12xI", data, 14)
    if header < _INFO_HEADER:
        return None
    if header == _OS2_HEADER and compression >= _BIT_FIELDS:
        return "a BMP with a compression of OS/2"
    if compression == _BIT_FIELDS and len(data) >= 14 + _ALPHA_HEADER:
        *masks, alpha = struct.unpack_from("<4I", data, 14 + _INFO_HEADER)
        if header < _ALPHA_HEADER or bits != 32:  # noqa: PLR2004
            alpha = 0
        if (bits, *masks, alpha) not in _MASKS:
            return f"a BMP with {bits} bits a pixel in an unusual order"
    return _UNREAD.get(compression)
