"""TIFF 6.0: reject by name the kinds that Pillow would not read exactly.

Pillow's mode is not sufficient: it opens signed bytes as unsigned and 12 bits as 16, and a file
that it cannot open may be intact. So the check reads the tags. Pillow parses them, in the decoder
process, where time and memory are limited.
"""

import io
from typing import Any

from PIL import TiffImagePlugin
from PIL.ExifTags import Base as Tag
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

from handler.decoding.headers import unsupported
from handler.errors import TooLarge

# Pillow's own reader of uncompressed TIFFs returns wrong pixels for some reversed bits; libtiff,
# which reads the compressed ones in any case, is correct.
TiffImagePlugin.READ_LIBTIFF = True

# A file with more pages is a document.
_MAX_PAGES = 100
# Files from cameras have up to five.
_MAX_SUB_IFDS = 8

_INVERTED_GRAY, _GRAY, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COLORS = {
    _INVERTED_GRAY: "gray where white is zero",
    _GRAY: "gray",
    _RGB: "RGB",
    _PALETTE: "palette colors",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    _LAB: "CIELab",
}
_CHANNELS = {_RGB: 3, _CMYK: 4, _YCBCR: 3}
_CAMERA_COLORS = {(32803,), (34892,)}
_NUMBERS = {1: "", 2: "signed ", 3: "floating-point ", 6: "complex "}

# Supported color spaces and bits of unsigned samples, with the supported extra samples: 0 is
# unspecified, 1 premultiplied alpha, 2 alpha. A test decodes all of them.
_NONE: set[tuple[int, ...]] = {()}
_ALPHA: set[tuple[int, ...]] = {(), (0,), (1,), (2,)}
_SUPPORTED: dict[tuple[int, int], set[tuple[int, ...]]] = {
    **{(colors, bits): _NONE for colors in (0, 1, 3) for bits in (1, 2, 4, 8)},
    (_GRAY, 8): _ALPHA,
    (_RGB, 8): _ALPHA,
    (_RGB, 16): _ALPHA,
    (_GRAY, 16): _NONE,
    (_CMYK, 8): _NONE,
    (_CMYK, 16): _NONE,
    (_YCBCR, 8): _NONE,
}
# A palette without larger values has 8 bits, as some programs write it, instead of 16.
_SIXTEEN_BITS = 256
# None, CCITT, LZW, JPEG, deflate (two numbers), PackBits, LZMA, Zstandard.
_JPEG = 7
_COMPRESSIONS = {1, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, 34925, 50000}


def check(data: bytes) -> None:
    """Raise an error if the first page cannot be read exactly, or if there are too many pages.

    Raises:
        UnsupportedFormat: the first page is of an unsupported kind.
        TooLarge: the file has more than 100 pages.
    """
    if data[8:10] == b"CR":
        raise unsupported("a camera RAW (CR2)")
    file = io.BytesIO(data)
    header = file.read(16 if b"+" in data[:4] else 8)
    page, pages = ImageFileDirectory_v2(header), {0}
    while page.next not in pages:
        pages.add(page.next)
        if len(pages) > _MAX_PAGES + 1:
            raise TooLarge(f"The TIFF has more than {_MAX_PAGES} pages. Send the one that counts.")
        file.seek(page.next)
        page.load(file)
        # Only the first page is decoded; without a size it is damaged.
        if len(pages) == 2 and {Tag.ImageWidth, Tag.ImageLength} <= set(page):
            below = ImageFileDirectory_v2(header)
            for offset in _values(page, Tag.SubIFDs)[:_MAX_SUB_IFDS]:
                file.seek(offset)
                below.load(file)
                _check_camera(below)
            _check_camera(page)
            _check_pixels(page)


def _values(page: ImageFileDirectory_v2, tag: int, default: Any = ()) -> Any:
    """Return a tag's values as a tuple."""
    value = page.get(tag, default)
    return value if isinstance(value, tuple) else (value,)


def _check_camera(page: ImageFileDirectory_v2) -> None:
    """Reject a camera RAW file, whose first page is a small preview rendered by the camera."""
    if Tag.DNGVersion in page or _values(page, Tag.PhotometricInterpretation) in _CAMERA_COLORS:
        raise unsupported("a camera RAW (DNG, or a TIFF such as NEF, ARW or PEF)")


def _check_pixels(page: ImageFileDirectory_v2) -> None:
    """Reject sample formats and layouts that Pillow does not read exactly."""
    if page.get(Tag.NewSubfileType, 0) & 1:
        raise unsupported("a TIFF whose first page is a small copy of another")
    (compression,) = _values(page, Tag.Compression, 1)
    if compression not in _COMPRESSIONS:
        name = COMPRESSION_INFO.get(compression, "unknown")
        raise unsupported(f"a TIFF with {name} compression ({compression})")
    photometric: Any = page.get(Tag.PhotometricInterpretation)
    colors = _COLORS.get(photometric, f"unknown colors ({photometric})")
    bits, numbers = _values(page, Tag.BitsPerSample, 1), _values(page, Tag.SampleFormat, 1)
    if len({*bits}) > 1 or len({*numbers}) > 1:
        raise unsupported(f"a TIFF of {colors} with samples of different kinds")
    size, number = bits[0], numbers[0]
    (samples,), extra = _values(page, Tag.SamplesPerPixel, 1), _values(page, Tag.ExtraSamples)
    kind = f"a TIFF of {_NUMBERS.get(number, 'undefined ')}{size}-bit {colors}"
    if number != 1 or (photometric, size) not in _SUPPORTED:
        raise unsupported(kind)
    channels = _CHANNELS.get(photometric, 1) + len(extra)
    in_planes = page.get(Tag.PlanarConfiguration, 1) != 1
    reversed_bits = page.get(Tag.FillOrder, 1) != 1
    for unread, why in (
        (extra not in _SUPPORTED[photometric, size], f"with extra samples {extra}"),
        (samples != channels, f"with {samples} samples a pixel instead of {channels}"),
        (page.get(Tag.InkSet, 1) != 1, "with inks other than CMYK"),
        (in_planes and photometric == _GRAY and any(extra), "with its transparency in a plane"),
        (reversed_bits and (samples > 1 or size > 8), "with its bits in reverse order"),
        (photometric == _YCBCR and compression != _JPEG, "without JPEG compression"),
        (
            photometric == _PALETTE and max(page[Tag.ColorMap]) < _SIXTEEN_BITS,
            "whose palette has 8 bits instead of 16",
        ),
    ):
        if unread:
            raise unsupported(f"{kind} {why}")
