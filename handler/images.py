"""From encoded bytes to the model's input: uint8 (3, crop, crop), red, green, blue.

Of an upright 8-bit RGB picture the result is that of torchvision's transforms, bit for bit, such as
the tutorial's `Resize(255)` (bilinear, antialiased, on the 8-bit picture) and `CenterCrop(224)`, or
of timm's where the whole picture is squashed or padded to a square. Other pictures are first made
one as a person sees them: turned upright, transparency on white. Scaling to 0..1 and normalising
happen in the model, so that a batch stays four times smaller until there.

A JPEG of ten or more times the needed size is decoded at a half, quarter or eighth of its size,
which takes half the time: within 3 levels of 255 and above 50 dB of that result. A setting turns it
off.

The bytes are a stranger's. What a picture would cost is found out and bounded before any of it is
decoded (`handler.formats`). Ordinary JPEGs, PNGs and WebPs are decoded here; whatever may cost more
than its header says, in a process that the kernel bounds (`handler.decoder_process`).
"""

import atexit
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image

from handler import errors
from handler.decoder_process import (
    RESTART_SECONDS,
    DecoderEndedError,
    DecoderProcess,
    serve,
)
from handler.errors import (
    ClientError,
    DamagedImage,
    EmptyImage,
    NotAnImage,
    TooLarge,
    UnsupportedFormat,
)
from handler.formats import ACCEPTED, Survey, least_bytes, survey
from handler.names import name_of
from handler.rgb import orientation, to_rgb, turned, upright
from handler.settings import DECODING_BYTES, Preprocessing, Settings

# Above this many pixels the tutorial's whole resized picture is not made, only the crop is.
_MAX_RESIZED_PIXELS = 4_000_000

# How many times the needed size a JPEG keeps when it is decoded at a fraction of its size. With 5
# no pixel was further from the exact result than 3 levels of 255; with 4 it was 4, with 2 up to 8.
_REDUCED_SIZE = 5

# Orientations (Exif 2.3, 4.6.4) by what they do: rows become columns, left becomes right, top
# becomes bottom.
_SWAPS_SIDES = {5, 6, 7, 8}
_MIRRORS_X = {2, 3, 6, 7}
_MIRRORS_Y = {3, 4, 7, 8}

# A picture that takes more than this of CPU time or memory, by its header, is not decoded in the
# worker's own threads.
_MOST_SECONDS_HERE = 0.5
_MOST_BYTES_HERE = 80_000_000
# Less is not worth a try.
_LEAST_SECONDS = 0.01

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# One model input: uint8 (3, crop, crop), 0 to 255, red, green, blue.
Pixels = NDArray[np.uint8]

# Left, upper, right and lower edge, in pixels.
Box = tuple[float, float, float, float]


class PixelBudget:
    """What decoding the images of one request may cost together; threads may share it."""

    def __init__(self, pixels: int, seconds: float = Settings.max_seconds) -> None:
        """Args: width times height of all images; seconds of CPU."""
        self.limit = self._left = pixels
        self._most_seconds = self._seconds = seconds
        self._lock = Lock()

    def take(self, width: int, height: int) -> None:
        """Takes one image's pixels; raises `TooLarge` where too few are left."""
        with self._lock:
            enough = width * height <= self._left
            if enough:
                self._left -= width * height
        if not enough:
            raise TooLarge(
                f"The image has {width} x {height} pixels; the images of a request may have "
                f"{self.limit:,} together. Send a smaller copy, or fewer at once."
            )

    def spend(self, seconds: float) -> None:
        """Takes CPU time that decoding an image takes or took."""
        with self._lock:
            self._seconds -= seconds

    @contextmanager
    def reserved(self, seconds: float) -> Iterator[None]:
        """Takes CPU time before it is spent, at most so much, and gives back what this thread left.

        Raises:
            TooLarge: hardly any is left.
        """
        self.seconds_left()
        self.spend(seconds)
        started = time.thread_time()
        try:
            yield
        finally:
            self.spend(time.thread_time() - started - seconds)

    def seconds_left(self) -> float:
        """CPU time for the next image; raises `TooLarge` where hardly any is left."""
        with self._lock:
            left = self._seconds
        if left < _LEAST_SECONDS:
            raise self.too_slow()
        return left

    def too_slow(self) -> TooLarge:
        """The error for an image that takes too long."""
        return TooLarge(
            "The image takes too long to decode; the images of a request may take "
            f"{self._most_seconds:g} s together. Send a smaller copy, or save it as a JPEG, or "
            "send fewer at once."
        )


