"""Decode encoded images to the model's input: uint8 (3, crop, crop), red, green, blue.

Of an upright 8-bit RGB image the result is that of torchvision's transforms, bit for bit, such as
the tutorial's `Resize(255)` (bilinear, antialiased, on the 8-bit image) and `CenterCrop(224)`, or
of timm's if the whole image is squashed or padded to a square. Other images are first converted to
what a person sees: turned upright, transparency on white. Scaling to 0..1 and normalizing happen in
the model, so that a batch stays four times smaller until there.

A JPEG of ten or more times the needed size is decoded at a half, quarter or eighth of its size,
which takes half the time: within 3 levels of 255 and above 50 dB of that result. A setting turns it
off.

The bytes are a stranger's. Ordinary JPEGs, PNGs and WebPs of limited size are decoded in the worker
(`handler.formats` tells which); everything else in a process whose time and memory the kernel
limits (`handler.decoder_process`).
"""

import atexit
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, features

from handler import errors, tiff
from handler.decoder_process import RESTART_SECONDS, DecoderEndedError, DecoderProcess, serve
from handler.encoded import Header, unsupported
from handler.errors import ClientError, DamagedImage, EmptyImage, TooLarge
from handler.formats import min_bytes, probe
from handler.rgb import orientation, to_rgb, turned, upright
from handler.settings import DECODING_BYTES, Preprocessing, Settings

# Above this many pixels the tutorial's whole resized image is not made, only the crop is.
_MAX_RESIZED_PIXELS = 4_000_000

# How many times the needed size a JPEG keeps when it is decoded at a fraction of its size. With 5
# no pixel was further from the exact result than 3 levels of 255; with 4 it was 4, with 2 up to 8.
_REDUCED_SIZE = 5

# Orientations (Exif 2.3, 4.6.4) that swap width and height, and that mirror the file's columns or
# rows to make the image upright.
_SWAPS_SIDES = {5, 6, 7, 8}
_MIRRORS_X = {2, 3, 7, 8}
_MIRRORS_Y = {3, 4, 6, 7}

# A simple image that takes more memory than this is decoded in the decoder process all the same.
_MAX_SIMPLE_BYTES = 80_000_000
# With less CPU time left no further image of a request is decoded.
_MIN_SECONDS = 0.01

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# What Pillow calls the libraries that a format needs.
_LIBRARIES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "TIFF": "libtiff", "AVIF": "avif"}

# One model input: uint8 (3, crop, crop), 0 to 255, red, green, blue.
Pixels = NDArray[np.uint8]

# Left, upper, right and lower edge, in pixels.
Box = tuple[float, float, float, float]


