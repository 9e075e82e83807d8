"""From an opened picture to what a person sees: upright, RGB, 8 bits per channel.

The pixels are those that the file states: 16 bits become the higher 8 of them, transparency is laid
on white, colour profiles and gamma are left aside, as the tutorial's transform leaves them. What
`handler.formats` let pass is read exactly; anything else that Pillow opens is refused here.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from handler import tiff
from handler.bmp import bits_per_pixel
from handler.errors import UnsupportedFormat

# Pillow's own reading of uncompressed TIFFs gives wrong pixels where planes have 16 bits, where
# bits are reversed or colours subsampled; libtiff, which reads the others anyway, does not.
TiffImagePlugin.READ_LIBTIFF = True

# From the EXIF tag "Orientation" (Exif 2.3, 4.6.4) to what makes the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's modes of 8 bits or fewer, without transparency, that it turns into RGB rightly.
_OPAQUE_MODES = {"1", "L", "P", "CMYK", "YCbCr", "LAB"}
_TRANSPARENT_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}

_WHITE = (255, 255, 255)

# Conversions that need copies go through the picture in bands of about so many pixels.
_BAND_PIXELS = 500_000


def upright(image: Image.Image, data: bytes | bytearray) -> Image.Image:
    """The picture as a person sees it.

    Args:
        image: as Pillow opened it; it is decoded here.
        data: the bytes that it was opened from, which `survey` let pass.

    Returns:
        an RGB picture with nothing but pixels: what goes on from here carries no profile, text or
        other metadata into an answer, whose size these would decide.

    Raises:
        UnsupportedFormat: it is not exactly known how to read its pixels.
    """
    flat = to_rgb(image, data)
    # After the decoding: a PNG's orientation may stand behind its pixels, and Pillow turns TIFFs.
    result = turned(flat, orientation(image))
    # Nor is the picture converted to sRGB for a person's eyes: an explanation shows what the model
    # saw, and a stranger's profile is one thing less to parse.
    result.info = {}
    return result


def turned(image: Image.Image, exif_orientation: int) -> Image.Image:
    """Made upright."""
    turn = _TURNS.get(exif_orientation)
    return image.transpose(turn) if turn is not None else image


def orientation(image: Image.Image) -> int:
    """How the camera was held; 1, upright, where the picture does not say or says nonsense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a picture with damaged metadata is still a picture
        return 1
    return value if isinstance(value, int) else 1


def to_rgb(image: Image.Image, data: bytes | bytearray) -> Image.Image:
    """8 bits per channel, three channels, transparency on white; not turned.

    Args:
        image: as Pillow opened it; it is decoded here.
        data: as in `upright`.

    Returns:
        an RGB picture, which is `image` itself where that is one.

    Raises:
        UnsupportedFormat: it is not exactly known how to read its pixels.
    """
    if image.format == "BMP":
        return _bmp_to_rgb(image, data)
    image.load()
    if image.format == "TIFF":
        return _tiff_to_rgb(image, data)
    if image.format == "PNG":
        return _png_to_rgb(image, data)
    if image.format == "HEIF" and image.mode == "I;16":
        # Grey of 10 or 12 bits, which its decoder moves up to 16.
        return _in_bands(image, lambda band: _high_bytes(band, None))
    return _plain_to_rgb(image)


