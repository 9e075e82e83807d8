"""Decode one image with Pillow, in the worker or in the decoder process."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from handler.decoding import tiff
from handler.decoding.budget import PixelBudget
from handler.decoding.formats import min_bytes
from handler.decoding.headers import unsupported
from handler.decoding.rgb import orientation, upright
from handler.decoding.transform import Box, crop_box, is_large, reduced_crop, resize_and_crop
from handler.errors import ClientError, DamagedImage, TooLarge
from handler.settings import DECODING_BYTES, Preprocessing

# Orientations (Exif 2.3, 4.6.4) that swap width and height.
_SWAPS_SIDES = {5, 6, 7, 8}

# Pillow's names of the libraries that the formats need.
_LIBRARIES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "TIFF": "libtiff", "AVIF": "avif"}

# One model input: uint8 (3, crop, crop), 0 to 255, red, green, blue.
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image.

    Attributes:
        pixels: uint8 (3, crop, crop), the model's input.
        size: width and height of the whole upright image, in pixels.
        crop: left, top, right and bottom of the model's input, in pixels of the whole image.
        preview: the whole upright image, RGB, with no side longer than `Task.preview_side`; None if
            that is None.
    """

    pixels: Pixels
    size: tuple[int, int]
    crop: Box
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Task:
    """The parameters for decoding one image; see `decode.decode` and `headers.Header`.

    Attributes:
        size: width and height in the parsed header, which the decoder must confirm, or None.
        max_pixels: limit of width times height if `size` is None.
    """

    preprocessing: Preprocessing
    reduced: bool
    fast_resize: bool = False
    preview_side: int | None = None
    names: Sequence[str] = ()
    orientation: int | None = None
    size: Sequence[int] | None = None
    max_pixels: int = 0


def decode_here(data: bytes, task: Task) -> DecodedImage:
    """Decode a file, turn it upright, resize and crop it."""
    preprocessing = task.preprocessing
    with _opened(data, task) as image:
        whole = None
        if task.reduced and image.format == "JPEG" and is_large(image.size, preprocessing):
            exif = orientation(image) if task.orientation is None else task.orientation
            size = image.size[::-1] if exif in _SWAPS_SIDES else image.size
            cropped = reduced_crop(image, data, preprocessing, exif, fast=task.fast_resize)
            if task.preview_side is not None:
                whole = upright(image, data, exif)
        else:
            whole = upright(image, data, task.orientation)
            size = whole.size
            cropped = resize_and_crop(whole, preprocessing, fast=task.fast_resize)
        preview = None
        if task.preview_side is not None and whole is not None:
            scale = min(1.0, task.preview_side / max(whole.size))
            sides = [max(1, round(side * scale)) for side in whole.size]
            preview = whole.resize(sides, Image.Resampling.BILINEAR)
        pixels = np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))
        return DecodedImage(pixels, size, crop_box(size, preprocessing), preview)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings, such as those about unusual metadata.

    Warning filters are global to the process: if threads use this context, another one must enclose
    all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(data: bytes, task: Task) -> Iterator[Image.Image]:
    """Open an image whose header is within the limits; turn decoding errors into `ClientError`."""
    _check_decoders(tuple(task.names))
    what, size = "image", None
    try:
        if "TIFF" in task.names:
            tiff.check(data)
        with Image.open(io.BytesIO(data), formats=tuple(task.names)) as image:
            what, size = f"{image.format} image", image.size
            # Pillow decodes a JPEG in blocks, which fails with arithmetic coding.
            image.decodermaxblock = max(len(data), image.decodermaxblock)
            _check_size(image, task)
            yield image
    except ClientError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge("The image has more pixels than this server accepts.") from error
    except MemoryError as error:
        raise _too_much_memory(size) from error
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes
        if "memory" in str(error):  # some decoders report a failed allocation only in the text
            raise _too_much_memory(size) from MemoryError()
        if "BMP" in task.names and type(error) is OSError and size is None and any(data[14:18]):
            raise unsupported(f"a BMP of an unusual kind ({error})") from error
        raise DamagedImage(f"The {what} is damaged or cut off and cannot be decoded.") from error


@cache
def _check_decoders(names: tuple[str, ...]) -> None:
    """Raise `RuntimeError` if Pillow lacks a decoder, which is not the client's error."""
    Image.preinit()
    for name in names:
        if name not in Image.OPEN:
            Image.init()
        if name not in Image.OPEN or not features.check(_LIBRARIES.get(name, "pil")):
            raise RuntimeError(f"The decoder of {name} is missing in Pillow or its plugins.")


def _check_size(image: Image.Image, task: Task) -> None:
    if task.size is None:
        PixelBudget(task.max_pixels).take(*image.size)
    elif image.size != tuple(task.size):
        raise DamagedImage("The image is damaged: its header gives two sizes.")
    check_memory(image.format, image.size)


def check_memory(name: str | None, size: tuple[int, int], fixed: int = 0) -> None:
    """Raise `TooLarge` if decoding takes more than `DECODING_BYTES`; `name` is Pillow's format."""
    if min_bytes(name, size) + fixed > DECODING_BYTES:
        raise _too_much_memory(size)


def _too_much_memory(size: tuple[int, int] | None) -> TooLarge:
    pixels = f" ({size[0]} x {size[1]} pixels)" if size else ""
    return TooLarge(
        f"The image{pixels} needs more than {DECODING_BYTES // 1_000_000} MB of memory to decode. "
        "Send a smaller copy, or save it as a JPEG."
    )
