"""JPEG (ITU-T T.81): which are read, and what a file holds."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from handler.encoded import Contents, Orientation, Piece, too_many, unsupported
from handler.errors import DamagedImage, TooLarge

# Frames that libjpeg-turbo decodes (table B.1), by their marker.
_BASELINE, _EXTENDED, _PROGRESSIVE, _LOSSLESS = 0xC0, 0xC1, 0xC2, 0xC3
_SEQUENTIAL_ARITHMETIC, _PROGRESSIVE_ARITHMETIC = 0xC9, 0xCA
# What decoding these costs is known.
_HUFFMAN = {_BASELINE, _EXTENDED, _PROGRESSIVE}
_READ = {*_HUFFMAN, _LOSSLESS, _SEQUENTIAL_ARITHMETIC, _PROGRESSIVE_ARITHMETIC}
_IN_SEVERAL_SCANS = {_PROGRESSIVE, _PROGRESSIVE_ARITHMETIC}
_UNREAD = {
    0xC5: "a hierarchical JPEG",
    0xC6: "a hierarchical JPEG",
    0xC7: "a hierarchical JPEG",
    0xCB: "a lossless JPEG with arithmetic coding",
    0xCD: "a hierarchical JPEG",
    0xCE: "a hierarchical JPEG",
    0xCF: "a hierarchical JPEG",
    0xDE: "a hierarchical JPEG",
    0xF7: "a JPEG-LS",
}
_BITS = 8
# Grey, three colours, or CMYK. That CMYK is stored inverted, as Adobe's programs do, is what
# Pillow and all browsers take for granted, whether the file has Adobe's marker or not.
_CHANNELS = {1, 3, 4}

# Real files stay far below: 20 MB are 320 segments of the largest size, and a scan has a table or
# two before it.
_MOST_SEGMENTS = 1_000
# A progressive JPEG is decoded once for each of its scans. Cameras and editors write about 10; a
# file can hold thousands, each of which costs a pass over all pixels.
_MOST_SCANS = 100

_SOS, _EOI = 0xDA, 0xD9
# Alone, without a length; 0xFF 0x00 is skipped by decoders wherever a marker could stand.
_STANDALONE = {0x00, 0x01, *range(0xD0, 0xD9)}
# Huffman and quantisation tables, arithmetic conditioning, restart interval.
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}
_APP0, _APP1, _APP14, _COM = 0xE0, 0xE1, 0xEE, 0xFE
_APPLICATION = {*range(0xE0, 0xF0), _COM}
# Colours depend on these two; both are short.
_LONGEST_KEPT_SEGMENT = 64
_XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"
# The next marker in coded data: not a stuffed byte, a restart marker, or padding.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# A decoder looks this far ahead. More would let it make up the end of a picture that was cut.
_LOOK_AHEAD = bytes(8)
# With a tenth for what libjpeg keeps beside them: it calls a picture damaged when memory runs out.
_COEFFICIENT_BYTES = 2.2


@dataclass
class _Frame:
    """A JPEG's frame header."""

    marker: int
    size: tuple[int, int]
    sampling: list[tuple[int, int]]

    @classmethod
    def read(cls, marker: int, segment: Piece) -> "_Frame":
        """Raises `UnsupportedFormat` for one that is not decoded."""
        if marker in _UNREAD:
            raise unsupported(_UNREAD[marker])
        bits, height, width, channels = struct.unpack_from(">BHHB", segment, 4)
        if bits != _BITS:
            raise unsupported(f"a JPEG with {bits} bits a channel")
        if channels not in _CHANNELS:
            raise unsupported(f"a JPEG with {channels} channels")
        factors = [segment[11 + 3 * i] for i in range(channels)]
        return cls(marker, (width, height), [(f >> 4, f & 15) for f in factors])

    def coefficients(self) -> int:
        """How many a decoder keeps that needs several scans."""
        most_x = max((x for x, _ in self.sampling), default=1) or 1
        most_y = max((y for _, y in self.sampling), default=1) or 1
        width, height = self.size[0] + 8 * most_x, self.size[1] + 8 * most_y
        return sum(width * height * x * y // (most_x * most_y) for x, y in self.sampling)


def walk(data: bytes | bytearray) -> Contents:  # noqa: C901  # one loop, a case for each segment
    """What a JPEG holds.

    Raises:
        UnsupportedFormat: it is of a kind that is not read.
        DamagedImage: its segments make no sense.
        TooLarge: it has more of them, or more scans, than any real picture.
        struct.error: its frame is cut off.
        IndexError: the file is cut off.
    """
    view = memoryview(data)
    pieces: list[Piece] = []
    orientation = Orientation()
    frame: _Frame | None = None
    scans, position = 0, 2
    for _ in range(_MOST_SEGMENTS):
        start = _skip_padding(data, position)
        marker = data[start + 1]
        if marker == _EOI:
            break
        if marker in _STANDALONE:
            position = start + 2
            continue
        position = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
        segment = view[start:position]
        if marker in _APPLICATION:
            pieces += _kept_of_application(data, start, segment, orientation)
            continue
        if marker in _READ or marker in _UNREAD:
            if frame is not None:
                raise DamagedImage("The JPEG image is damaged: it has two frames.")
            frame = _Frame.read(marker, segment)
        elif marker != _SOS and marker not in _TABLES:
            # A decoder may take it for something else than it is taken for here.
            raise DamagedImage(f"The JPEG image is damaged: it has a marker 0x{marker:02X}.")
        if marker != _SOS:
            pieces.append(segment)
            continue
        if frame is None:
            break
        scans += 1
        _check_scans(scans)
        is_only = frame.marker not in _IN_SEVERAL_SCANS and segment[4] >= len(frame.sampling)
        position = _end_of_scan(data, position, is_only=is_only)
        pieces.append(view[start:position])
        if is_only or position == len(data):
            break
    else:
        raise too_many("segments", _MOST_SEGMENTS)
    if frame is None or not scans:
        raise DamagedImage("The JPEG image is damaged or cut off: it holds no picture.")
    return _contents(frame, scans, pieces, orientation, is_cut=position == len(data))


def _kept_of_application(
    data: bytes | bytearray, start: int, segment: Piece, orientation: Orientation
) -> Iterator[Piece]:
    """Of an application's segment or a comment, what colours depend on; notes the orientation."""
    marker, content = data[start + 1], start + 4
    if marker == _APP1 and data.startswith(b"Exif\0\0", content):
        orientation.read_exif(segment[4:])
    elif marker == _APP1 and data.startswith(_XMP_NAME, content):
        orientation.read_xmp(segment[4:])
    elif marker == _APP14 and len(segment) <= _LONGEST_KEPT_SEGMENT:
        yield segment
    elif marker == _APP0 and data.startswith(b"JFIF\0", content):
        # Without its thumbnail.
        yield b"\xff\xe0\0\x10" + bytes(segment[4:16]).ljust(12, b"\0") + b"\0\0"


def _check_scans(scans: int) -> None:
    if scans > _MOST_SCANS:
        raise TooLarge(
            f"The JPEG image has more than {_MOST_SCANS} scans, each of which costs as much as a "
            "picture. Save it again as a normal JPEG."
        )


def _contents(
    frame: _Frame, scans: int, pieces: Sequence[Piece], orientation: Orientation, *, is_cut: bool
) -> Contents:
    block = orientation.block
    exif = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block if block else b""
    several = scans > 1 or frame.marker in _IN_SEVERAL_SCANS
    # Of a picture in one scan all is there, or the decoder notices; later scans only refine.
    ending = b"\xff\xd9" if not is_cut else b"" if several else _LOOK_AHEAD
    # Should a decoder see more scans than this walk, in what a table may hold by chance or on
    # purpose, then not in the worker.
    hidden = sum(bytes(piece).count(b"\xff\xda") for piece in pieces) > scans
    return Contents(
        pieces=(b"\xff\xd8", exif, *pieces, ending),
        size=frame.size,
        isolated=frame.marker not in _HUFFMAN or hidden,
        passes=scans,
        kept_bytes=int(frame.coefficients() * _COEFFICIENT_BYTES) if several else 0,
    )


def _skip_padding(data: bytes | bytearray, position: int) -> int:
    """Where the next marker's 0xFF stands, the last one of several."""
    # As decoders do where a segment's length is wrong.
    position = data.find(b"\xff", position)
    if position < 0:
        raise DamagedImage("The JPEG image is damaged or cut off: it holds no picture.")
    match = _PADDING.match(data, position)
    assert match is not None
    return match.end() - 1


_PADDING = re.compile(rb"\xff+")


def _end_of_scan(data: bytes | bytearray, position: int, *, is_only: bool) -> int:
    """Where the marker after a scan's coded data stands; the file's end where there is none."""
    if is_only:
        # Within coded data these two bytes cannot follow each other.
        end = data.find(b"\xff\xd9", position)
        return end if end >= 0 else len(data)
    match = _NEXT_MARKER.search(data, position)
    return match.start() if match else len(data)
