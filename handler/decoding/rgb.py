"""Convert an opened image to upright RGB with 8 bits per channel.

16-bit samples are reduced to their higher 8 bits, and transparent images are put on white. Color
profiles and gamma are ignored, as in the tutorial's transform. Pixels that Pillow cannot read
exactly are rejected.
"""

import struct
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImagePalette

from handler.decoding.headers import UPRIGHT, unsupported

# Exif orientation (Exif 2.3, 4.6.4) to the transposition that makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Modes of at most 8 bits that Pillow converts to RGB exactly.
_OPAQUE_MODES = {"1", "L", "P", "CMYK", "YCbCr", "RGB"}
_TRANSPARENT_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}

_WHITE = (255, 255, 255)

# Conversions that need copies process the image in bands of about this many pixels.
_BAND_PIXELS = 500_000


def upright(
    image: Image.Image, data: bytes | bytearray, exif_orientation: int | None
) -> Image.Image:
    """Decode an image that Pillow opened from `data` and turn it upright; see `to_rgb`.

    The orientation is read from the image if it is None. The result has no profile and no text,
    which `save` would add to a response.
    """
    flat = to_rgb(image, data)
    # After decoding: a PNG's orientation may follow its pixels, and Pillow itself rotates TIFFs.
    result = apply_orientation(
        flat, orientation(image) if exif_orientation is None else exif_orientation
    )
    result.info = {}
    return result


def apply_orientation(image: Image.Image, exif_orientation: int) -> Image.Image:
    """Return the image turned upright."""
    turn = _TURNS.get(exif_orientation)
    return image.transpose(turn) if turn is not None else image


def orientation(image: Image.Image) -> int:
    """Return the Exif orientation; 1, upright, if there is none or it is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # damaged metadata; the pixels may be intact
        return UPRIGHT
    return value if isinstance(value, int) else UPRIGHT


def to_rgb(image: Image.Image, data: bytes | bytearray) -> Image.Image:
    """Decode to RGB with 8 bits per channel, transparency on white, without rotating.

    Returns:
        an RGB image, which may be `image` itself.

    Raises:
        UnsupportedFormat: its pixels cannot be read exactly.
    """
    if image.format == "BMP":
        _keep_bmp_palette(image, data)
    image.load()
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        return _in_bands(image, lambda band: _high_bytes(band, clear))
    if image.format == "PNG" and clear is not None:
        bits = data[24]
        if image.mode == "RGB" and bits > 8:
            # Pillow would compare only the higher bytes with it.
            raise unsupported("a PNG of 16-bit RGB with a transparent color")
        if image.mode == "L":
            # Pillow compares the file's unscaled level with scaled pixels.
            image.info["transparency"] = (clear & 2**bits - 1) * 255 // (2**bits - 1)
    if image.mode in _TRANSPARENT_MODES or (
        image.mode in _OPAQUE_MODES and image.has_transparency_data
    ):
        return _in_bands(image, _on_white)
    if image.mode not in _OPAQUE_MODES:
        raise unsupported(f"a {image.format} with pixels of the kind {image.mode}")
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    # Undo premultiplied alpha.
    straight = image.convert("LA") if image.mode == "La" else image
    layer = straight if straight.mode == "RGBA" else straight.convert("RGBA")
    flat = Image.new("RGB", image.size, _WHITE)
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def _high_bytes(band: Image.Image, clear: int | None) -> Image.Image:
    """Return the higher 8 of 16 bits; pixels of the level `clear`, 16 bits, become white."""
    levels = np.asarray(band)
    gray = (levels >> 8).astype(np.uint8)
    if clear is not None:
        gray[levels == clear] = 255
    return Image.fromarray(gray)


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a few rows at a time to limit the memory of copies; return an RGB image."""
    result = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = 0, top, image.width, min(top + rows, image.height)
        result.paste(convert(image.crop(box)), box)
    return result


_OLDEST_BMP_HEADER = 12
# Bits per pixel that Pillow assumes if a BMP's palette contains only grays.
_GRAY_BITS = {"1": 1, "L": 8}


def _keep_bmp_palette(image: Image.Image, data: bytes | bytearray) -> None:
    """Make Pillow read indices into a gray palette with their actual number of bits.

    Without this it would read pixels of 4 or 8 bits as if they had 1 or 8.
    """
    assert isinstance(image, ImageFile.ImageFile)
    (header_size,) = struct.unpack_from("<I", data, 14)
    (bits,) = struct.unpack_from("<H", data, 24 if header_size == _OLDEST_BMP_HEADER else 28)
    if bits != _GRAY_BITS.get(image.mode, bits):
        levels = np.array([0, 255] if image.mode == "1" else range(256), np.uint8)
        (tile,) = image.tile
        assert isinstance(tile.args, tuple)
        raw_mode = "P" if bits == 8 else f"P;{bits}"
        image.tile = [tile._replace(args=(raw_mode, *tile.args[1:]))]
        image._mode = "P"
        image.palette = ImagePalette.raw("RGB", levels.repeat(3).tobytes())