class PixelBudget:
    """Limits what decoding all images of one request may cost; threads may share it."""

    def __init__(self, pixels: int, seconds: float = Settings.max_seconds) -> None:
        """Args: width times height of all images; seconds of CPU."""
        self.limit = self._left = pixels
        self._max_seconds = self._seconds = seconds
        self._lock = Lock()

    def take(self, width: int, height: int) -> None:
        """Take one image's pixels; raise `TooLarge` if too few are left."""
        with self._lock:
            if width * height > self._left:
                raise TooLarge(
                    f"The image has {width} x {height} pixels; the images of a request may have "
                    f"{self.limit:,} together. Send a smaller copy, or fewer at once."
                )
            self._left -= width * height

    def spend(self, seconds: float) -> None:
        """Take CPU time that decoding an image took."""
        with self._lock:
            self._seconds -= seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Take the CPU time that this thread uses; raise `TooLarge` if hardly any is left."""
        self.seconds_left()
        started = time.thread_time()
        try:
            yield
        finally:
            self.spend(time.thread_time() - started)

    def seconds_left(self) -> float:
        """Return the CPU time for the next image; raise `TooLarge` if hardly any is left."""
        if self._seconds < _MIN_SECONDS:
            raise self.too_slow()
        return self._seconds

    def too_slow(self) -> TooLarge:
        """Return the error for an image that takes too long."""
        return TooLarge(
            "The image takes too long to decode; the images of a request may take "
            f"{self._max_seconds:g} s together. Send a smaller copy, or save it as a JPEG, or "
            "send fewer at once."
        )


class MemoryBudget:
    """Limits the memory of all images that are being decoded; threads share it."""

    def __init__(self, limit: int) -> None:
        """Args: bytes."""
        self._limit = self._left = limit
        self._changed = Condition()

    @contextmanager
    def reserved(self, needed: int) -> Iterator[None]:
        """Wait until so many bytes are left, or all if more are needed, and take them."""
        needed = min(needed, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= needed)
            self._left -= needed
        try:
            yield
        finally:
            with self._changed:
                self._left += needed
                self._changed.notify_all()


_memory_budget = MemoryBudget(DECODING_BYTES)
_decoder_process = DecoderProcess()
atexit.register(_decoder_process.close)


@dataclass(frozen=True)
class Photo:
    """A decoded image of which the model's view can be shown.

    Attributes:
        pixels: uint8 (3, crop, crop), the model's input.
        size: width and height of the whole upright image, in pixels.
        crop: left, top, right and bottom of what the model sees, in pixels of that.
        preview: the whole upright image, RGB, made smaller if it was larger than asked for; None
            if none was asked for.
    """

    pixels: Pixels
    size: tuple[int, int]
    crop: Box
    preview: Image.Image | None


Decoder = Callable[[bytes | bytearray, Preprocessing, PixelBudget], Pixels | Photo]


@dataclass
class Job:
    """One image of a batch.

    Attributes:
        data: the encoded image.
        budget: of its request.
        decoder: `decode` or `decode_photo`.
        result: what the decoder returned; None if it failed.
        error: what is wrong with the image; any but a `ClientError` is the server's own fault.
    """

    data: bytes | bytearray
    budget: PixelBudget
    decoder: Decoder
    result: Pixels | Photo | None = None
    error: Exception | None = None


def decode_all(jobs: Sequence[Job], preprocessing: Preprocessing, pool: Executor | None) -> None:
    """Decode the images of a batch; each job gets its result or its error.

    Args:
        jobs: the images.
        preprocessing: the sizes to resize and crop to.
        pool: threads to decode in, since Pillow lets others run meanwhile; None for this thread.
    """

    def run(job: Job) -> None:
        try:
            job.result = job.decoder(job.data, preprocessing, job.budget)
        except ClientError as error:
            job.error = error.bare()
        except Exception as error:  # the server's own fault, with this image alone
            job.error = error

    with _without_warnings():
        if pool is None or len(jobs) < 2:  # noqa: PLR2004  # one waits for no other thread
            for job in jobs:
                run(job)
        else:
            list(pool.map(run, jobs))


def decode(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    *,
    reduced: bool = True,
    isolated: bool = False,
) -> Pixels:
    """Decode one image to the model's input.

    Args:
        data: the encoded image; of several frames or pages the first one counts.
        preprocessing: the sizes to resize and crop to.
        budget: from which the image's pixels are taken before any of it is decoded.
        reduced: decode large JPEGs at a fraction of their size; see the head of this module.
        isolated: decode it in the decoder process, however simple it is.

    Returns:
        uint8 (3, crop, crop), 0 to 255, red, green, blue.

    Raises:
        ClientError: the bytes are empty, not an accepted image, damaged, or too large.
    """
    return _decode(data, budget, _Task(preprocessing, reduced), isolated=isolated).pixels


def decode_photo(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    longest_side: int | None,
    *,
    reduced: bool = True,
) -> Photo:
    """Decode one image for the model and for a person: as `decode`, with a preview.

    Args:
        data: as in `decode`.
        preprocessing: as in `decode`.
        budget: as in `decode`.
        longest_side: of the preview, in pixels; None for no preview.
        reduced: as in `decode`.
    """
    return _decode(data, budget, _Task(preprocessing, reduced, longest_side))


@dataclass(frozen=True)
class _Task:
    """How to decode one image, in either process.

    Attributes:
        preprocessing: the sizes to resize and crop to.
        reduced: decode large JPEGs at a fraction of their size.
        longest_side: of the preview, in pixels; None for no preview.
        names: Pillow's names of the formats to try.
        orientation: 1 to 8; None to read it from the file.
        size: that the decoder must see; None if it is not known.
        max_pixels: if it is not known.
    """

    preprocessing: Preprocessing
    reduced: bool
    longest_side: int | None = None
    names: Sequence[str] = ()
    orientation: int | None = None
    size: Sequence[int] | None = None
    max_pixels: int = 0


def _decode(
    data: bytes | bytearray, budget: PixelBudget, task: _Task, *, isolated: bool = False
) -> Photo:
    """Check the header against the limits, and choose where to decode."""
    if not data:
        raise EmptyImage("The image is empty: it has no bytes.")
    header = probe(data)
    if header.size is not None:
        budget.take(*header.size)
        _check_memory(header.names[0], header.size, header.fixed_bytes)
    task = replace(
        task,
        names=header.names,
        orientation=header.orientation,
        size=header.size,
        max_pixels=budget.limit,
    )
    if header.simple and not isolated:
        needed = _needed_bytes(header, task)
        if needed <= _MAX_SIMPLE_BYTES:
            with budget.timed(), _memory_budget.reserved(needed), _without_warnings():
                return _make(b"".join(header.pieces), task)
    with _memory_budget.reserved(DECODING_BYTES):
        return _decode_isolated(header, task, budget)


def _needed_bytes(header: Header, task: _Task) -> int:
    """Return the memory that decoding and resizing a simple image takes at most."""
    assert header.size is not None
    width, height = (max(1, side) for side in header.size)
    pixels = width * height
    if header.names == ("JPEG",) and task.reduced and _is_large(header.size, task.preprocessing):
        pixels //= 4  # half the sides, or less
    resized, _ = _resized((width, height), task.preprocessing)
    resizing = resized[0] * height + resized[0] * resized[1]
    if task.preprocessing.fit != "pad":  # which makes no box of an image that is larger
        resizing = min(resizing, 2 * _MAX_RESIZED_PIXELS)
    return header.fixed_bytes + pixels * header.pixel_bytes + 4 * resizing


def _decode_isolated(header: Header, task: _Task, budget: PixelBudget) -> Photo:
    limit = budget.seconds_left()
    try:
        answer, content = _decoder_process.ask(asdict(task), header.pieces, limit)
    except DecoderEndedError as error:
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
    budget.spend(answer["seconds"] + (RESTART_SECONDS if answer.get("ends") else 0))
    if "failure" in answer:
        raise RuntimeError(f"The decoder process failed: {answer['failure']}")
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    if header.size is None:
        budget.take(*answer["size"])
    crop, preview = task.preprocessing.crop, None
    pixels = np.frombuffer(content, np.uint8, 3 * crop * crop).reshape(3, crop, crop).copy()
    if answer["preview"] is not None:
        preview = Image.frombytes("RGB", answer["preview"], content[pixels.nbytes :])
    return Photo(pixels, tuple(answer["size"]), tuple(answer["crop"]), preview)


# --- In the decoder process ---


def serve_decoding() -> None:
    """Run the decoder process: answer the questions of `_decode_isolated`."""
    # Threads would spend the same CPU time, and each takes memory.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    try:
        import pi_heif  # noqa: PLC0415  # the worker does without
    except ImportError:
        pass
    else:
        pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False)
    Image.init()
    serve(_answer)


def _answer(question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    preprocessing = Preprocessing(**question.pop("preprocessing"))
    try:
        with _without_warnings():
            photo = _make(data, _Task(preprocessing=preprocessing, **question))
    except ClientError as error:
        # A decoder that got no memory may have left anything behind.
        ends = isinstance(error.__cause__, MemoryError)
        return {"error": type(error).__name__, "message": str(error), "ends": ends}, b""
    except Exception as error:  # our own fault, for the worker's log
        return {"failure": f"{type(error).__name__}: {error}", "ends": True}, b""
    preview = photo.preview
    content = photo.pixels.tobytes() + (preview.tobytes() if preview is not None else b"")
    return {
        "size": photo.size,
        "crop": photo.crop,
        "preview": preview.size if preview is not None else None,
    }, content


# --- In either process ---


def _make(data: bytes, task: _Task) -> Photo:
    """Decode a file, turn it upright, resize and crop it."""
    preprocessing = task.preprocessing
    with _opened(data, task) as image:
        preview = None
        if task.reduced and image.format == "JPEG" and _is_large(image.size, preprocessing):
            exif = orientation(image) if task.orientation is None else task.orientation
            size = image.size[::-1] if exif in _SWAPS_SIDES else image.size
            cropped = _reduced_crop(image, data, preprocessing, exif)
            if task.longest_side is not None:
                preview = _shrunk(upright(image, data, exif), task.longest_side)
        else:
            whole = upright(image, data, task.orientation)
            size = whole.size
            cropped = resize_and_crop(whole, preprocessing)
            if task.longest_side is not None:
                preview = _shrunk(whole, task.longest_side)
        pixels = np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))
        return Photo(pixels, size, crop_box(size, preprocessing), preview)


def _shrunk(image: Image.Image, longest_side: int) -> Image.Image:
    scale = min(1.0, longest_side / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings of what a server need not know, such as odd metadata.

    Warning filters are the process's: threads that use this need another around all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(data: bytes, task: _Task) -> Iterator[Image.Image]:
    """Open an image whose header is within the limits; turn decoding errors into `ClientError`."""
    _check_decoders(tuple(task.names))
    what, size = "image", None  # as far as they are known
    try:
        if "TIFF" in task.names:
            tiff.check(data)
        with Image.open(io.BytesIO(data), formats=tuple(task.names)) as image:
            what, size = f"{image.format} image", image.size
            _check_size(image, task)
            yield image
    except ClientError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge("The image has more pixels than this server accepts.") from error
    except MemoryError as error:
        raise _too_much_memory(size) from error
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes
        if "memory" in str(error):  # their own words for it
            raise _too_much_memory(size) from MemoryError()
        if "BMP" in task.names and type(error) is OSError and size is None and any(data[14:18]):
            raise unsupported(f"a BMP of an unusual kind ({error})") from error
        raise DamagedImage(f"The {what} is damaged or cut off and cannot be decoded.") from error


@cache
def _check_decoders(names: tuple[str, ...]) -> None:
    """Raise `RuntimeError` if a decoder is missing, which is no fault of the image."""
    Image.preinit()
    for name in names:
        if name not in Image.OPEN:
            Image.init()
        if name not in Image.OPEN or not features.check(_LIBRARIES.get(name, "pil")):
            raise RuntimeError(f"The decoder of {name} is missing in Pillow or its plugins.")


def _check_size(image: Image.Image, task: _Task) -> None:
    if task.size is None:
        PixelBudget(task.max_pixels).take(*image.size)
    elif image.size != tuple(task.size):
        raise DamagedImage("The image is damaged: its header gives two sizes.")
    _check_memory(image.format, image.size)


def _check_memory(name: str | None, size: tuple[int, int], fixed: int = 0) -> None:
    if min_bytes(name, size) + fixed > DECODING_BYTES:
        raise _too_much_memory(size)


def _too_much_memory(size: tuple[int, int] | None) -> TooLarge:
    pixels = f" ({size[0]} x {size[1]} pixels)" if size else ""
    return TooLarge(
        f"The image{pixels} needs more than {DECODING_BYTES // 1_000_000} MB of memory to decode. "
        "Send a smaller copy, or save it as a JPEG."
    )


# --- Resizing ---


def _is_large(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Return whether a JPEG of this size is decoded at a fraction of it."""
    return (
        min(size) >= 2 * _REDUCED_SIZE * preprocessing.resize
        # The only ones for which the difference was measured.
        and preprocessing.interpolation == "bilinear"
        and preprocessing.fit == "crop"
    )