class MemoryBudget:
    """The memory that the pictures being decoded may take together; threads share it."""

    def __init__(self, limit: int) -> None:
        """Args: bytes."""
        self._limit = self._left = limit
        self._changed = Condition()

    @contextmanager
    def reserved(self, needed: int) -> Iterator[None]:
        """Waits until so many bytes are left, or all where more are needed, and takes them."""
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
    """A picture of which the model's view is to be shown.

    Attributes:
        pixels: uint8 (3, crop, crop), the model's input.
        size: width and height of the whole upright picture, in pixels.
        crop: left, top, right and bottom of what the model sees, in pixels of that.
        preview: the whole upright picture, RGB, made smaller where it was larger than asked for;
            None where none was asked for.
    """

    pixels: Pixels
    size: tuple[int, int]
    crop: Box
    preview: Image.Image | None


# What was decoded, or what is wrong with it; other errors are the server's own.
Decoded = Pixels | Photo | Exception
Decoder = Callable[[bytes | bytearray, Preprocessing, PixelBudget], Pixels | Photo]

# Encoded bytes (or what was wrong with the request's part), what they may cost, and what to make.
Encoded = tuple[bytes | bytearray | ClientError, PixelBudget, Decoder]


def decode_all(
    pictures: Sequence[Encoded], preprocessing: Preprocessing, pool: Executor | None
) -> list[Decoded]:
    """Decodes the pictures of a batch.

    Args:
        pictures: encoded pictures, each with its request's budget and `decode` or `decode_photo`;
            errors are passed on.
        preprocessing: the sizes to resize and crop to.
        pool: threads to decode in, since Pillow lets others run meanwhile; None for this thread.

    Returns:
        for each picture, in order, what was made of it or what is wrong with it.
    """

    def decode_one(picture: Encoded) -> Decoded:
        data, budget, decoder = picture
        if isinstance(data, ClientError):
            return data
        try:
            return decoder(data, preprocessing, budget)
        except ClientError as error:
            return error.bare()
        except Exception as error:  # the server's own fault, with this picture alone
            return error

    with _without_warnings():
        if pool is None or len(pictures) < 2:  # noqa: PLR2004  # one waits for no other thread
            return [decode_one(picture) for picture in pictures]
        return list(pool.map(decode_one, pictures))


@dataclass(frozen=True)
class _Task:
    """What to make of a picture: for the model alone, or for a person too."""

    preprocessing: Preprocessing
    reduced: bool
    is_photo: bool = False
    longest_side: int | None = None


def decode(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    *,
    reduced: bool = True,
    isolated: bool = False,
) -> Pixels:
    """Decodes one picture and makes it the model's input.

    Args:
        data: the encoded picture; of several frames or pages the first one counts.
        preprocessing: the sizes to resize and crop to.
        budget: where the picture's pixels are taken from before any of it is decoded.
        reduced: decode large JPEGs at a fraction of their size; see the head of this module.
        isolated: decode it in the decoder process, whatever it may cost.

    Returns:
        uint8 (3, crop, crop), 0 to 255, red, green, blue.

    Raises:
        ClientError: the bytes are empty, not an accepted picture, damaged, or too large.
    """
    result = _decode(data, _Task(preprocessing, reduced), budget, isolated=isolated)
    assert isinstance(result, np.ndarray)
    return result


def decode_photo(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    longest_side: int | None,
    *,
    reduced: bool = True,
) -> Photo:
    """Decodes one picture for the model and for a person.

    Args:
        data: as in `decode`, and so are `preprocessing`, `budget` and `reduced`.
        preprocessing: the sizes to resize and crop to.
        budget: where the picture's pixels are taken from.
        longest_side: of the preview, in pixels; None for no preview.
        reduced: as in `decode`.

    Raises:
        ClientError: as in `decode`.
    """
    task = _Task(preprocessing, reduced, is_photo=True, longest_side=longest_side)
    result = _decode(data, task, budget)
    assert isinstance(result, Photo)
    return result


