"""Resize a decoded image and cut out the center square, equal to torchvision's and timm's."""

import math
from functools import partial

from PIL import Image

from handler.decoding.resize import Box, can_resize_fast, resize
from handler.decoding.rgb import apply_orientation, to_rgb
from handler.settings import Preprocessing

# Above this many pixels the tutorial's whole resized image is not made, only the crop is.
MAX_RESIZED_PIXELS = 4_000_000

# How many times the needed size a JPEG keeps when it is decoded at a fraction of its size. With 5
# no pixel was further from the exact result than 3 levels of 255; with 4 it was 4, with 2 up to 8.
_REDUCED_SIZE = 5

# Orientations (Exif 2.3, 4.6.4) that mirror the file's columns or rows to make the image upright.
_MIRRORS_X = {2, 3, 7, 8}
_MIRRORS_Y = {3, 4, 6, 7}


def is_large(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Return whether a JPEG of this size is decoded at a fraction of it."""
    return (
        min(size) >= 2 * _REDUCED_SIZE * preprocessing.resize
        # The only ones for which the difference was measured.
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
    """Decode a large JPEG at a fraction of its size; return (crop, crop), RGB.

    Only what the crop needs is resized, and only the crop is turned upright.
    """
    width, height = image.size
    # The crop's rounding is not symmetric, so it is mirrored as the image will be.
    left, top, right, bottom = crop_box(image.size, preprocessing)
    if exif_orientation in _MIRRORS_X:
        left, right = width - right, width - left
    if exif_orientation in _MIRRORS_Y:
        top, bottom = height - bottom, height - top

    enough = _REDUCED_SIZE * preprocessing.resize
    draft = image.draft(None, (enough, enough))
    # The copy's sides are rounded up; the exact fraction keeps the crop in its place.
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
    """Resize an image and cut out the center square, as torchvision does, or as timm pads.

    Source of the arithmetic: `_compute_resized_output_size` and `center_crop` in
    torchvision/transforms/functional.py, `ResizeKeepRatio` and `center_crop_or_pad` in
    timm/data/transforms.py.

    Args:
        image: an RGB image of any size.
        preprocessing: the sizes.
        fast: resize by SIMD; see `handler.decoding.resize`.

    Returns:
        an RGB image of (crop, crop). Unless resized the fast way it is equal to torchvision's,
        except for images so long that torchvision would make more than 4 million pixels of them:
        there only the crop is computed, so that they cost no more than others, and Pillow's 32-bit
        box coordinates move a pixel by at most 2 levels of 255.
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

    If the image is padded they are outside of it.
    """
    crop = preprocessing.crop
    (width, height), (left, top) = resized_size(size, preprocessing)
    x_scale, y_scale = size[0] / width, size[1] / height
    return left * x_scale, top * y_scale, (left + crop) * x_scale, (top + crop) * y_scale


def resized_size(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return width and height after resizing, and left and top of the center square in that."""
    short, crop = preprocessing.resize, preprocessing.crop
    if preprocessing.fit == "squash":
        width = height = short
    elif preprocessing.fit == "pad":
        ratio = max(size) / short
        width, height = (max(1, round(side / ratio)) for side in size)
        # Rounds half a pixel of a border down, half a pixel of a crop as torchvision does.
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
