"""Which kinds of pixels are read: those of which it is exactly known how.

Pillow's mode says too little. It opens a TIFF of signed bytes as one of unsigned ones, and one of
12 bits as one of 16; and what it does not open at all may be a sound file of a kind that few
programs read. So the file's own header is read here, before anything else of it, and a kind that
is not in the tables below is refused with its name: never guessed, and never called damaged.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from handler.errors import UnsupportedFormat

_ADVICE = "Save it as a JPEG, or as a PNG with 8 bits a channel."


def check_kind(data: bytes | bytearray) -> None:
    """Refuses kinds of pixels that are not read; a header that makes no sense is not judged.

    Args:
        data: the encoded picture, of any format.

    Raises:
        UnsupportedFormat: with what the file is, and what to save it as.
    """
    kind: str | None = None
    if data.startswith(b"\xff\xd8"):
        kind = _unread_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        kind = _unread_png(data)
    elif data.startswith(b"BM"):
        kind = _unread_bmp(data)
    elif data.startswith(TIFF_BEGINNINGS):
        kind = _unread_tiff(data)
    if kind is not None:
        raise UnsupportedFormat(f"This is {kind}, which this server does not read. {_ADVICE}")


# --- JPEG ---

# Processes that libjpeg-turbo decodes (ITU-T T.81, table B.1), by the marker of the frame.
_JPEG_READ = {
    0xC0,  # baseline
    0xC1,  # extended sequential
    0xC2,  # progressive
    0xC3,  # lossless
    0xC9,  # sequential, arithmetic
    0xCA,  # progressive, arithmetic
}
_JPEG_UNREAD = {
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
_JPEG_START_OF_SCAN = 0xDA
# Grey, three colours, or CMYK. That CMYK is stored inverted, as Adobe's programs do, is what
# Pillow and all browsers take for granted, whether the file has Adobe's marker or not.
_JPEG_CHANNELS = {1, 3, 4}
# Cameras write some tens of segments before the frame. A file can hold millions.
_MAX_JPEG_SEGMENTS = 10_000


def _unread_jpeg(data: bytes | bytearray) -> str | None:
    position = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        header = data[position : position + 10]
        if len(header) < 10 or header[0] != 0xFF or header[1] == _JPEG_START_OF_SCAN:  # noqa: PLR2004
            return None
        marker = header[1]
        if marker in _JPEG_UNREAD:
            return _JPEG_UNREAD[marker]
        if marker in _JPEG_READ:
            bits, channels = header[4], header[9]
            if bits != 8:  # noqa: PLR2004
                return f"a JPEG with {bits} bits a channel"
            return None if channels in _JPEG_CHANNELS else f"a JPEG with {channels} channels"
        # 0xFF before a marker is padding.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(header[2:4], "big")  # noqa: PLR2004
    return None


# --- PNG: every kind that its standard has is read ---


def _unread_png(data: bytes | bytearray) -> str | None:
    return "a PNG in the form that only iOS reads (CgBI)" if data[12:16] == b"CgBI" else None


# --- BMP ---

_BMP_BITS = {1, 4, 8, 16, 24, 32}
_BMP_UNREAD = {4: "a BMP with a JPEG inside", 5: "a BMP with a PNG inside"}
_BMP_BIT_FIELDS = 3
# The sizes of its header, of which the second begins with what is read here.
_BMP_OLDEST_HEADER, _BMP_INFO_HEADER, _BMP_OS2_HEADER, _BMP_ALPHA_HEADER = 12, 40, 64, 56
# Which bits of a pixel are red, green, blue and transparency, by the bits a pixel has.
_BMP_MASKS = {
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
_MOST_BMP_BITS = 64


def bmp_bits(data: bytes | bytearray) -> int:
    """Bits a pixel of a BMP whose header is whole."""
    (header,) = struct.unpack_from("<I", data, 14)
    bits: int
    (bits,) = struct.unpack_from("<H", data, 24 if header == _BMP_OLDEST_HEADER else 28)
    return bits


def _unread_bmp(data: bytes | bytearray) -> str | None:
    if len(data) < 14 + _BMP_INFO_HEADER:
        return None
    bits = bmp_bits(data)
    if bits not in _BMP_BITS and 0 < bits <= _MOST_BMP_BITS:
        return f"a BMP with {bits} bits a pixel"
    header, compression = struct.unpack_from("<I12xI", data, 14)
    if header < _BMP_INFO_HEADER:
        return None
    if header == _BMP_OS2_HEADER and compression >= _BMP_BIT_FIELDS:
        return "a BMP with a compression of OS/2"
    if compression == _BMP_BIT_FIELDS and len(data) >= 14 + _BMP_ALPHA_HEADER:
        *masks, alpha = struct.unpack_from("<4I", data, 14 + _BMP_INFO_HEADER)
        if header < _BMP_ALPHA_HEADER or bits != 32:  # noqa: PLR2004
            alpha = 0
        if (bits, *masks, alpha) not in _BMP_MASKS:
            return f"a BMP with {bits} bits a pixel in an unusual order"
    return _BMP_UNREAD.get(compression)


# --- TIFF ---

# Pillow opens the third and fourth too, whose two bytes stand the wrong way round.
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_BIG_TIFF = 43

# The tags that decide how pixels are read (TIFF 6.0, section 8, and later supplements).
_NEW_SUBFILE_TYPE = 254
_BITS_PER_SAMPLE = 258
_COMPRESSION = 259
_PHOTOMETRIC = 262
_FILL_ORDER = 266
_SAMPLES_PER_PIXEL = 277
_PLANAR_CONFIGURATION = 284
_COLOR_MAP = 320
_SUB_IFDS = 330
_INK_SET = 332
_EXTRA_SAMPLES = 338
_SAMPLE_FORMAT = 339
_SUBSAMPLING = 530
_DNG_VERSION = 50706
_TAGS = {
    _NEW_SUBFILE_TYPE,
    _BITS_PER_SAMPLE,
    _COMPRESSION,
    _PHOTOMETRIC,
    _FILL_ORDER,
    _SAMPLES_PER_PIXEL,
    _PLANAR_CONFIGURATION,
    _COLOR_MAP,
    _SUB_IFDS,
    _INK_SET,
    _EXTRA_SAMPLES,
    _SAMPLE_FORMAT,
    _SUBSAMPLING,
    _DNG_VERSION,
}

# Of the tags' types, those of whole numbers.
_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# A palette of 8 bits has the most values of the tags above.
_MAX_TIFF_VALUES = 3 * 256
# Sound files have some tens of tags.
_MAX_TIFF_TAGS = 1000
# Cameras' files have up to five.
_MAX_SUB_IFDS = 8

Tags = dict[int, tuple[int, ...]]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
_UNSPECIFIED, _PREMULTIPLIED, _STRAIGHT = 0, 1, 2

_COLOURS = {
    WHITE_IS_ZERO: "grey where white is zero",
    BLACK_IS_ZERO: "grey",
    RGB: "RGB",
    PALETTE: "palette colours",
    4: "a mask",
    CMYK: "CMYK",
    YCBCR: "YCbCr",
    CIELAB: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "a camera's sensor data",
    32844: "LogL",
    32845: "LogLuv",
    34892: "a camera's linear data",
}
_CAMERA_COLOURS = {32803, 34892}
_CHANNELS = {RGB: 3, CMYK: 4, YCBCR: 3, CIELAB: 3}

_UNSIGNED = 1
_NUMBERS = {
    1: "",
    2: "signed ",
    3: "floating-point ",
    4: "undefined ",
    5: "complex ",
    6: "complex floating-point ",
}

# Those that the libtiff in Pillow's packages decodes; a test writes and reads each.
_COMPRESSIONS_READ = {
    1,  # none
    2,  # CCITT, runs only
    3,  # CCITT group 3
    4,  # CCITT group 4
    5,  # LZW
    7,  # JPEG
    8,  # deflate
    32773,  # PackBits
    32946,  # deflate, by its old number
    34925,  # LZMA
    50000,  # Zstandard
}
_COMPRESSIONS_UNREAD = {
    6: "old-style JPEG",
    9: "JBIG",
    10: "JBIG",
    32766: "NeXT",
    32771: "CCITT of 16-bit words",
    32809: "ThunderScan",
    32895: "IT8",
    32908: "PixarFilm",
    32909: "PixarLog",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34676: "SGILog",
    34677: "SGILog",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG",
    34933: "PNG",
    34934: "JPEG XR",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_JPEG_COMPRESSION = 7

# What is read, of unsigned whole numbers: colours and bits a sample, and which samples may come
# beside the colours. Each was compared with numpy for both orders of bytes, in chunks and planes.
_ALPHA = ((), (_UNSPECIFIED,), (_PREMULTIPLIED,), (_STRAIGHT,))
_TIFF_READ: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {
    (WHITE_IS_ZERO, 1): ((),),
    (WHITE_IS_ZERO, 2): ((),),
    (WHITE_IS_ZERO, 4): ((),),
    (WHITE_IS_ZERO, 8): ((),),
    (WHITE_IS_ZERO, 16): ((),),
    (BLACK_IS_ZERO, 1): ((),),
    (BLACK_IS_ZERO, 2): ((),),
    (BLACK_IS_ZERO, 4): ((),),
    (BLACK_IS_ZERO, 8): _ALPHA,
    (BLACK_IS_ZERO, 12): ((),),
    (BLACK_IS_ZERO, 16): ((),),
    (RGB, 8): (
        *_ALPHA,
        (_UNSPECIFIED,) * 2,
        (_UNSPECIFIED,) * 3,
        (_PREMULTIPLIED, _UNSPECIFIED),
        (_PREMULTIPLIED, _UNSPECIFIED, _UNSPECIFIED),
        (_STRAIGHT, _UNSPECIFIED),
        (_STRAIGHT, _UNSPECIFIED, _UNSPECIFIED),
    ),
    (RGB, 16): _ALPHA,
    (PALETTE, 1): ((),),
    (PALETTE, 2): ((),),
    (PALETTE, 4): ((),),
    (PALETTE, 8): ((), (_UNSPECIFIED,), (_STRAIGHT,)),
    (CMYK, 8): ((), (_UNSPECIFIED,), (_UNSPECIFIED,) * 2),
    (CMYK, 16): ((),),
    (YCBCR, 8): ((),),
    (CIELAB, 8): ((),),
}
# Pillow has these for little-endian files only.
_LITTLE_ENDIAN_ONLY = {(WHITE_IS_ZERO, 16), (BLACK_IS_ZERO, 12)}
# By the standard a palette's numbers have 16 bits; of some programs they have 8.
_SIXTEEN_BITS = 256

# Bits in reverse order, as some fax programs write them, are read of these.
_REVERSED_READ = {
    *((colours, bits) for colours in (0, 1, 3) for bits in (1, 2, 4, 8)),
    (RGB, 8),
}


@dataclass(frozen=True)
class TiffKind:
    """How a TIFF that is read keeps its pixels.

    Attributes:
        photometric: what its numbers mean, such as `WHITE_IS_ZERO`.
        bits: of each sample.
        undeclared_alpha: it has a fourth sample and does not say what that is.
    """

    photometric: int
    bits: int
    undeclared_alpha: bool


def tiff_kind(data: bytes | bytearray) -> TiffKind:
    """Of a TIFF that `check_kind` let pass."""
    tags = _Tiff(data).first
    photometric = _one(tags, _PHOTOMETRIC, WHITE_IS_ZERO)
    bits, samples = _one(tags, _BITS_PER_SAMPLE, 1), _one(tags, _SAMPLES_PER_PIXEL, 1)
    declared = _CHANNELS.get(photometric, 1) + len(tags.get(_EXTRA_SAMPLES, ()))
    return TiffKind(photometric, bits, undeclared_alpha=samples > declared)


def _unread_tiff(data: bytes | bytearray) -> str | None:
    try:
        tiff = _Tiff(data)
    except (struct.error, OverflowError):  # a directory, or a tag's value, past the file's end
        return None
    if tiff.tags > _MAX_TIFF_TAGS:
        return f"a TIFF with more than {_MAX_TIFF_TAGS} tags"
    if not tiff.first:
        return None
    if data[8:10] == b"CR":
        return "a camera RAW (CR2)"
    return (
        _unread_camera_file(tiff.first, tiff.below)
        or _unread_compression(tiff.first)
        or _unread_samples(tiff.first)
        or _unread_arrangement(tiff)
    )


def _unread_camera_file(first: Tags, below: list[Tags]) -> str | None:
    """Pillow would take the first page, which in a camera's file is a small copy, often of another
    shape and rendered otherwise than the picture.
    """
    if _DNG_VERSION in first:
        return "a camera RAW (DNG)"
    is_copy = bool(_one(first, _NEW_SUBFILE_TYPE, 0) & 1)
    if any(_one(tags, _PHOTOMETRIC, -1) in _CAMERA_COLOURS for tags in (first, *below)) or (
        is_copy and below
    ):
        return "a camera RAW (a TIFF of the camera's own kind, such as NEF or ARW)"
    return "a TIFF whose first page is a small copy of another" if is_copy else None


def _unread_compression(tags: Tags) -> str | None:
    compression = _one(tags, _COMPRESSION, 1)
    if compression in _COMPRESSIONS_READ:
        return None
    name = _COMPRESSIONS_UNREAD.get(compression, f"unknown ({compression})")
    return f"a TIFF with {name} compression"


def _unread_samples(tags: Tags) -> str | None:
    """What the numbers are and mean."""
    if _PHOTOMETRIC not in tags:
        return "a TIFF that does not say what its numbers mean (it has no photometric tag)"
    photometric = _one(tags, _PHOTOMETRIC, -1)
    colours = _COLOURS.get(photometric, f"unknown colours ({photometric})")
    bits = set(tags.get(_BITS_PER_SAMPLE, (1,)))
    formats = set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    if len(bits) > 1 or len(formats) > 1:
        return f"a TIFF of {colours} with samples of different kinds"
    (size,), (number,) = bits, formats
    numbers = _NUMBERS.get(number, "unknown ")
    if number != _UNSIGNED or (photometric, size) not in _TIFF_READ:
        return f"a TIFF of {numbers}{size}-bit {colours}"
    if _one(tags, _INK_SET, 1) != 1:
        return f"a TIFF of {size}-bit inks other than CMYK"
    channels, extra = _CHANNELS.get(photometric, 1), tags.get(_EXTRA_SAMPLES, ())
    samples = _one(tags, _SAMPLES_PER_PIXEL, 1)
    undeclared = photometric == RGB and samples == channels + 1 and not extra
    if extra not in _TIFF_READ[photometric, size] or (
        samples != channels + len(extra) and not undeclared
    ):
        return f"a TIFF of {size}-bit {colours} with {samples} samples a pixel"
    return None


def _unread_arrangement(tiff: "_Tiff") -> str | None:
    """In which order the numbers stand."""
    tags = tiff.first
    photometric, size = _one(tags, _PHOTOMETRIC, -1), _one(tags, _BITS_PER_SAMPLE, 1)
    samples, extra = _one(tags, _SAMPLES_PER_PIXEL, 1), tags.get(_EXTRA_SAMPLES, ())
    what = f"a TIFF of {size}-bit {_COLOURS[photometric]}"
    if tiff.order == ">" and ((photometric, size) in _LITTLE_ENDIAN_ONLY or tiff.is_big):
        return f"{what}, big-endian{' and with 64-bit offsets' if tiff.is_big else ''}"
    if _one(tags, _FILL_ORDER, 1) != 1 and (
        (photometric, size) not in _REVERSED_READ or samples != _CHANNELS.get(photometric, 1)
    ):
        return f"{what} with its bits in reverse order"
    in_planes = _one(tags, _PLANAR_CONFIGURATION, 1) != 1
    if in_planes and any(extra) and (photometric != RGB or len(extra) > 1):
        return f"{what} with its transparency in a plane of its own"
    is_jpeg = _one(tags, _COMPRESSION, 1) == _JPEG_COMPRESSION
    if photometric == YCBCR and not is_jpeg and _SUBSAMPLING not in tags:
        return f"{what} that does not say how its colours are subsampled"
    if photometric == PALETTE and max(tags.get(_COLOR_MAP, (_SIXTEEN_BITS,))) < _SIXTEEN_BITS:
        return f"{what} whose palette has 8 bits where the standard has 16"
    return None


def _one(tags: Tags, tag: int, default: int) -> int:
    values = tags.get(tag)
    return values[0] if values else default


class _Tiff:
    """What decides of a TIFF's first page, and of those below it; raises `struct.error`.

    Attributes:
        order: of its bytes, as `struct` writes it.
        is_big: a BigTIFF, whose offsets have 64 bits.
        tags: how many the first page has.
        first: the deciding tags of the first page.
        below: those of the pages that it points to.
    """

    def __init__(self, data: bytes | bytearray) -> None:
        self.order = "<" if data.startswith(b"II") else ">"
        (version,) = struct.unpack_from(f"{self.order}H", data, 2)
        self.is_big = version == _BIG_TIFF
        self._data = data
        offset = self._unpack("Q", 8) if self.is_big else self._unpack("I", 4)
        self.tags = self._unpack("Q" if self.is_big else "H", offset[0])[0]
        self.first = dict(self._entries(offset[0]))
        pages = self.first.get(_SUB_IFDS, ())[:_MAX_SUB_IFDS]
        self.below = [dict(self._entries(page)) for page in pages]

    def _unpack(self, format_: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + format_, self._data, offset)

    def _entries(self, offset: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The deciding tags of one directory, with their numbers."""
        count_format, format_, inline = ("Q", "HHQ", 8) if self.is_big else ("H", "HHI", 4)
        (count,) = self._unpack(count_format, offset)
        start = offset + struct.calcsize(f"={count_format}")
        size = struct.calcsize(f"={format_}") + inline
        for position in range(start, start + min(count, _MAX_TIFF_TAGS) * size, size):
            tag, kind, number = self._unpack(format_, position)
            if tag not in _TAGS or kind not in _TIFF_TYPES or not 0 < number <= _MAX_TIFF_VALUES:
                continue
            values, at = f"{number}{_TIFF_TYPES[kind]}", position + size - inline
            if struct.calcsize(f"={values}") > inline:
                (at,) = self._unpack("Q" if self.is_big else "I", at)
            yield tag, self._unpack(values, at)
