"""PNG (W3C, Portable Network Graphics): parse the chunks."""

import struct

from handler.decoding.headers import Header, Piece, orientation_of, unsupported

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The header chunk comes first and always has 13 bytes.
_START = _SIGNATURE + b"\0\0\0\x0dIHDR"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"
# The chunks that determine the pixels; all others are dropped.
_KEPT = {b"PLTE", b"tRNS", b"IDAT"}

# libpng writes chunks of 8 KiB, some programs of 4 KiB.
_MAX_CHUNKS = 5_000

# Limits for decoding in the worker, measured: half a second of CPU time.
_MAX_SIMPLE_BYTES = 6_000_000
_MAX_SIMPLE_BITS = 8
_PIXEL_BYTES = 9  # Pillow's image and its upright RGB copy


def parse(data: bytes | bytearray) -> Header | None:
    """Return the header; None if only a decoder can parse the file.

    Raises:
        UnsupportedFormat: the file has Apple's CgBI chunk, which is not part of the standard.
        struct.error: its header is cut off.
    """
    if data[12:16] == b"CgBI":
        raise unsupported("a PNG in the form that only iOS reads (CgBI)")
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    if not data.startswith(_START):
        return None
    view = memoryview(data)
    pieces: list[Piece] = [view[:33]]
    metadata: list[Piece] = []
    position, previous, pixel_runs = 33, b"IHDR", 0
    for _ in range(_MAX_CHUNKS):
        if position == len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = view[position : position + 12 + length]
        pixel_runs += kind == b"IDAT" != previous
        if len(chunk) < 12 + length or kind == b"IHDR" or pixel_runs > 1:
            return None
        if kind == b"IEND":
            break
        if kind in _KEPT:
            pieces.append(chunk)
        elif kind == b"eXIf" or chunk[8 : 8 + len(_XMP)] == _XMP:
            metadata.append(chunk[8:])
        position, previous = position + len(chunk), kind
    else:
        return None
    return Header(
        ("PNG",),
        (*pieces, _END),
        (width, height),
        orientation_of(metadata),
        simple=len(data) <= _MAX_SIMPLE_BYTES and bits <= _MAX_SIMPLE_BITS,
        pixel_bytes=_PIXEL_BYTES,
        fixed_bytes=len(data),
    )
