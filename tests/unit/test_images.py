"""Decoding and preprocessing, against the tutorial's own transform."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import nn
from torchvision import transforms

from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode, run_all
from handler.errors import (
    DamagedImage,
    EmptyImage,
    NotAnImage,
    TooLarge,
    UnsupportedFormat,
)
from handler.request import RequestImage, run_isolated
from scripts.build.export import Normalized
from scripts.samples import CAT
from tests.images import (
    MAX_PIXELS,
    PREPROCESSING,
    decoded,
    encode,
    generated,
    large_jpegs,
    photographs,
)

# The transform of the PyTorch tutorial.
TUTORIAL = transforms.Compose(
    [
        transforms.Resize(255),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
STD = torch.tensor(PREPROCESSING.std).view(3, 1, 1)


def normalized(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """What the exported model computes first, on the handler's pixels."""
    result: torch.Tensor = Normalized(nn.Identity(), PREPROCESSING)(torch.from_numpy(pixels)[None])
    return result[0]


def quickly(image: Image.Image) -> bytes:
    return encode(image, compress_level=0)


def test_preprocessing_equals_the_tutorials_bit_for_bit(note: list[str]) -> None:
    """The tutorial would make more than 4 million pixels of a very long image."""
    images = [image for _, image in (*photographs(), *generated())]
    exact = [image for image in images if not is_very_long(image)]
    long = [image for image in images if is_very_long(image)][::5]
    assert len(exact) >= 200
    worst, worst_long = (max(map(difference, some)) for some in (exact, long))
    note.append(
        f"preprocessing: {len(exact)} images against the tutorial's transform, worst difference "
        f"{worst:.1f} of 255 levels; {len(long)} more than 61 times as long as wide, worst "
        f"{worst_long:.2f}"
    )
    assert worst == 0
    assert worst_long <= 1.01  # a level, and float32's rounding of it


def difference(image: Image.Image) -> float:
    """Return the largest difference from the tutorial's transform, in levels of 255."""
    mine = normalized(decoded(quickly(image)).pixels)
    return float(((mine - TUTORIAL(image.convert("RGB"))).abs() * STD).max()) * 255


def is_very_long(image: Image.Image) -> bool:
    """See `resize_and_crop`."""
    return 255**2 * max(image.size) / min(image.size) > 4_000_000


@pytest.mark.parametrize("size", [(451, 300), (1500, 1000)])
def test_a_truncated_jpeg_gives_the_pixels_of_the_whole_one_or_is_rejected(
    size: tuple[int, int],
) -> None:
    """Its end marker may be missing, and a cut-off scan is rejected if that can be seen."""
    photograph = Image.open(CAT).convert("RGB").resize(size)
    for whole in (
        encode(photograph, "JPEG", progressive=True),
        encode(photograph, "JPEG", progressive=True, quality=95),
        encode(photograph, "JPEG"),
    ):
        expected = decoded(whole).pixels
        for isolated in (False, True):
            for missing in (1, 2):
                data = whole[:-missing]
                for tail in (b"", bytes(5)):
                    found = decoded(data + tail, isolated=isolated)
                    assert np.array_equal(found.pixels, expected)
        rejected = 0
        for missing in (3, 10, 100, 1_000, *range(len(whole) // 10, len(whole), len(whole) // 10)):
            try:
                found = decoded(whole[:-missing])
            except DamagedImage:
                rejected += 1
            else:
                assert np.array_equal(found.pixels, expected), missing
        assert rejected >= 9


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (2, 1500), (3000, 10)])
def test_very_long_images_stay_within_two_levels_of_the_tutorial(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert difference(Image.fromarray(noise)) <= 2.01


def test_a_file_of_another_format_is_rejected_with_its_name() -> None:
    accepted = "Accepted are: JPEG"
    for data, error, message in (
        (b"", EmptyImage, "no bytes"),
        (b"hello" * 100, NotAnImage, f"not an image. {accepted}"),
        (b"%PDF-1.7 ...", UnsupportedFormat, f"a PDF file. {accepted}"),
        # Pillow could read it.
        (encode(Image.new("L", (9, 9)), "PPM"), UnsupportedFormat, "has an unsupported format"),
    ):
        with pytest.raises(error, match=message):
            decoded(data)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    header_only = encode(Image.new("RGB", (3000, 2000)))[:60]
    with pytest.raises(TooLarge, match=r"3000 x 2000 pixels; .* may have 1,000,000 together"):
        decode(header_only, PREPROCESSING, PixelBudget(1_000_000))


def reduced_and_exact(jpeg: bytes) -> list[NDArray[np.int_]]:
    """Decode a large JPEG at reduced size and whole."""
    reduced, exact = (decoded(jpeg, reduced=flag).pixels.astype(int) for flag in (True, False))
    assert not np.array_equal(reduced, exact), "this image was not reduced"
    return [reduced, exact]


@pytest.mark.slow
def test_large_jpegs_decoded_at_reduced_size_stay_within_3_levels(note: list[str]) -> None:
    worst, min_psnr, count = 0, float("inf"), 0
    for jpeg in large_jpegs():
        reduced, exact = reduced_and_exact(jpeg)
        levels = np.abs(reduced - exact)
        count += 1
        worst = max(worst, int(levels.max()))
        min_psnr = min(min_psnr, 10 * np.log10(255**2 / (levels**2).mean()))
    note.append(
        f"large JPEGs at reduced size: {count} against whole decoding, worst difference {worst} "
        f"of 255 levels, least PSNR {min_psnr:.1f} dB"
    )
    assert count >= 20
    assert worst <= 3
    assert min_psnr >= 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_rotated_jpeg_is_cropped_as_the_whole_one_is(orientation: int) -> None:
    """Its sides are no multiples of 8: the smaller copy has more than the image at two edges."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with Image.open(CAT) as cat:
        large = cat.convert("RGB").resize((2557, 3001))
    reduced, exact = reduced_and_exact(encode(large, "JPEG", quality=92, exif=exif))
    assert np.abs(reduced - exact).max() <= 3


def decode_in_threads(files: Sequence[bytes], budget: PixelBudget, threads: int) -> list[Any]:
    """Decode files as the pipeline does; return pixels or the type of the error of each."""
    images = [RequestImage("id", str(i), data) for i, data in enumerate(files)]

    def stage(image: RequestImage) -> None:
        image.decoded = decode(image.data, PREPROCESSING, budget)

    with ThreadPoolExecutor(threads) as pool:
        run_all([partial(run_isolated, image, stage) for image in images], pool)
    return [image.decoded.pixels if image.decoded else type(image.error) for image in images]


def test_images_decoded_in_threads_equal_those_decoded_one_by_one() -> None:
    good = [quickly(image) for _, image in islice(photographs(), 12)]
    files, budget = [*good, b"", b"hello" * 100], PixelBudget(10 * MAX_PIXELS)
    in_threads, one_by_one = (decode_in_threads(files, budget, threads) for threads in (4, 1))
    for mine, expected in zip(in_threads[:12], one_by_one[:12], strict=True):
        assert np.array_equal(mine, expected)
    assert in_threads[12:] == [EmptyImage, NotAnImage]


def test_the_images_of_a_request_share_their_pixels_in_all_threads() -> None:
    with Image.open(CAT) as cat:
        budget = PixelBudget(cat.width * cat.height * 3)
    found = decode_in_threads([CAT.read_bytes()] * 8, budget, 4)
    assert sum(each is TooLarge for each in found) == 5