def _decode(
    data: bytes | bytearray, task: _Task, budget: PixelBudget, *, isolated: bool = False
) -> Pixels | Photo:
    """Finds out what the picture may cost, and decodes it where that does no harm."""
    if not data:
        raise EmptyImage("The image is empty: it has no bytes.")
    found = survey(data)
    if found is None:
        raise _unidentified(data)
    if found.size is not None:
        budget.take(*found.size)
        _check_memory(found.names[0], found.size, found.fixed_bytes)
    if not (isolated or found.isolated) and found.size is not None:
        memory = _memory(found, found.size, task)
        if found.seconds <= _MOST_SECONDS_HERE and memory <= _MOST_BYTES_HERE:
            with (
                budget.reserved(found.seconds),
                _memory_budget.reserved(memory),
                _without_warnings(),
            ):
                return _made(found.cleaned(), found.names, task, _same_as(found.size))
    with _memory_budget.reserved(DECODING_BYTES):
        return _decode_isolated(found, task, budget)


def _same_as(size: tuple[int, int]) -> Callable[[tuple[int, int]], None]:
    """A check that the decoder sees the size for which memory was reserved."""

    def check(seen: tuple[int, int]) -> None:
        if seen != size:
            raise DamagedImage("The image is damaged: its header gives two sizes.")

    return check


