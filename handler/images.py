"""From encoded bytes to the model's input: uint8 (3, crop, crop), red, green, blue.

The result is that of the tutorial's transform, bit for bit:
`Resize(255)` (bilinear, antialiased, on the 8-bit picture) and `CenterCrop(224)`. Scaling to
0..1 and normalising happen in the model, so that a batch stays four times smaller until there.
"""

import io
import warnings

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
from handler.settings import Preprocessing

# Pillow is asked for these and no others. None of them runs another program.
ACCEPTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# How their files begin: such bytes that cannot be opened are a damaged picture.
_ACCEPTED_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_AVIF_BRANDS = (b"ftypavif", b"ftypavis")

# The file formats that people send by mistake, by how they begin: the answer can name them.
_OTHER_FORMATS = {
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"8BPS": "Photoshop",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    b"PK\x03\x04": "ZIP or Office",
    b"\x1f\x8b": "gzip",
    b"\x00\x00\x01\x00": "icon (ICO)",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
}

# Above this many pixels the tutorial's whole resized picture is not made, only the crop is.
_MAX_RESIZED_PIXELS = 4_000_000


def decode(
    data: bytes | bytearray, preprocessing: Preprocessing, max_pixels: int
) -> NDArray[np.uint8]:
    """Decodes one picture and makes it the model's input.

    Args:
        data: the encoded picture.
        preprocessing: the sizes to resize and crop to.
        max_pixels: width times height above which the picture is refused, undecoded.

    Returns:
        uint8 (3, crop, crop), 0 to 255, red, green, blue.

    Raises:
        ClientError: the bytes are empty, not an accepted picture, damaged, or too large.
    """
    if not data:
        raise EmptyImage("The image is empty: it has no bytes.")
    # Pillow warns of much that is right to ignore in a server, such as odd metadata.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data) as image:
            _check_size(image, max_pixels)
            try:
                rgb = image.convert("RGB")
            except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes
                raise DamagedImage(
                    f"The {image.format} image is damaged or cut off and cannot be decoded."
                ) from error
    pixels = np.asarray(resize_and_crop(rgb, preprocessing))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _open(data: bytes | bytearray) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge("The image has more pixels than this server accepts.") from error
    except Exception as error:  # beside its own, Pillow raises many kinds on hostile headers
        raise _unidentified(data) from error


def _unidentified(data: bytes | bytearray) -> ClientError:
    if data.startswith(_ACCEPTED_BEGINNINGS) or data.startswith(_AVIF_BRANDS, 4):
        return DamagedImage("The image is damaged or cut off: its header cannot be read.")
    for beginning, name in _OTHER_FORMATS.items():
        if data.startswith(beginning):
            return UnsupportedFormat(
                f"This is a {name} file. Accepted are: {', '.join(ACCEPTED_FORMATS)}."
            )
    return NotAnImage(f"The bytes are not a picture. Accepted are: {', '.join(ACCEPTED_FORMATS)}.")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise TooLarge(
            f"The image has {image.width} x {image.height} pixels; "
            f"at most {max_pixels} pixels are accepted. Send a smaller copy."
        )


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
        computed, and Pillow's 32-bit box coordinates move a pixel by at most 1 level of 255 on
        photographs (2 on noise).
    """
    short, crop = preprocessing.resize, preprocessing.crop
    if image.width <= image.height:
        width, height = short, int(short * image.height / image.width)
    else:
        width, height = int(short * image.width / image.height), short
    left, top = round((width - crop) / 2.0), round((height - crop) / 2.0)

    if width * height <= _MAX_RESIZED_PIXELS:
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + crop, top + crop))

    x_scale, y_scale = image.width / width, image.height / height
    box = (left * x_scale, top * y_scale, (left + crop) * x_scale, (top + crop) * y_scale)
    return image.resize((crop, crop), Image.Resampling.BILINEAR, box=box)
