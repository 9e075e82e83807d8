"""Decode encoded images to the model's input: uint8 (3, crop, crop), red, green, blue.

For an upright 8-bit RGB image, the result equals torchvision's transforms bit for bit, such as the
tutorial's `Resize(255)` (bilinear, antialiased, on the 8-bit image) and `CenterCrop(224)`, or
timm's if the whole image is squashed or padded to a square. Other images are first turned upright,
put on a white background if they are transparent, and converted to 8-bit RGB. The model scales to
0..1 and normalizes, so that a batch stays uint8, a quarter of its size in float32.

A JPEG of ten or more times the needed size is decoded at a half, quarter or eighth of its size,
which takes half the time; the difference is at most 3 levels of 255, with a PSNR above 50 dB. The
setting `reduced_decoding` turns this off. With reduced precision, SIMD code resizes the image,
within 2 levels of 255.

Images are untrusted input. Ordinary JPEGs, PNGs and WebPs of limited size are decoded in the worker
(`handler.decoding.formats` decides), all others in a process whose time and memory the kernel
limits (`handler.decoding.isolated`).
"""

import atexit
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace

import numpy as np
from PIL import Image

from handler import errors
from handler.decoding.budget import MemoryBudget, PixelBudget
from handler.decoding.formats import probe
from handler.decoding.headers import Header
from handler.decoding.isolated import RESTART_SECONDS, DecoderExitedError, DecoderProcess
from handler.decoding.pillow import (
    DecodedImage,
    Task,
    check_memory,
    decode_here,
    without_warnings,
)
from handler.decoding.transform import MAX_RESIZED_PIXELS, is_large, resized_size
from handler.errors import DamagedImage, EmptyImage, TooLarge
from handler.settings import DECODING_BYTES, Preprocessing

# A simple image that takes more memory than this is decoded in the decoder process.
_MAX_SIMPLE_BYTES = 80_000_000

_memory_budget = MemoryBudget(DECODING_BYTES)
_decoder_process = DecoderProcess()
atexit.register(_decoder_process.close)


def decode(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    *,
    reduced: bool = True,
    fast_resize: bool = False,
    preview_side: int | None = None,
    isolated: bool = False,
) -> DecodedImage:
    """Decode one image, in the worker or in the decoder process, after checking its header.

    Args:
        data: the encoded image; only its first frame or page is decoded.
        preprocessing: the sizes to resize and crop to.
        budget: the request's budget; the image's pixels are taken from it before decoding.
        reduced: decode large JPEGs at a fraction of their size; see this module's docstring.
        fast_resize: resize with SIMD, within 2 levels of 255; see `transform.resize`.
        preview_side: longest side of the preview, in pixels; None for no preview.
        isolated: decode even a simple image in the decoder process.

    Raises:
        ClientError: the bytes are empty, not an accepted image, damaged, or too large.
    """
    if not data:
        raise EmptyImage("The image is empty: it has no bytes.")
    header = probe(data)
    if header.size is not None:
        budget.take(*header.size)
        check_memory(header.names[0], header.size, header.fixed_bytes)
    task = Task(
        preprocessing,
        reduced,
        fast_resize,
        preview_side=preview_side,
        names=header.names,
        orientation=header.orientation,
        size=header.size,
        max_pixels=budget.limit,
    )
    image = _decode(header, task, budget, isolated=isolated)
    if header.other_end is not None:
        other = replace(header, pieces=(*header.pieces[:-1], header.other_end))
        if not np.array_equal(image.pixels, _decode(other, task, budget, isolated=isolated).pixels):
            raise DamagedImage("The image is cut off: its end is missing.")
    return image


def _decode(header: Header, task: Task, budget: PixelBudget, *, isolated: bool) -> DecodedImage:
    if header.simple and not isolated:
        needed = _needed_bytes(header, task)
        if needed <= _MAX_SIMPLE_BYTES:
            with budget.timed(), _memory_budget.reserved(needed), without_warnings():
                return decode_here(b"".join(header.pieces), task)
    with _memory_budget.reserved(DECODING_BYTES):
        return _decode_isolated(header, task, budget)


def run_all(jobs: Sequence[Callable[[], None]], pool: Executor | None) -> None:
    """Run functions that decode one image each and store its result or error.

    They run in the threads of a pool, if any: Pillow releases the GIL.
    """
    with without_warnings():
        run = pool.map if pool is not None and len(jobs) > 1 else map
        list(run(lambda job: job(), jobs))


def _needed_bytes(header: Header, task: Task) -> int:
    """Return the maximum memory for decoding and resizing a simple image, in bytes."""
    assert header.size is not None
    width, height = (max(1, side) for side in header.size)
    pixels = width * height
    if header.names == ("JPEG",) and task.reduced and is_large(header.size, task.preprocessing):
        pixels //= 4  # both sides are halved at least
    resized, _ = resized_size((width, height), task.preprocessing)
    resizing = resized[0] * height + resized[0] * resized[1]
    if task.preprocessing.fit != "pad":  # "pad" always resizes the whole image
        resizing = min(resizing, 2 * MAX_RESIZED_PIXELS)
    return header.fixed_bytes + pixels * header.pixel_bytes + 4 * resizing


def _decode_isolated(header: Header, task: Task, budget: PixelBudget) -> DecodedImage:
    limit = budget.seconds_left()
    try:
        reply, content = _decoder_process.decode(asdict(task), header.pieces, limit)
    except DecoderExitedError as error:
        if error.ran_out_of_time:
            budget.spend(limit)
            raise budget.too_slow() from error
        budget.spend(RESTART_SECONDS)
        if error.was_killed:
            raise TooLarge(
                "The image needs more memory to decode than the server has left. Send a smaller "
                "copy, or save it as a JPEG."
            ) from error
        raise DamagedImage(
            f"The {task.names[0]} image is damaged: it crashed the program that decodes it."
        ) from error
    budget.spend(reply["seconds"] + (RESTART_SECONDS if reply.get("exits") else 0))
    if "failure" in reply:
        raise RuntimeError(f"The decoder process failed: {reply['failure']}")
    if "error" in reply:
        raise getattr(errors, reply["error"])(reply["message"])
    if header.size is None:
        budget.take(*reply["size"])
    crop, preview = task.preprocessing.crop, None
    pixels = np.frombuffer(content, np.uint8, 3 * crop * crop).reshape(3, crop, crop).copy()
    if reply["preview"] is not None:
        preview = Image.frombytes("RGB", reply["preview"], content[pixels.nbytes :])
    return DecodedImage(pixels, tuple(reply["size"]), tuple(reply["crop"]), preview)
