"""JPEG (ITU-T T.81): parse the segments before the image data."""

import struct
from collections.abc import Sequence

from handler.decoding.headers import Header, Piece, orientation_of, unsupported
from handler.errors import DamagedImage

# Frame markers (table B.1) that libjpeg-turbo decodes. Only Huffman-coded frames are decoded in the
# worker, since their cost is known.
_HUFFMAN = {0xC0, 0xC1, 0xC2}
_PROGRESSIVE = {0xC2, 0xCA}
_FRAMES = {*_HUFFMAN, 0xC3, 0xC9, 0xCA}
_UNSUPPORTED_FRAMES = {0xF7: "a JPEG-LS", 0xCB: "a lossless JPEG with arithmetic coding"} | (
    dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), "a hierarchical JPEG")
)
_BITS = 8
_CHANNELS = {1, 3, 4}

_SOS, _APP1 = 0xDA, 0xE1
# Huffman and quantization tables, arithmetic conditioning, restart interval, and the JFIF and Adobe
# segments, on which the colors depend. Other application segments and comments are dropped.
_KEPT = {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}
_METADATA = {*range(0xE0, 0xF0), 0xFE}

# Cameras write up to about 30 segments.
_MAX_SEGMENTS = 200
# The decoder's look-ahead. Appended so that an image without its end marker decodes; with more
# bytes, the decoder would also fill in the end of an image that was cut off.
_LOOK_AHEAD = bytes(8)
_COEFFICIENTS = 64  # per block
# A progressive JPEG is decoded at its end marker. If the marker is missing, the image is decoded
# with two different fillers, which give equal pixels only if the last scan is complete.
_END = b"\xff\xd9"
_FILLERS = (b"\x00", b"\xaa")

# Limits for decoding in the worker, measured: half a second of CPU time.
_MAX_SIMPLE_BYTES = 12_000_000
_MAX_SIMPLE_PIXELS = 200_000_000  # each scan of a progressive JPEG is a pass over all of them
_PIXEL_BYTES = 8  # Pillow's image and its upright copy
# libjpeg keeps the coefficients, 2 bytes each, of an image with several scans, plus a tenth.
_COEFFICIENT_BYTES = 2.2


def parse(data: bytes | bytearray) -> Header | None:
    """Return the header; None if only a decoder can parse the file.

    Raises:
        UnsupportedFormat: the JPEG is of an unsupported kind.
        DamagedImage: it has two frames.
        struct.error, IndexError: it is cut off.
    """
    view = memoryview(data)
    pieces: list[Piece] = [b"\xff\xd8"]
    metadata: list[Piece] = []
    frame: Piece | None = None
    position = 2
    for _ in range(_MAX_SEGMENTS):
        prefix, marker, length = struct.unpack_from(">BBH", data, position)
        segment = view[position : position + 2 + length]
        if prefix != 0xFF or length < 2:
            return None
        if marker == _SOS:
            break
        if marker in _FRAMES or marker in _UNSUPPORTED_FRAMES:
            if frame is not None:
                raise DamagedImage("The JPEG image is damaged: it has two frames.")
            frame = segment
        elif marker == _APP1:
            metadata.append(segment[4:])
        elif marker not in _KEPT and marker not in _METADATA:
            return None
        if marker in _KEPT or marker not in _METADATA:
            pieces.append(segment)
        position += 2 + length
    else:
        return None
    if frame is None:
        return None
    return _header(data, position, frame, pieces, orientation_of(metadata))


def _header(
    data: bytes | bytearray,
    start: int,
    frame: Piece,
    pieces: Sequence[Piece],
    orientation: int,
) -> Header:
    """Return the header of a JPEG whose first scan starts at `start`."""
    marker, (bits, height, width, channels) = frame[1], struct.unpack_from(">BHHB", frame, 4)
    if marker in _UNSUPPORTED_FRAMES:
        raise unsupported(_UNSUPPORTED_FRAMES[marker])
    if bits != _BITS:
        raise unsupported(f"a JPEG with {bits} bits a channel")
    if channels not in _CHANNELS:
        raise unsupported(f"a JPEG with {channels} channels")
    in_one_scan = marker not in _PROGRESSIVE and data[start + 4] >= channels
    # Comments and further images can inflate the count; then the decoder process decodes the image.
    scans = 1 if in_one_scan else data.count(b"\xff\xda", start)
    coefficients = 0 if in_one_scan else _coefficients(frame, width * height, channels)
    scan_data = memoryview(data)[start:]
    end, other_end = _LOOK_AHEAD if in_one_scan else b"", None
    if not in_one_scan and data.find(_END, start) < 0 and _has_all_scans(data, start, frame):
        if data.endswith(_END[:1]):
            scan_data = scan_data[:-1]
        end, other_end = (filler * len(scan_data) + _END for filler in _FILLERS)
    return Header(
        ("JPEG",),
        (*pieces, scan_data, end),
        (width, height),
        orientation,
        simple=marker in _HUFFMAN
        and len(data) <= _MAX_SIMPLE_BYTES
        and width * height * scans <= _MAX_SIMPLE_PIXELS,
        pixel_bytes=_PIXEL_BYTES,
        fixed_bytes=len(data) + len(end) + int(coefficients * _COEFFICIENT_BYTES),
        other_end=other_end,
    )


def _has_all_scans(data: bytes | bytearray, start: int, frame: Piece) -> bool:
    """Return whether the scans from `start` on contain the last bit of each coefficient."""
    missing = {component: set(range(_COEFFICIENTS)) for component in frame[10::3]}
    while start >= 0:
        count = data[start + 4]
        first, last, bits = struct.unpack_from("BBB", data, start + 5 + 2 * count)
        if not bits & 15:
            for component in data[start + 5 : start + 5 + 2 * count : 2]:
                missing.get(component, set()).difference_update(range(first, last + 1))
        start = data.find(b"\xff\xda", start + 2)
    return not any(missing.values())


def _coefficients(frame: Piece, pixels: int, channels: int) -> float:
    """Return the number of coefficients, from the channels' sampling factors."""
    factors = [(value >> 4) * (value & 15) for value in frame[11 : 11 + 3 * channels : 3]]
    return pixels * sum(factors) / max(1, *factors)
