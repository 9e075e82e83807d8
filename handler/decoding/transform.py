"""Resize a decoded image and crop its center square, with the results of torchvision and timm."""

import math
from functools import partial

from PIL import Image

from handler.decoding.resize import Box, can_resize_fast, resize
from handler.decoding.rgb import apply_orientation, to_rgb
from handler.settings import Preprocessing

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
    """Decode a large JPEG at a fraction of its size; return an RGB image of (crop, crop).

    Only the pixels of the crop are resized, and only the crop is turned upright.
    """
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

    Args:
        image: an RGB image of any size.
        preprocessing: the sizes.
        fast: resize with SIMD; see `handler.decoding.resize`.

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