def _plain_to_rgb(image: Image.Image) -> Image.Image:
    """Of what Pillow's mode and transparency say all."""
    if image.mode in _TRANSPARENT_MODES or (
        image.mode in {*_OPAQUE_MODES, "RGB"} and image.has_transparency_data
    ):
        return _in_bands(image, _on_white)
    if image.mode == "RGB":
        return image
    if image.mode not in _OPAQUE_MODES:
        raise UnsupportedFormat(
            f"The {image.format} image has pixels of the kind {image.mode}, which this server does "
            "not read. Save it as a JPEG, or as a PNG with 8 bits a channel."
        )
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    # Colours that were multiplied by their transparency are divided by it first.
    straight = image.convert("LA") if image.mode == "La" else image
    layer = straight if straight.mode == "RGBA" else straight.convert("RGBA")
    flat = Image.new("RGB", image.size, _WHITE)
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB by `convert` of a few rows at a time, so that its copies stay small."""
    result = Image.new("RGB", image.size)
    for box in _bands(image):
        result.paste(convert(image.crop(box)), box)
    return result


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


# --- TIFF ---


def _tiff_to_rgb(image: Image.Image, data: bytes | bytearray) -> Image.Image:
    kind = tiff.pixel_format(data)
    if image.mode.startswith("I;16"):
        shift = kind.bits - 8
        inverted = 255 if kind.photometric == tiff.WHITE_IS_ZERO else 0

        def to_8_bits(band: Image.Image) -> Image.Image:
            return Image.fromarray((np.asarray(band) >> shift).astype(np.uint8) ^ inverted)

        return _in_bands(image, to_8_bits)
    if kind.undeclared_alpha and image.getchannel("A").getextrema() != (255, 255):
        raise UnsupportedFormat(
            "The TIFF has a fourth channel and does not say whether that is transparency. "
            "Save it as a PNG, or without that channel."
        )
    return _plain_to_rgb(image)


# --- PNG ---


def _png_to_rgb(image: Image.Image, data: bytes | bytearray) -> Image.Image:
    """Pillow compares a clear colour, given in the file's bits, with pixels that it has scaled."""
    bits, clear = data[24], image.info.get("transparency")
    if image.mode == "I;16":
        return _in_bands(image, lambda band: _high_bytes(band, clear))
    if image.mode == "RGB" and bits == 16 and clear is not None:  # noqa: PLR2004
        return _clear_16_bits(image, data, clear)
    if image.mode == "L" and clear is not None:
        most = 2**bits - 1
        image.info["transparency"] = (clear & most) * 255 // most
    return _plain_to_rgb(image)


def _high_bytes(band: Image.Image, clear: int | None) -> Image.Image:
    """From 16 bits to the higher 8, the clear one white."""
    levels = np.asarray(band)
    grey: NDArray[np.uint8] = (levels >> 8).astype(np.uint8)
    if clear is not None:
        grey[levels == clear] = 255
    return Image.fromarray(grey)


def _clear_16_bits(
    image: Image.Image, data: bytes | bytearray, clear: tuple[int, int, int]
) -> Image.Image:
    """Two colours may differ in their lower bytes only, which Pillow reads instead of the higher
    ones when it is told that the numbers are little-endian.
    """
    high, low = (
        sum((level >> shift & 255) << 8 * i for i, level in enumerate(clear)) for shift in (8, 0)
    )
    with Image.open(io.BytesIO(data), formats=("PNG",)) as lower:
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        lower.load()
        for box in _bands(image):
            is_clear = (_as_numbers(image.crop(box)) == high) & (
                _as_numbers(lower.crop(box)) == low
            )
            image.paste(_WHITE, box, Image.fromarray(is_clear))
    del image.info["transparency"]
    return image


def _as_numbers(band: Image.Image) -> NDArray[np.uint32]:
    """Each pixel as one number, red in its lowest byte."""
    numbers: NDArray[np.uint32] = np.frombuffer(band.tobytes("raw", "RGBX"), "<u4") & np.uint32(
        0xFFFFFF
    )
    return numbers.reshape(band.height, band.width)


# --- BMP ---


def _bmp_to_rgb(image: Image.Image, data: bytes | bytearray) -> Image.Image:
    """Where a palette is black and white, or a ramp of greys, Pillow reads pixels of 4 or 8 bits as
    if they had 1 or 8.
    """
    bits = bits_per_pixel(data)
    own_bits = {"1": 1, "L": 8}.get(image.mode, bits)
    assert isinstance(image, ImageFile.ImageFile)
    (tile,) = image.tile
    if bits == own_bits or (tile.codec_name == "bmp_rle" and image.mode == "L"):
        image.load()
        return _plain_to_rgb(image)
    if tile.codec_name == "bmp_rle":
        raise UnsupportedFormat(
            "The BMP is run-length encoded and black and white, which this server does not read. "
            "Save it as a PNG."
        )
    assert isinstance(tile.args, tuple)
    _, stride, direction = tile.args
    raw_mode = "P" if bits == 8 else f"P;{bits}"  # noqa: PLR2004
    pixels = memoryview(data)[tile.offset :]
    indices = Image.frombytes("P", image.size, pixels, "raw", raw_mode, stride, direction)
    levels = np.array([0, 255] if image.mode == "1" else range(256), np.uint8)
    indices.putpalette(levels.repeat(3).tobytes())
    return indices.convert("RGB")