def _memory(found: Survey, size: tuple[int, int], task: _Task) -> int:
    """Bytes that decoding and resizing take at most."""
    width, height = size
    if "JPEG" in found.names and task.reduced and _is_large(size, task.preprocessing):
        enough = _REDUCED_SIZE * task.preprocessing.resize
        # As Pillow's `draft` chooses.
        scale = next(s for s in (8, 4, 2, 1) if s <= max(1, min(width, height) // enough))
        width, height = -(-width // scale), -(-height // scale)
    resized, _ = _resized((max(1, width), max(1, height)), task.preprocessing)
    resizing = resized[0] * height + resized[0] * resized[1]
    if task.preprocessing.fit != "pad":  # which makes no box of a picture that is larger
        resizing = min(resizing, 2 * _MAX_RESIZED_PIXELS)
    resizing *= 4
    return found.fixed_bytes + width * height * found.pixel_bytes + resizing


def _decode_isolated(found: Survey, task: _Task, budget: PixelBudget) -> Pixels | Photo:
    limit = budget.seconds_left()
    question = {
        "names": found.names,
        "task": asdict(task),
        # Only of pictures whose size nobody knows yet.
        "pixels": None if found.size is not None else budget.limit,
    }
    try:
        answer, content = _decoder_process.ask(question, found.pieces, limit)
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
            f"The {found.names[0]} image is damaged: it ended the program that decodes it."
        ) from error
    budget.spend(answer["seconds"] + (RESTART_SECONDS if answer.get("ends") else 0))
    if "failure" in answer:
        raise RuntimeError(f"The decoder process failed: {answer['failure']}")
    if "error" in answer:
        error_type = getattr(errors, answer["error"])
        raise error_type(answer["message"])
    if found.size is None:
        budget.take(*answer["file_size"])
    return _unpacked(answer, content, task)


# --- In the decoder process ---


def serve_decoding() -> None:
    """The decoder process: answers `_decode_isolated`'s questions."""
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
    values = question["task"]
    task = _Task(**{**values, "preprocessing": Preprocessing(**values["preprocessing"])})
    sizes: list[tuple[int, int]] = []

    def check(size: tuple[int, int]) -> None:
        sizes.append(size)
        if question["pixels"] is not None:
            PixelBudget(question["pixels"]).take(*size)

    try:
        with _without_warnings():
            result = _made(data, question["names"], task, check)
    except ClientError as error:
        # A decoder that got no memory may have left anything behind.
        ends = isinstance(error.__cause__, MemoryError)
        return {"error": type(error).__name__, "message": str(error), "ends": ends}, b""
    except Exception as error:  # our own fault, for the worker's log
        return {"failure": f"{type(error).__name__}: {error}", "ends": True}, b""
    answer, content = _packed(result)
    return {"file_size": sizes[0], **answer}, content


def _packed(result: Pixels | Photo) -> tuple[dict[str, Any], bytes]:
    if not isinstance(result, Photo):
        return {}, result.tobytes()
    preview = result.preview
    content = result.pixels.tobytes() + (preview.tobytes() if preview is not None else b"")
    return {
        "size": result.size,
        "crop": result.crop,
        "preview": preview.size if preview is not None else None,
    }, content


def _unpacked(answer: dict[str, Any], content: bytes, task: _Task) -> Pixels | Photo:
    crop = task.preprocessing.crop
    pixels = np.frombuffer(content, np.uint8, 3 * crop * crop).reshape(3, crop, crop).copy()
    if not task.is_photo:
        return pixels
    preview = None
    if answer["preview"] is not None:
        preview = Image.frombytes("RGB", answer["preview"], content[pixels.nbytes :])
    return Photo(pixels, tuple(answer["size"]), tuple(answer["crop"]), preview)


# --- In either ---


def _made(
    data: bytes,
    names: Sequence[str],
    task: _Task,
    check: Callable[[tuple[int, int]], None],
) -> Pixels | Photo:
    """Decodes a cleaned file.

    Args:
        data: the cleaned file.
        names: Pillow's names of the formats to try.
        task: what to make of it.
        check: is told the size before any pixel is decoded, and may raise a `ClientError`.
    """
    preprocessing = task.preprocessing
    with _opened(data, names) as image:
        check(image.size)
        _check_memory(image.format, image.size)
        is_reduced = (
            task.reduced and image.format == "JPEG" and _is_large(image.size, preprocessing)
        )
        if not task.is_photo:
            if is_reduced:
                return _as_input(_reduced_crop(image, data, preprocessing))
            return _as_input(resize_and_crop(upright(image, data), preprocessing))
        size = image.size
        if is_reduced:
            if orientation(image) in _SWAPS_SIDES:
                size = size[1], size[0]
            pixels = _as_input(_reduced_crop(image, data, preprocessing))
            whole = upright(image, data)
        else:
            whole = upright(image, data)
            size = whole.size
            pixels = _as_input(resize_and_crop(whole, preprocessing))
        return Photo(
            pixels=pixels,
            size=size,
            crop=crop_box(size, preprocessing),
            preview=None if task.longest_side is None else _shrunk(whole, task.longest_side),
        )


def _shrunk(image: Image.Image, longest_side: int) -> Image.Image:
    scale = min(1.0, longest_side / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _as_input(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow warns of what a server need not know, such as odd metadata.

    Warning filters are the process's: threads that use this need another around all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(data: bytes, names: Sequence[str]) -> Iterator[Image.Image]:
    """The picture; decoding errors become `ClientError`."""
    with _open(data, names) as image:
        try:
            yield image
        except ClientError:
            raise
        except MemoryError as error:
            raise _too_much_memory(image.size) from error
        except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes
            if "memory" in str(error):  # their own words for it
                raise _too_much_memory(image.size) from MemoryError()
            raise DamagedImage(
                f"The {image.format} image is damaged or cut off and cannot be decoded."
            ) from error


def _open(data: bytes, names: Sequence[str]) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=tuple(names))
    except Image.DecompressionBombError as error:
        raise TooLarge("The image has more pixels than this server accepts.") from error
    except MemoryError as error:
        raise _too_much_memory(None) from error
    except Exception as error:  # beside its own, Pillow raises many kinds on hostile headers
        raise DamagedImage("The image is damaged or cut off: its header cannot be read.") from error


def _check_memory(name: str | None, size: tuple[int, int], fixed: int = 0) -> None:
    if least_bytes(name, size) + fixed > DECODING_BYTES:
        raise _too_much_memory(size)


def _too_much_memory(size: tuple[int, int] | None) -> TooLarge:
    pixels = f" ({size[0]} x {size[1]} pixels)" if size else ""
    return TooLarge(
        f"The image{pixels} needs more than {DECODING_BYTES // 1_000_000} MB of memory to decode. "
        "Send a smaller copy, or save it as a JPEG."
    )


def _unidentified(data: bytes | bytearray) -> ClientError:
    accepted = ", ".join(ACCEPTED)
    if (name := name_of(data)) is not None:
        return UnsupportedFormat(f"This is {name} file. Accepted are: {accepted}.")
    return NotAnImage(f"The bytes are not a picture. Accepted are: {accepted}.")


def _is_large(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Whether a JPEG of this size is decoded at a fraction of it."""
    return (
        min(size) >= 2 * _REDUCED_SIZE * preprocessing.resize
        # The only ones for which the difference was measured.
        and preprocessing.interpolation == "bilinear"
        and preprocessing.fit == "crop"
    )


def _reduced_crop(image: Image.Image, data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """The model's input from a large JPEG, decoded at a fraction of its size: (crop, crop), RGB.

    Only what the crop needs is resized, and only the crop is turned upright.
    """
    held = orientation(image)
    width, height = image.size
    upright_size = (height, width) if held in _SWAPS_SIDES else (width, height)
    box = _unturned(crop_box(upright_size, preprocessing), upright_size, held)

    enough = _REDUCED_SIZE * preprocessing.resize
    draft = image.draft(None, (enough, enough))
    # The copy's sides are rounded up; the exact fraction keeps the crop in its place.
    fraction = draft[1][2] / width if draft is not None else 1.0
    left, top, right, bottom = (side * fraction for side in box)
    small = to_rgb(image, data).resize(
        (preprocessing.crop, preprocessing.crop),
        Image.Resampling.BILINEAR,
        box=(left, top, right, bottom),
    )
    return turned(small, held)


def _unturned(box: Box, size: tuple[int, int], held: int) -> Box:
    """From the upright picture's coordinates, `size` wide and high, to those of the file."""
    left, top, right, bottom = box
    if held in _MIRRORS_X:
        left, right = size[0] - right, size[0] - left
    if held in _MIRRORS_Y:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if held in _SWAPS_SIDES else (left, top, right, bottom)


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resizes a picture and cuts the centre square, as torchvision does, or as timm pads.

    Source of the arithmetic: `_compute_resized_output_size` and `center_crop` in
    torchvision/transforms/functional.py, `ResizeKeepRatio` and `center_crop_or_pad` in
    timm/data/transforms.py.

    Args:
        image: an RGB picture of any size.
        preprocessing: the sizes.

    Returns:
        an RGB picture of (crop, crop). Equal to torchvision's, except for pictures so long that
        torchvision would make more than 4 million pixels of them: there only the crop is
        computed, so that they cost no more than others, and Pillow's 32-bit box coordinates move
        a pixel by at most 2 levels of 255.
    """
    crop, filter_ = preprocessing.crop, _FILTERS[preprocessing.interpolation]
    (width, height), (left, top) = _resized(image.size, preprocessing)
    if preprocessing.fit == "pad":
        mean = preprocessing.mean
        rgb = mean[::-1] if preprocessing.channels == "bgr" else mean
        colour = tuple(min(255, max(0, round(255 * value))) for value in rgb)
        square = Image.new("RGB", (crop, crop), colour)
        square.paste(image.resize((width, height), filter_), (-left, -top))
        return square
    if width * height <= _MAX_RESIZED_PIXELS:
        resized = image.resize((width, height), filter_)
        return resized.crop((left, top, left + crop, top + crop))

    box = crop_box(image.size, preprocessing)
    return image.resize((crop, crop), filter_, box=box)


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Left, top, right and bottom of the centre square, in pixels of a picture of this size.

    Where the picture is padded they are outside of it.
    """
    crop = preprocessing.crop
    (width, height), (left, top) = _resized(size, preprocessing)
    x_scale, y_scale = size[0] / width, size[1] / height
    return left * x_scale, top * y_scale, (left + crop) * x_scale, (top + crop) * y_scale


def _resized(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height after resizing, and left and top of the centre square in that."""
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
