"""The images of the benchmarks, made from a photograph and noise."""

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import requests
from PIL import Image

from benchmarks.load import Body
from scripts.samples import CAT

SMALL, LARGE = 0.5, 12.0  # megapixels


def encode(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of the image's file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """Return a real photograph of this size."""
    with Image.open(CAT.parent / "astronaut.jpg") as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def noisy(image: Image.Image) -> Image.Image:
    """Add a camera's noise, which makes the file as large as a camera's."""
    noise = np.random.default_rng(0).normal(0, 4, (image.height, image.width, 1))
    pixels = np.asarray(image) + noise.astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(megapixels: float, **options: Any) -> bytes:
    """Return a JPEG of a photograph, 4 to 3, with a camera's noise."""
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(megapixels * 1e6 / width)
    return encode(noisy(photograph(width, height)), quality=80, **options)


def form(count: int) -> Body:
    """Return a form of images of half a megapixel."""
    one = jpeg(SMALL)
    files = {f"image{i}": (f"{i}.jpg", one, "image/jpeg") for i in range(count)}
    return form_body(files)


def form_body(files: dict[str, tuple[str, bytes, str]]) -> Body:
    """Return a form of files: by field, the file name, content and content type."""
    request = requests.Request("POST", "http://localhost", files=files).prepare()
    assert isinstance(request.body, bytes)
    return Body(request.body, request.headers["Content-Type"])


# Images for measuring decoding, by name.
KINDS: dict[str, Callable[[], bytes]] = {
    "JPEG, 720x720": lambda: encode(photograph(720, 720), quality=90),
    "JPEG, 12 megapixels": lambda: jpeg(LARGE),
    "progressive JPEG, 12 megapixels": lambda: jpeg(LARGE, progressive=True),
    "PNG, 720x720": lambda: encode(photograph(720, 720), "PNG"),
    "WebP, 720x720": lambda: encode(photograph(720, 720), "WEBP"),
    "lossless WebP, 720x720 (decoder process)": lambda: encode(
        photograph(720, 720), "WEBP", lossless=True
    ),
}


def noise(side: int) -> Image.Image:
    """Return an incompressible image."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8))


def costly() -> Iterator[bytes]:
    """Yield five images that need the most memory to decode."""
    yield encode(noise(2520), "PNG", compress_level=0)
    yield encode(Image.new("RGBA", (5000, 5000)), "PNG")
    yield encode(Image.new("RGBA", (3000, 3000), (1, 2, 3, 100)), "WEBP", lossless=True, method=0)
    yield encode(noise(1400), "AVIF", speed=10, quality=100)
    yield _bmp_of_runs(2800)


def _bmp_of_runs(side: int) -> bytes:
    """Return a run-length encoded BMP, each run of one pixel."""
    pixels = (b"\1\1" * side + b"\0\0") * side
    image = Image.new("P", (side, side))
    image.putpalette(bytes(768))
    plain = encode(image, "BMP")
    (offset,) = struct.unpack_from("<I", plain, 10)
    head = bytearray(plain[:offset])
    struct.pack_into("<I", head, 2, offset + len(pixels))
    struct.pack_into("<II", head, 30, 1, len(pixels))  # compression: runs of 8 bits
    return bytes(head) + pixels
