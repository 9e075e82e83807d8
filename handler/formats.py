"""Which formats are read, how their files begin, and what a file of them may cost.

`survey` walks through a file's container before any decoder sees it: a bounded number of steps,
none of which touches a pixel. What it hands on is a cleaned file that holds what makes the picture
and nothing else. Comments, profiles, text, thumbnails, later frames and a film behind the picture
are left out, so that none of them can cost anything, and what is wrong with them no longer counts.

Where the cost of decoding follows from what the walk found, the picture may be decoded in the
worker itself; all others go to the decoder process, whose time and memory the kernel bounds.
"""

import importlib.util
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from handler.errors import DamagedImage, TooLarge
from handler.kinds import TIFF_BEGINNINGS

# Phones write HEIC; this package decodes it and no more. An archive serves without it too.
_HAS_HEIF = importlib.util.find_spec("pi_heif") is not None

Piece = bytes | memoryview


# What servers' scripts print before a picture by mistake; anything else in front is refused.
_LEADING_JUNK = b"\r\n\t \0\xef\xbb\xbf"
_MOST_LEADING_JUNK = 256

# Real files stay far below these; each step costs about a microsecond.
# JPEG: 20 MB are 320 segments of the largest size; a scan has a table or two before it.
_MOST_SEGMENTS = 1_000
# PNG: libpng writes chunks of 8 KiB, some programs of 4 KiB: 5,000 in 20 MB.
_MOST_CHUNKS = 10_000
# GIF: a comment of 64 KiB has 256 blocks.
_MOST_BLOCKS = 10_000

# A progressive JPEG is decoded once for each of its scans. Cameras and editors write about 10; a
# file can hold thousands, each of which costs a pass over all pixels.
_MOST_SCANS = 100

# A file of more pages is a document; which of them would be the picture?
_MOST_PAGES = 100


@dataclass(frozen=True)
class Survey:
    """What a walk through a file found.

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
    size: tuple[int, int] | None = None
    isolated: bool = True
    seconds: float = 0.0
    fixed_bytes: int = 0
    pixel_bytes: int = 4

    def cleaned(self) -> bytes:
        """The cleaned file."""
        return b"".join(self.pieces)


def survey(data: bytes | bytearray) -> Survey | None:
    """Finds out what a file is and what it holds.

    Args:
        data: the encoded picture.

    Returns:
        what was found; None where the file begins as none of the accepted formats.

    Raises:
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
        return found.walk(memoryview(data), data)
    except (struct.error, IndexError) as error:
        raise DamagedImage("The image is damaged or cut off: its header cannot be read.") from error


def _format_of(data: bytes | bytearray) -> "_Format | None":
    candidate: _Format
    for candidate in _FORMATS:
        if any(data.startswith(start, offset) for offset, start in candidate.beginnings):
            return candidate
    return None


def _too_many(what: str, most: int) -> TooLarge:
    return TooLarge(f"The image's file has more than {most} {what}. Save it again as a JPEG.")


# --- Orientation: all that counts of a picture's metadata ---

_ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4
_UPRIGHT = 1
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_LONGEST_XMP = 100_000


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
        for position in range(start + 2, start + 2 + 12 * min(count, _MOST_SEGMENTS), 12):
            tag, kind, _ = struct.unpack_from(f"{order}HHI", block, position)
            if tag == _ORIENTATION and kind in {_SHORT, _LONG}:
                form = f"{order}{'H' if kind == _SHORT else 'I'}"
                value: int
                (value,) = struct.unpack_from(form, block, position + 8)
                return value if value in range(1, 9) else _UPRIGHT
    except struct.error:
        pass
    return None


def _xmp_orientation(block: bytes) -> int | None:
    match = _XMP_ORIENTATION.search(block)
    return int(match[1]) if match else None


@dataclass
class _Orientation:
    """What a file's Exif says, and its XMP where that says nothing; the first of each counts."""

    exif: int | None = None
    xmp: int | None = None

    def read_exif(self, block: Piece) -> None:
        if self.exif is None:
            self.exif = _exif_orientation(bytes(block[: 1 << 16]))

    def read_xmp(self, block: Piece) -> None:
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


# --- JPEG (ITU-T T.81, annex B) ---

_SOF_HUFFMAN = {0xC0, 0xC1, 0xC2}
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
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
# Measured: seconds of CPU a pixel and scan, and a byte, at most.
_JPEG_PIXEL_SECONDS, _JPEG_BYTE_SECONDS = 2.5e-9, 40e-9
# With a tenth for what libjpeg keeps beside them: it calls a picture damaged when memory runs out.
_COEFFICIENT_BYTES = 2.2
# Pillow's copy and the upright RGB one.
_JPEG_PIXEL_BYTES = 8


