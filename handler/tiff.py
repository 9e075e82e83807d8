"""TIFF (6.0), and BigTIFF: which are read, and what a file holds.

Pillow's mode says too little. It opens a TIFF of signed bytes as one of unsigned ones, and one of
12 bits as one of 16; and what it does not open at all may be a sound file of a kind that few
programs read. So the tags are read here, and a kind that is not in the tables below is refused with
its name: never guessed, and never called damaged.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from handler.encoded import Contents, unsupported
from handler.errors import TooLarge

# Pillow opens the third and fourth too, whose two bytes stand the wrong way round.
BEGINNINGS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
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
_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# A palette of 8 bits has the most values of the tags above.
_MAX_VALUES = 3 * 256
# Sound files have some tens of tags.
_MAX_TAGS = 1000
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
_READ: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {
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

# A file of more pages is a document; which of them would be the picture?
_MOST_PAGES = 100

# What `_Tiff` raises where a directory, or a tag's value, stands past the file's end.
_PAST_THE_END = (struct.error, OverflowError)


@dataclass(frozen=True)
class PixelFormat:
    """How a TIFF that is read keeps its pixels.

    Attributes:
        photometric: what its numbers mean, such as `WHITE_IS_ZERO`.
        bits: of each sample.
        undeclared_alpha: it has a fourth sample and does not say what that is.
    """

    photometric: int
    bits: int
    undeclared_alpha: bool


def pixel_format(data: bytes | bytearray) -> PixelFormat:
    """Of a TIFF that `walk` let pass."""
    tags = _Tiff(data).first_page().tags
    photometric = _one(tags, _PHOTOMETRIC, WHITE_IS_ZERO)
    bits, samples = _one(tags, _BITS_PER_SAMPLE, 1), _one(tags, _SAMPLES_PER_PIXEL, 1)
    declared = _CHANNELS.get(photometric, 1) + len(tags.get(_EXTRA_SAMPLES, ()))
    return PixelFormat(photometric, bits, undeclared_alpha=samples > declared)


def walk(data: bytes | bytearray) -> Contents:
    """A TIFF, all of it.

    Raises:
        UnsupportedFormat: it is of a kind that is not read.
        TooLarge: it has more pages than any picture.
        struct.error: its header is cut off.
    """
    tiff = _Tiff(data)
    if (kind := _unread(tiff)) is not None:
        raise unsupported(kind)
    _check_pages(tiff)
    return Contents((memoryview(data),))


def _check_pages(tiff: "_Tiff") -> None:
    """A file can chain millions of pages, or a circle of them."""
    position, pages = tiff.start, {0}
    # A damaged page ends the chain: the first may still be sound.
    with suppress(*_PAST_THE_END):
        while position not in pages:
            pages.add(position)
            if len(pages) > _MOST_PAGES + 1:
                raise TooLarge(
                    f"The TIFF file has more than {_MOST_PAGES} pages. Send the page that counts."
                )
            position = tiff.next_directory(position)


def _unread(tiff: "_Tiff") -> str | None:
    try:
        page = tiff.first_page()
    except _PAST_THE_END:
        return None
    if page.entries > _MAX_TAGS:
        return f"a TIFF with more than {_MAX_TAGS} tags"
    if not page.tags:
        return None
    if tiff.is_cr2:
        return "a camera RAW (CR2)"
    return (
        _unread_camera_file(page.tags, page.below)
        or _unread_compression(page.tags)
        or _unread_samples(page.tags)
        or _unread_arrangement(tiff, page.tags)
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
    if number != _UNSIGNED or (photometric, size) not in _READ:
        return f"a TIFF of {numbers}{size}-bit {colours}"
    if _one(tags, _INK_SET, 1) != 1:
        return f"a TIFF of {size}-bit inks other than CMYK"
    channels, extra = _CHANNELS.get(photometric, 1), tags.get(_EXTRA_SAMPLES, ())
    samples = _one(tags, _SAMPLES_PER_PIXEL, 1)
    undeclared = photometric == RGB and samples == channels + 1 and not extra
    if extra not in _READ[photometric, size] or (
        samples != channels + len(extra) and not undeclared
    ):
        return f"a TIFF of {size}-bit {colours} with {samples} samples a pixel"
    return None


def _unread_arrangement(tiff: "_Tiff", tags: Tags) -> str | None:
    """In which order the numbers stand."""
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


@dataclass(frozen=True)
class _Page:
    """What decides of a TIFF's first page.

    Attributes:
        entries: how many tags its directory has.
        tags: those that decide.
        below: those of the pages that it points to.
    """

    entries: int
    tags: Tags
    below: list[Tags]


class _Tiff:
    """Reads the directories of a file, one for each page; raises `struct.error` or `OverflowError`.

    Attributes:
        order: of its bytes, as `struct` writes it.
        is_big: a BigTIFF, whose offsets have 64 bits.
        is_cr2: a camera's RAW file, by the mark behind the header.
        start: where the first directory stands.
    """

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data
        self.order = "<" if data.startswith(b"II") else ">"
        self.is_big = self._unpack("H", 2)[0] == _BIG_TIFF
        self.is_cr2 = data[8:10] == b"CR"
        # As `struct` writes the numbers; an entry's values follow it, or an offset to them.
        self._offset, self._count, self._entry = (
            ("Q", "Q", "HHQ") if self.is_big else ("I", "H", "HHI")
        )
        self._inline = struct.calcsize(f"={self._offset}")
        self._entry_size = struct.calcsize(f"={self._entry}") + self._inline
        (self.start,) = self._unpack(self._offset, 8 if self.is_big else 4)

    def first_page(self) -> _Page:
        """The first page, and up to eight that it points to."""
        tags = dict(self._entries(self.start))
        pages = tags.get(_SUB_IFDS, ())[:_MAX_SUB_IFDS]
        below = [dict(self._entries(page)) for page in pages]
        return _Page(self._length(self.start), tags, below)

    def next_directory(self, position: int) -> int:
        """Where the directory after this one stands; 0 where this is the last."""
        end = self._first_entry(position) + self._entry_size * self._length(position)
        return self._unpack(self._offset, end)[0]

    def _length(self, position: int) -> int:
        return self._unpack(self._count, position)[0]

    def _first_entry(self, position: int) -> int:
        return position + struct.calcsize(f"={self._count}")

    def _entries(self, position: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The deciding tags of one directory, with their numbers."""
        start, count = self._first_entry(position), min(self._length(position), _MAX_TAGS)
        for entry in range(start, start + count * self._entry_size, self._entry_size):
            tag, kind, number = self._unpack(self._entry, entry)
            if tag not in _TAGS or kind not in _TYPES or not 0 < number <= _MAX_VALUES:
                continue
            values, at = f"{number}{_TYPES[kind]}", entry + self._entry_size - self._inline
            if struct.calcsize(f"={values}") > self._inline:
                (at,) = self._unpack(self._offset, at)
            yield tag, self._unpack(values, at)

    def _unpack(self, format_: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + format_, self._data, offset)
