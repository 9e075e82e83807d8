"""From encoded bytes to the model's input: uint8 (3, crop, crop), red, green, blue.

Of an upright 8-bit RGB picture the result is that of torchvision's transforms, bit for bit, such as
the tutorial's `Resize(255)` (bilinear, antialiased, on the 8-bit picture) and `CenterCrop(224)`.
Other pictures
are first made one as a person sees them: turned upright, transparency on white. Scaling to 0..1
and normalising happen in the model, so that a batch stays four times smaller until there.

A JPEG of ten or more times the needed size is decoded at a half, quarter or eighth of its size,
which takes half the time: within 3 levels of 255 and above 50 dB of that result. A setting turns it
off.

The bytes are a stranger's. What a picture would cost is read from its header and bounded before
any of it is decoded, and only the listed formats are ever opened.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.errors import (
    ClientError,
    DamagedImage,
    EmptyImage,
    NotAnImage,
    TooLarge,
    UnsupportedFormat,
)
from handler.kinds import TIFF_BEGINNINGS, check_kind
from handler.names import name_of
from handler.rgb import orientation, to_rgb, turned, upright
from handler.settings import Preprocessing

try:
    # Phones write HEIC; this package decodes it and no more. An archive serves without it too.
    import pi_heif
except ImportError:
    _HEIF: tuple[str, ...] = ()
else:
    pi_heif.register_heif_opener()
    _HEIF = ("HEIF",)

# Pillow is asked for these and no others. None of them runs another program.
ACCEPTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", *_HEIF)

# How their files begin: such bytes that cannot be opened are a damaged picture.
_ACCEPTED_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", *TIFF_BEGINNINGS)
_RIFF_KINDS = (b"WEBP",)
_HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
_FTYP_BRANDS = (b"ftypavif", b"ftypavis", *(_HEIF_BRANDS if _HEIF else ()))


# A progressive JPEG is decoded once for each of its scans. Cameras and editors write about 10; a
# file can hold thousands, each of which costs a pass over all pixels.
_MAX_JPEG_SCANS = 100
_JPEG_START_OF_SCAN = b"\xff\xda"

# A file of more pages is a document; which of them would be the picture?
_MAX_TIFF_PAGES = 100

# Above this many pixels the tutorial's whole resized picture is not made, only the crop is.
_MAX_RESIZED_PIXELS = 4_000_000

# How many times the needed size a JPEG keeps when it is decoded at a fraction of its size. With 5
# no pixel was further from the exact result than 3 levels of 255; with 4 it was 4, with 2 up to 8.
_REDUCED_SIZE = 5

# What the EXIF orientations do: rows become columns, left becomes right, top becomes bottom.
_SWAPS_SIDES = {5, 6, 7, 8}
_MIRRORS_X = {2, 3, 6, 7}
_MIRRORS_Y = {3, 4, 7, 8}

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
    """How many pixels the images of one request may have together; threads may share it."""

    def __init__(self, pixels: int) -> None:
        self._limit = self._left = pixels
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
                f"{self._limit:,} together. Send a smaller copy, or fewer at once."
            )


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


# What was decoded, or what is wrong with it.
Decoded = Pixels | Photo | ClientError
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
            return error

    with _without_warnings():
        if pool is None or len(pictures) < 2:  # noqa: PLR2004  # one waits for no other thread
            return [decode_one(picture) for picture in pictures]
        return list(pool.map(decode_one, pictures))


def decode(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    *,
    reduced: bool = True,
) -> Pixels:
    """Decodes one picture and makes it the model's input.

    Args:
        data: the encoded picture; of several frames or pages the first one counts.
        preprocessing: the sizes to resize and crop to.
        budget: where the picture's pixels are taken from before any of it is decoded.
        reduced: decode large JPEGs at a fraction of their size; see the head of this module.

    Returns:
        uint8 (3, crop, crop), 0 to 255, red, green, blue.

    Raises:
        ClientError: the bytes are empty, not an accepted picture, damaged, or too large.
    """
    with _opened(data, budget) as image:
        if reduced and _is_large_jpeg(image, preprocessing):
            return _as_input(_reduced_crop(image, data, preprocessing))
        return _as_input(resize_and_crop(upright(image, data), preprocessing))


def decode_photo(
    data: bytes | bytearray,
    preprocessing: Preprocessing,
    budget: PixelBudget,
    longest_side: int | None,
) -> Photo:
    """Decodes one picture for the model and for a person.

    Args:
        data: as in `decode`, and so are `preprocessing` and `budget`.
        preprocessing: the sizes to resize and crop to.
        budget: where the picture's pixels are taken from.
        longest_side: of the preview, in pixels; None for no preview.

    Raises:
        ClientError: as in `decode`.
    """
    with _opened(data, budget) as image:
        whole = upright(image, data)
        return Photo(
            pixels=_as_input(resize_and_crop(whole, preprocessing)),
            size=whole.size,
            crop=crop_box(whole.size, preprocessing),
            preview=None if longest_side is None else _shrunk(whole, longest_side),
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
def _opened(data: bytes | bytearray, budget: PixelBudget) -> Iterator[Image.Image]:
    """The picture, once what it would cost is paid for; decoding errors become `ClientError`."""
    if not data:
        raise EmptyImage("The image is empty: it has no bytes.")
    with _without_warnings(), _open(data) as image:
        try:
            _check_cost(image, data, budget)
            yield image
        except ClientError:
            raise
        except MemoryError as error:
            raise TooLarge(
                "The image needs more memory than this server has. Send a smaller copy."
            ) from error
        except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes
            raise DamagedImage(
                f"The {image.format} image is damaged or cut off and cannot be decoded."
            ) from error


def _open(data: bytes | bytearray) -> Image.Image:
    """Reads the header only."""
    check_kind(data)
    try:
        return Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge("The image has more pixels than this server accepts.") from error
    except Exception as error:  # beside its own, Pillow raises many kinds on hostile headers
        raise _unidentified(data) from error


def _unidentified(data: bytes | bytearray) -> ClientError:
    if (
        data.startswith(_ACCEPTED_BEGINNINGS)
        or data.startswith(_FTYP_BRANDS, 4)
        or (data.startswith(b"RIFF") and data.startswith(_RIFF_KINDS, 8))
    ):
        return DamagedImage("The image is damaged or cut off: its header cannot be read.")
    accepted = ", ".join(ACCEPTED_FORMATS)
    if (name := name_of(data)) is not None:
        return UnsupportedFormat(f"This is {name} file. Accepted are: {accepted}.")
    return NotAnImage(f"The bytes are not a picture. Accepted are: {accepted}.")


def _check_cost(image: Image.Image, data: bytes | bytearray, budget: PixelBudget) -> None:
    if image.format in {"JPEG", "MPO"} and data.count(_JPEG_START_OF_SCAN) > _MAX_JPEG_SCANS:
        raise TooLarge(
            f"The JPEG image has more than {_MAX_JPEG_SCANS} scans, each of which costs as much "
            "as a picture. Save it again as a normal JPEG."
        )
    if image.format == "TIFF" and _has_page(image, _MAX_TIFF_PAGES):
        raise TooLarge(
            f"The TIFF file has more than {_MAX_TIFF_PAGES} pages. Send the page that counts."
        )
    budget.take(image.width, image.height)


def _has_page(image: Image.Image, index: int) -> bool:
    """Looks no further than that page: a file can chain millions, or a circle of them."""
    try:
        image.seek(index)
    except Exception:  # no such page, or a damaged one: the first may still be sound
        return False
    finally:
        image.seek(0)
    return True


def _is_large_jpeg(image: Image.Image, preprocessing: Preprocessing) -> bool:
    least = 2 * _REDUCED_SIZE * preprocessing.resize
    return (
        image.format in {"JPEG", "MPO"}
        and min(image.size) >= least
        # The only one for which the difference was measured.
        and preprocessing.interpolation == "bilinear"
    )


def _reduced_crop(
    image: Image.Image, data: bytes | bytearray, preprocessing: Preprocessing
) -> Image.Image:
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
    """Resizes the shorter side and cuts the centre square, as torchvision does.

    Source of the arithmetic: `_compute_resized_output_size` and `center_crop` in
    torchvision/transforms/functional.py.

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
    if width * height <= _MAX_RESIZED_PIXELS:
        resized = image.resize((width, height), filter_)
        return resized.crop((left, top, left + crop, top + crop))

    box = crop_box(image.size, preprocessing)
    return image.resize((crop, crop), filter_, box=box)


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Left, top, right and bottom of the centre square, in pixels of a picture of this size."""
    crop = preprocessing.crop
    (width, height), (left, top) = _resized(size, preprocessing)
    x_scale, y_scale = size[0] / width, size[1] / height
    return left * x_scale, top * y_scale, (left + crop) * x_scale, (top + crop) * y_scale


def _resized(
    size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height after resizing, and left and top of the centre square in that."""
    short, crop = preprocessing.resize, preprocessing.crop
    if size[0] <= size[1]:
        width, height = short, int(short * size[1] / size[0])
    else:
        width, height = int(short * size[0] / size[1]), short
    return (width, height), (round((width - crop) / 2.0), round((height - crop) / 2.0))
