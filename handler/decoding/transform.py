"""Resize a decoded image and crop its center square, with the results of torchvision and timm."""

import math
from functools import partial

from PIL import Image
from PIL import __version__ as pillow_version

from handler.decoding.rgb import apply_orientation, to_rgb
from handler.settings import Preprocessing

try:
    import cykooz_resizer as simd  # optional: not built for every platform
except ImportError:
    simd = None

# The package reads Pillow's in-memory images, whose layout may change with a major version.
_TESTED_PILLOW = "13."

# Left, upper, right and lower edge, in pixels.
Box = tuple[float, float, float, float]

# If the resized image would have more pixels than this, only the crop is computed.
MAX_RESIZED_PIXELS = 4_000_000

# A JPEG decoded at a fraction of its size keeps at least this many times the needed size. The
# largest difference from the exact result was 3 levels of 255 with 5, 4 with 4, and 8 with 2.
_REDUCED_SIZE = 5

# Orientations (Exif 2.3, 4.6.4) for which the file's columns or rows are mirrored.
_MIRRORS_X = {2, 3, 7, 8}
_MIRRORS_Y = {3, 4, 6, 7}


def is_large(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Return whether a JPEG of this size is decoded at a fraction of it."""
    return (
        min(size) >= 2 * _REDUCED_SIZE * preprocessing.resize
        # The difference was measured only for these.
        and preprocessing.interpolation == "bilinear"
        and preprocessing.fit == "crop"
    )


def reduced_crop(
    image: Image.Image,
    data: bytes,
    preprocessing: Preprocessing,
    exif_orientation: int,
    *,
    fast: bool = False,
) -> Image.Image:
    """Decode a large JPEG at a fraction of its size; return the RGB crop, turned upright."""
    width, height = image.size
    # The crop's rounding is not symmetric, so its box is mirrored like the image.
    left, top, right, bottom = crop_box(image.size, preprocessing)
    if exif_orientation in _MIRRORS_X:
        left, right = width - right, width - left
    if exif_orientation in _MIRRORS_Y:
        top, bottom = height - bottom, height - top

    enough = _REDUCED_SIZE * preprocessing.resize
    draft = image.draft(None, (enough, enough))
    # The reduced image's sides are rounded up; the exact fraction keeps the crop in its place.
    fraction = draft[1][2] / width if draft is not None else 1.0
    small = resize(
        to_rgb(image, data),
        (preprocessing.crop, preprocessing.crop),
        interpolation=preprocessing.interpolation,
        box=(left * fraction, top * fraction, right * fraction, bottom * fraction),
        fast=fast,
    )
    return apply_orientation(small, exif_orientation)


def resize_and_crop(
    image: Image.Image, preprocessing: Preprocessing, *, fast: bool = False
) -> Image.Image:
    """Resize an image and crop its center square as torchvision does, or pad it as timm does.

    Source of the arithmetic: `_compute_resized_output_size` and `center_crop` in
    torchvision/transforms/functional.py, `ResizeKeepRatio` and `center_crop_or_pad` in
    timm/data/transforms.py.

    Returns:
        an RGB image of (crop, crop), equal to torchvision's unless SIMD resized it. Exception: if
        torchvision's resized image would have more than 4 million pixels, only the crop is
        computed, to limit the cost of long images, and Pillow's 32-bit box coordinates change a
        pixel by at most 2 levels of 255.
    """
    crop = preprocessing.crop
    resized = partial(resize, image, interpolation=preprocessing.interpolation, fast=fast)
    (width, height), (left, top) = resized_size(image.size, preprocessing)
    if preprocessing.fit == "pad":
        mean = preprocessing.mean
        rgb = mean[::-1] if preprocessing.channels == "bgr" else mean
        color = tuple(min(255, max(0, round(255 * value))) for value in rgb)
        square = Image.new("RGB", (crop, crop), color)
        square.paste(resized((width, height)), (-left, -top))
        return square
    only_crop = fast and can_resize_fast(preprocessing.interpolation)
    if width * height <= MAX_RESIZED_PIXELS and not only_crop:
        return resized((width, height)).crop((left, top, left + crop, top + crop))
    return resized((crop, crop), box=crop_box(image.size, preprocessing))


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Return left, top, right and bottom of the center square, in pixels of an image of this size.

    They are outside of the image if it is padded.
    """
    crop = preprocessing.crop
    (width, height), (left, top) = resized_size(size, preprocessing)
    x_scale, y_scale = size[0] / width, size[1] / height
    return left * x_scale, top * y_scale, (left + crop) * x_scale, (top + crop) * y_scale


def resized_size(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the width and height after resizing, and the left and top of the center square."""
    short, crop = preprocessing.resize, preprocessing.crop
    if preprocessing.fit == "squash":
        width = height = short
    elif preprocessing.fit == "pad":
        ratio = max(size) / short
        width, height = (max(1, round(side / ratio)) for side in size)
        # Half a pixel of a border is rounded down, of a crop as in torchvision.
        left, top = (
            round((side - crop) / 2) if side >= crop else -((crop - side) // 2)
            for side in (width, height)
        )
        return (width, height), (left, top)
    elif size[0] <= size[1]:
        width, height = short, int(short * size[1] / size[0])
    else:
        width, height = int(short * size[0] / size[1]), short
    rounded = math.floor if preprocessing.crop_rounding == "down" else round
    return (width, height), (rounded((width - crop) / 2.0), rounded((height - crop) / 2.0))


def can_resize_fast(interpolation: str) -> bool:
    """Return whether the SIMD package can be used: it is installed and fits Pillow's version.

    Only for bilinear; bicubic results differed from Pillow's by up to 6 levels.
    """
    return (
        interpolation == "bilinear"
        and simd is not None
        and pillow_version.startswith(_TESTED_PILLOW)
    )


def resize(
    image: Image.Image,
    size: tuple[int, int],
    *,
    interpolation: str,
    box: Box | None = None,
    fast: bool = False,
) -> Image.Image:
    """Return an RGB image, or the part of it in `box`, resized to `size`.

    If `fast`, a SIMD package that is seven times as fast as Pillow is used if it can be. It rounds
    differently: a tenth of the pixels differ from Pillow's by one level of 255, very few by two.
    With float32 this would change probabilities by up to 0.016, so it is used only with reduced
    precision, whose own rounding error is as large.
    """
    if not (fast and can_resize_fast(interpolation)):
        return image.resize(size, Image.Resampling[interpolation.upper()], box=box)
    left, top, right, bottom = box or (0, 0, *image.size)
    # Rounding can put an edge a trillionth of a pixel outside, which the package rejects.
    left, top = max(0.0, left), max(0.0, top)
    options = simd.ResizeOptions(
        simd.ResizeAlg.convolution(simd.FilterType.bilinear),
        crop_box=simd.CropBox(
            left, top, min(right, image.width) - left, min(bottom, image.height) - top
        ),
    )
    result = Image.new("RGB", size)
    simd.Resizer().resize_pil(image, result, options)
    return result
