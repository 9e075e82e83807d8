"""WebP (RFC 9649): read the size, and whether the image is simple enough for the worker."""

import struct

from handler.decoding.headers import UPRIGHT, Header

_KEY_FRAME = b"\x9d\x01\x2a"  # RFC 6386, 9.1

# Limit for decoding in the worker, measured: half a second of CPU time.
_MAX_SIMPLE_BYTES = 4_000_000
# Two canvases of the decoder, the bytes they are copied to, Pillow's copy and the upright copy.
_PIXEL_BYTES = 21


def parse(data: bytes | bytearray) -> Header | None:
    """Return the header; None if it contains no size.

    Only lossy images without transparency, metadata or animation are simple. Lossless coding, also
    of transparency, takes 11 kB of memory per group of codes, and their number is not limited.

    Raises:
        struct.error: the header is cut off.
    """
    kind, length = struct.unpack_from("<4sI", data, 12)
    view, fixed_bytes = memoryview(data), 2 * len(data)
    if kind == b"VP8 " and data[23:26] == _KEY_FRAME:
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(
            ("WEBP",),
            (b"RIFF", struct.pack("<I", length + 12), view[8 : 20 + length]),
            (width & 0x3FFF, height & 0x3FFF),
            UPRIGHT,
            simple=len(data) <= _MAX_SIMPLE_BYTES,
            pixel_bytes=_PIXEL_BYTES,
            fixed_bytes=fixed_bytes,
        )
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        low, high, low_2, high_2 = struct.unpack_from("<HBHB", data, 24)
        size = (high << 16 | low) + 1, (high_2 << 16 | low_2) + 1
    else:
        return None
    return Header(("WEBP",), (view,), size, fixed_bytes=fixed_bytes)
