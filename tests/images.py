"""Images for the tests, real and generated; none is downloaded."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.known import PHOTOGRAPHS
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.decoding.pillow import DecodedImage
from handler.settings import Preprocessing

PREPROCESSING = Preprocessing()
MAX_PIXELS = 64_000_000

# Sides for each case of rounding in resizing and cropping; the largest image is 2000 x 1500.
_SIDES = (1, 2, 3, 7, 33, 100, 223, 224, 225, 254, 255, 256, 300, 511, 640, 1500, 2000)


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Yield real photographs, RGB and grayscale: whole, rotated, halved and cropped."""
    for path in PHOTOGRAPHS:
        with Image.open(path) as image:
            image.load()
        rgb = image.convert("RGB")
        yield f"{path.stem}", image
        yield f"{path.stem} turned", rgb.transpose(Image.Transpose.ROTATE_90)
        yield f"{path.stem} halved", rgb.resize((rgb.width // 2, rgb.height // 2))
        yield f"{path.stem} corner", rgb.crop((0, 0, rgb.width // 3, rgb.height // 2))


def generated() -> Iterator[tuple[str, Image.Image]]:
    """Yield noise of sizes from 1x1 to 2000x1500, portrait and landscape."""
    random = np.random.default_rng(7)
    for i, width in enumerate(_SIDES):
        for j, height in enumerate(_SIDES):
            if width * height > 2000 * 1500:
                continue
            # The tutorial would resize a 1x2000 image to 390 MB, so only one of that kind.
            if max(width, height) > 300 * min(width, height) and (width, height) != (1, 511):
                continue
            noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mode = ("RGB", "L", "P")[(i + j) % 3]
            yield f"{mode} {width}x{height}", Image.fromarray(noise).convert(mode)


# Sizes of phones and cameras, and sides that are no multiples of 8.
_LARGE = ((4000, 3000), (2600, 3601), (2551, 2553))


def large_jpegs() -> Iterator[bytes]:
    """Yield each photograph as a JPEG of 6 to 12 megapixels with a camera's noise."""
    random = np.random.default_rng(5)
    for number, path in enumerate(PHOTOGRAPHS):
        width, height = _LARGE[number % len(_LARGE)]
        with Image.open(path) as image:
            large = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        noise = random.normal(0, 4, (height, width, 1)).astype(np.float32)
        noisy = Image.fromarray((np.asarray(large) + noise).clip(0, 255).astype(np.uint8))
        yield encode(noisy, "JPEG", quality=88)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Return the bytes of the image's file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decoded(
    data: bytes | bytearray, preprocessing: Preprocessing = PREPROCESSING, **options: Any
) -> DecodedImage:
    """Decode one image with the default limits of a request."""
    return decode(data, preprocessing, PixelBudget(MAX_PIXELS), **options)