def _reduced_crop(
    image: Image.Image, data: bytes, preprocessing: Preprocessing, exif_orientation: int
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
    small = to_rgb(image, data).resize(
        (preprocessing.crop, preprocessing.crop),
        Image.Resampling.BILINEAR,
        box=(left * fraction, top * fraction, right * fraction, bottom * fraction),
    )
    return turned(small, exif_orientation)


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize an image and cut out the center square, as torchvision does, or as timm pads.

    Source of the arithmetic: `_compute_resized_output_size` and `center_crop` in
    torchvision/transforms/functional.py, `ResizeKeepRatio` and `center_crop_or_pad` in
    timm/data/transforms.py.

    Args:
        image: an RGB image of any size.
        preprocessing: the sizes.

    Returns:
        an RGB image of (crop, crop). Equal to torchvision's, except for images so long that
        torchvision would make more than 4 million pixels of them: there only the crop is
        computed, so that they cost no more than others, and Pillow's 32-bit box coordinates move
        a pixel by at most 2 levels of 255.
    """
    crop, filter_ = preprocessing.crop, _FILTERS[preprocessing.interpolation]
    (width, height), (left, top) = _resized(image.size, preprocessing)
    if preprocessing.fit == "pad":
        mean = preprocessing.mean
        rgb = mean[::-1] if preprocessing.channels == "bgr" else mean
        color = tuple(min(255, max(0, round(255 * value))) for value in rgb)
        square = Image.new("RGB", (crop, crop), color)
        square.paste(image.resize((width, height), filter_), (-left, -top))
        return square
    if width * height <= _MAX_RESIZED_PIXELS:
        resized = image.resize((width, height), filter_)
        return resized.crop((left, top, left + crop, top + crop))

    box = crop_box(image.size, preprocessing)
    return image.resize((crop, crop), filter_, box=box)


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Return left, top, right and bottom of the center square, in pixels of an image of this size.

    If the image is padded they are outside of it.
    """
    crop = preprocessing.crop
    (width, height), (left, top) = _resized(size, preprocessing)
    x_scale, y_scale = size[0] / width, size[1] / height
    return left * x_scale, top * y_scale, (left + crop) * x_scale, (top + crop) * y_scale


def _resized(
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