@dataclass
class _Frame:
    """A JPEG's frame header."""

    marker: int
    bits: int
    size: tuple[int, int]
    sampling: list[tuple[int, int]]

    @classmethod
    def read(cls, marker: int, segment: Piece) -> "_Frame":
        bits, height, width, components = struct.unpack_from(">BHHB", segment, 4)
        factors = [segment[11 + 3 * i] for i in range(components)]
        return cls(marker, bits, (width, height), [(f >> 4, f & 15) for f in factors])

    def coefficients(self) -> int:
        """How many a decoder keeps that needs several scans."""
        most_x = max((x for x, _ in self.sampling), default=1) or 1
        most_y = max((y for _, y in self.sampling), default=1) or 1
        width, height = self.size[0] + 8 * most_x, self.size[1] + 8 * most_y
        return sum(width * height * x * y // (most_x * most_y) for x, y in self.sampling)


def _walk_jpeg(  # noqa: C901  # one loop with a case for each segment that counts
    view: memoryview, data: bytes | bytearray
) -> Survey:
    pieces: list[Piece] = []
    orientation = _Orientation()
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
        if marker in _SOF:
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
        is_only = frame.marker not in _PROGRESSIVE and segment[4] >= len(frame.sampling)
        position = _end_of_scan(data, position, is_only=is_only)
        pieces.append(view[start:position])
        if is_only or position == len(data):
            break
    else:
        raise _too_many("segments", _MOST_SEGMENTS)
    if frame is None or not scans:
        raise DamagedImage("The JPEG image is damaged or cut off: it holds no picture.")
    return _survey_of_jpeg(frame, scans, pieces, orientation, is_cut=position == len(data))


def _kept_of_application(
    data: bytes | bytearray, start: int, segment: Piece, orientation: _Orientation
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


def _survey_of_jpeg(
    frame: _Frame, scans: int, pieces: Sequence[Piece], orientation: _Orientation, *, is_cut: bool
) -> Survey:
    block = orientation.block
    exif = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block if block else b""
    several = scans > 1 or frame.marker in _PROGRESSIVE
    # Of a picture in one scan all is there, or the decoder notices; later scans only refine.
    ending = b"\xff\xd9" if not is_cut else b"" if several else _LOOK_AHEAD
    pixels = frame.size[0] * frame.size[1]
    length = sum(map(len, pieces))
    # Should a decoder see more scans than this walk, in what a table may hold by chance or on
    # purpose, then not in the worker.
    hidden = sum(bytes(piece).count(b"\xff\xda") for piece in pieces) > scans
    return Survey(
        names=_JPEG.names,
        pieces=(b"\xff\xd8", exif, *pieces, ending),
        size=frame.size,
        isolated=frame.marker not in _SOF_HUFFMAN or frame.bits != 8 or hidden,  # noqa: PLR2004
        seconds=pixels * scans * _JPEG_PIXEL_SECONDS + length * _JPEG_BYTE_SECONDS,
        fixed_bytes=length + (int(frame.coefficients() * _COEFFICIENT_BYTES) if several else 0),
        pixel_bytes=_JPEG_PIXEL_BYTES,
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


# --- PNG (W3C, Portable Network Graphics) ---

# The header comes first and has one length.
_PNG_BEGINNING = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_PNG_KEPT = {b"PLTE", b"tRNS"}
# The longest of them: 256 colours of 3 bytes.
_LONGEST_PNG_KEPT = 768
_PNG_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"
_PNG_PIXEL_SECONDS, _PNG_BYTE_SECONDS = 30e-9, 80e-9
# Pillow's copy and the upright RGB one.
_PNG_PIXEL_BYTES = 9


def _walk_png(  # noqa: C901  # one loop with a case for each chunk that counts
    view: memoryview, data: bytes | bytearray
) -> Survey:
    if data[: len(_PNG_BEGINNING)] != _PNG_BEGINNING:
        raise DamagedImage("The PNG image is damaged: its first bytes were changed.")
    pieces: list[Piece] = [view[8:33]]
    pixels: list[Piece] = []
    orientation = _Orientation()
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
        if kind in _PNG_KEPT and not after_pixels:
            if length > _LONGEST_PNG_KEPT:
                raise DamagedImage("The PNG image is damaged: its palette is too long.")
            pieces.append(whole)
        elif kind == b"eXIf":
            orientation.read_exif(content)
        elif kind == b"iTXt" and bytes(content[: len(_PNG_XMP)]) == _PNG_XMP:
            orientation.read_xmp(content)
        elif kind == b"IEND":
            break
    else:
        if not pixels or not after_pixels:
            raise _too_many("chunks", _MOST_CHUNKS)
    width, height, bits = struct.unpack_from(">IIB", view, 16)
    length = sum(map(len, pixels))
    block = orientation.block
    return Survey(
        names=_PNG.names,
        pieces=(
            _PNG_BEGINNING[:8],
            *pieces,
            *(_png_chunk(b"eXIf", [block]) if block else ()),
            *_png_chunk(b"IDAT", pixels),
            *_png_chunk(b"IEND", []),
        ),
        size=(width, height),
        isolated=bits > 8,  # noqa: PLR2004
        seconds=width * height * _PNG_PIXEL_SECONDS + length * _PNG_BYTE_SECONDS,
        fixed_bytes=length,
        pixel_bytes=_PNG_PIXEL_BYTES,
    )


def _png_chunk(kind: bytes, content: Sequence[Piece]) -> Iterator[Piece]:
    """A chunk; of pixels Pillow does not look at the checksum."""
    yield struct.pack(">I4s", sum(map(len, content)), kind)
    yield from content
    yield struct.pack(">I", 0 if kind == b"IDAT" else zlib.crc32(b"".join((kind, *content))))


# --- WebP (RFC 9649) ---

_VP8X_HEADER = 10
_WEBP_ALPHA, _WEBP_EXIF, _WEBP_ANIMATION = 0x10, 0x08, 0x02
_WEBP_PIXEL_SECONDS, _WEBP_BYTE_SECONDS = 60e-9, 120e-9
# Two canvases of the decoder, the bytes they are copied to, Pillow's copy and the upright one.
_WEBP_PIXEL_BYTES = 21


def _walk_webp(  # noqa: C901  # one loop with a case for each chunk that counts
    view: memoryview, data: bytes | bytearray
) -> Survey:
    del data
    extended: bytes | None = None
    pieces: list[Piece] = []
    orientation = _Orientation()
    is_lossy, position = False, 12
    has_picture = False
    for _ in range(_MOST_SEGMENTS):
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
            raise _too_many("chunks", _MOST_SEGMENTS)
    if not has_picture:
        raise DamagedImage("The WEBP image is damaged or cut off: it holds no picture.")
    block = orientation.block
    if extended is not None:
        flags = extended[0] & (_WEBP_ALPHA | _WEBP_ANIMATION) | (_WEBP_EXIF if block else 0)
        header = struct.pack("<4sIB", b"VP8X", _VP8X_HEADER, flags) + extended[1:]
        exif = struct.pack("<4sI", b"EXIF", len(block)) + block if block else b""
        pieces = [header, *pieces, exif]
        is_lossy = is_lossy and not flags & (_WEBP_ALPHA | _WEBP_ANIMATION)
    length = sum(map(len, pieces))
    size = _webp_size(pieces)
    pixels = size[0] * size[1] if size else 0
    return Survey(
        names=_WEBP.names,
        pieces=(b"RIFF", struct.pack("<I", length + 4), b"WEBP", *pieces),
        size=size,
        # Lossless coding, of transparency too, takes 11 kB for each of its groups of codes.
        isolated=not is_lossy,
        seconds=pixels * _WEBP_PIXEL_SECONDS + length * _WEBP_BYTE_SECONDS,
        fixed_bytes=2 * length,
        pixel_bytes=_WEBP_PIXEL_BYTES,
    )


def _webp_size(pieces: Sequence[Piece]) -> tuple[int, int] | None:
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


# --- GIF: comments and programs' own blocks go; Pillow joins them in quadratic time ---

_GIF_IMAGE, _GIF_EXTENSION, _GIF_CONTROL = 0x2C, 0x21, 0xF9


def _walk_gif(view: memoryview, data: bytes | bytearray) -> Survey:
    del data
    flags = view[10]
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    head, control = view[:position], view[:0]
    start, in_extension = position, False
    for _ in range(_MOST_BLOCKS):
        length = view[position]
        if in_extension:
            position += length + 1
            in_extension = length > 0
            if not in_extension and view[start + 1] == _GIF_CONTROL:
                control = view[start:position]
        elif length == _GIF_IMAGE:
            # The decoder stops where the picture does. A frame may be larger than the screen.
            return Survey(_GIF.names, (head, control, view[position:]))
        else:
            in_extension = length == _GIF_EXTENSION
            start = position
            position += 2 if in_extension else 1
    raise _too_many("blocks", _MOST_BLOCKS)


# --- BMP ---

_BMP_RUN_LENGTHS = {1, 2}
# Pillow reads these in Python: 0.11 microseconds a pixel were measured.
_MOST_RUN_LENGTH_PIXELS = 8_000_000


def _walk_bmp(view: memoryview, data: bytes | bytearray) -> Survey:
    del data
    (header,) = struct.unpack_from("<I", view, 14)
    if header >= 40:  # noqa: PLR2004  # the first one that says how pixels are compressed
        width, height, compression = struct.unpack_from("<ii4xI", view, 18)
        if compression in _BMP_RUN_LENGTHS and abs(width * height) > _MOST_RUN_LENGTH_PIXELS:
            raise TooLarge(
                f"The run-length coded BMP has {abs(width)} x {abs(height)} pixels; at most "
                f"{_MOST_RUN_LENGTH_PIXELS} are read. Save it as a PNG."
            )
    return Survey(_BMP.names, (view,))


# --- TIFF (6.0), and BigTIFF with offsets of 64 bits ---

_BIG_TIFF = 43


def _walk_tiff(view: memoryview, data: bytes | bytearray) -> Survey:
    """Counts pages; a file can chain millions, or a circle of them."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = _BIG_TIFF in data[2:4]
    count, entry, offset = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    (position,) = struct.unpack_from(f"{order}{offset}", view, 8 if is_big else 4)
    pages = {0}
    try:
        while position not in pages:
            pages.add(position)
            if len(pages) > _MOST_PAGES + 1:
                raise TooLarge(
                    f"The TIFF file has more than {_MOST_PAGES} pages. Send the page that counts."
                )
            (tags,) = struct.unpack_from(f"{order}{count}", view, position)
            end = position + struct.calcsize(count) + entry * tags
            (position,) = struct.unpack_from(f"{order}{offset}", view, end)
    except (struct.error, OverflowError):
        pass  # a damaged page: the first may still be sound
    return Survey(_TIFF.names, (view,))


def _walk_boxes(view: memoryview, data: bytes | bytearray) -> Survey:
    """AVIF and HEIC: their decoders find their way through boxes at no great cost."""
    names = _AVIF.names if data.startswith(b"avi", 8) else _HEIF.names
    return Survey(names, (view,))


# --- The table ---


@dataclass(frozen=True)
class _Format:
    """One row: an accepted format.

    Attributes:
        names: what Pillow calls it; several where only decoding tells them apart.
        walk: what finds out what a file of it holds.
        pixel_bytes: of memory that a pixel takes at least while it is decoded.
        beginnings: offset and bytes, one of which a file of it has.
    """

    names: tuple[str, ...]
    walk: Callable[[memoryview, bytes | bytearray], Survey]
    pixel_bytes: int
    beginnings: tuple[tuple[int, bytes], ...]


def _brands(*brands: bytes) -> tuple[tuple[int, bytes], ...]:
    return tuple((4, b"ftyp" + brand) for brand in brands)


# At a fraction of its size.
_JPEG = _Format(("JPEG",), _walk_jpeg, 0, ((0, b"\xff\xd8"),))
_PNG = _Format(("PNG",), _walk_png, 1, ((0, b"\x89PNG"),))
# Two canvases of the decoder, a copy of one, and Pillow's picture, 4 bytes each.
_WEBP = _Format(("WEBP",), _walk_webp, 16, ((8, b"WEBP"),))
_GIF = _Format(("GIF",), _walk_gif, 1, ((0, b"GIF8"),))
_BMP = _Format(("BMP",), _walk_bmp, 1, ((0, b"BM"),))
_TIFF = _Format(("TIFF",), _walk_tiff, 1, tuple((0, start) for start in TIFF_BEGINNINGS))
# Measured: planes of brightness and colour, RGB, and Pillow's picture.
_AVIF = _Format(("AVIF",), _walk_boxes, 9, _brands(b"avif", b"avis"))
# The last two brands say nothing of the coding.
_HEIF = _Format(
    ("HEIF", "AVIF"), _walk_boxes, 7, _brands(b"heic", b"heix", b"hevc", b"mif1", b"msf1")
)
_FORMATS = (_JPEG, _PNG, _WEBP, _GIF, _BMP, _TIFF, _AVIF, *((_HEIF,) if _HAS_HEIF else ()))

# Pillow's names of all of them.
ACCEPTED = tuple(row.names[0] for row in _FORMATS)


def least_bytes(name: str | None, size: tuple[int, int]) -> int:
    """Memory that decoding takes at least, in bytes, by Pillow's name of the format."""
    pixel_bytes = next((row.pixel_bytes for row in _FORMATS if row.names[0] == name), 0)
    return size[0] * size[1] * pixel_bytes
