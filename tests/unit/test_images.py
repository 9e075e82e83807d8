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
    ClientError,
    DamagedImage,
    EmptyImage,
    NotAnImage,
    TooLarge,
    UnsupportedFormat,
)
from handler.request import RequestImage, run_isolated
from handler.settings import Preprocessing
from scripts.build.export import Normalized
from scripts.samples import CAT
from tests.pictures import encode, generated, large_jpegs, photographs

PREPROCESSING = Preprocessing()
MAX_PIXELS = 64_000_000

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
    return encode(image, compress_level=1)


def test_preprocessing_equals_the_tutorials_bit_for_bit(note: list[str]) -> None:
    compared = {"exact": 0, "long": 0}
    worst = {"exact": 0.0, "long": 0.0}
    for _, image in (*photographs(), *generated()):
        mine = normalized(decode(quickly(image), PREPROCESSING, PixelBudget(MAX_PIXELS)).pixels)
        kind = "long" if is_very_long(image) else "exact"
        difference = (mine - TUTORIAL(image.convert("RGB"))).abs()
        compared[kind] += 1
        worst[kind] = max(worst[kind], float((difference * STD).max()) * 255)
    note.append(
        f"preprocessing: {compared['exact']} images against the tutorial's transform, worst "
        f"difference {worst['exact']:.1f} of 255 levels; {compared['long']} more than 61 times "
        f"as long as wide, worst {worst['long']:.2f}"
    )
    assert compared["exact"] >= 200
    assert worst["exact"] == 0
    assert worst["long"] <= 1.01  # a level, and float32's rounding of it


def is_very_long(image: Image.Image) -> bool:
    """The tutorial would make more than 4 million pixels of it; see `resize_and_crop`."""
    return 255**2 * max(image.size) / min(image.size) > 4_000_000


@pytest.mark.parametrize("size", [(451, 300), (1500, 1000)])
def test_of_a_jpeg_without_its_end_the_model_must_see_what_the_whole_one_shows(
    size: tuple[int, int],
) -> None:
    """Its end marker may be missing, and a cut-off scan is rejected if that can be seen."""
    photograph = Image.open(CAT).convert("RGB").resize(size)
    for whole in (
        encode(photograph, "JPEG", progressive=True),
        encode(photograph, "JPEG", progressive=True, quality=95),
        encode(photograph, "JPEG"),
    ):
        expected = decode(whole, PREPROCESSING, PixelBudget(MAX_PIXELS)).pixels
        for isolated in (False, True):
            for missing in (1, 2):
                data = whole[:-missing]
                for tail in (b"", bytes(5)):
                    decoded = decode(
                        data + tail, PREPROCESSING, PixelBudget(MAX_PIXELS), isolated=isolated
                    )
                    assert np.array_equal(decoded.pixels, expected)
        rejected = 0
        for missing in (3, 10, 100, 1_000, *range(len(whole) // 20, len(whole), len(whole) // 20)):
            try:
                decoded = decode(whole[:-missing], PREPROCESSING, PixelBudget(MAX_PIXELS))
            except DamagedImage:
                rejected += 1
            else:
                assert np.array_equal(decoded.pixels, expected), missing
        assert rejected >= 19


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (2, 1500), (3000, 10), (4, 2000)])
def test_very_long_images_stay_within_two_levels_of_the_tutorial(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    mine = decode(encode(image), PREPROCESSING, PixelBudget(MAX_PIXELS)).pixels.astype(int)
    geometry = transforms.Compose(TUTORIAL.transforms[:2])
    theirs = np.asarray(geometry(image)).transpose(2, 0, 1).astype(int)
    assert np.abs(mine - theirs).max() <= 2


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", EmptyImage, "no bytes"),
        (b"hello" * 100, NotAnImage, "not an image. Accepted are: JPEG"),
        (b"%PDF-1.7 ...", UnsupportedFormat, "a PDF file. Accepted are: JPEG"),
        # Pillow could read it.
        (encode(Image.new("RGB", (10, 10)), "PPM"), UnsupportedFormat, "has an unsupported format"),
    ],
)
def test_what_is_no_accepted_image_is_named(
    data: bytes, error: type[ClientError], words: str
) -> None:
    with pytest.raises(error, match=words):
        decode(data, PREPROCESSING, PixelBudget(MAX_PIXELS))


def test_pixels_are_counted_before_they_are_decoded() -> None:
    header_only = encode(Image.new("RGB", (3000, 2000)))[:60]
    with pytest.raises(TooLarge, match=r"3000 x 2000 pixels; .* may have 1,000,000 together"):
        decode(header_only, PREPROCESSING, PixelBudget(1_000_000))


def test_the_images_of_a_request_share_their_pixels() -> None:
    budget = PixelBudget(150_000)  # the cat has 135,300
    decode(CAT.read_bytes(), PREPROCESSING, budget)
    with pytest.raises(
        TooLarge, match="451 x 300 pixels; the images of a request may have 150,000"
    ):
        decode(CAT.read_bytes(), PREPROCESSING, budget)


@pytest.mark.slow
def test_large_jpegs_decoded_at_reduced_size_stay_within_3_levels(note: list[str]) -> None:
    worst, least_psnr, count = 0, float("inf"), 0
    for jpeg in large_jpegs():
        reduced, exact = (
            decode(jpeg, PREPROCESSING, PixelBudget(MAX_PIXELS), reduced=flag).pixels.astype(int)
            for flag in (True, False)
        )
        assert not np.array_equal(reduced, exact), "this image was not reduced"
        difference = np.abs(reduced - exact)
        count += 1
        worst = max(worst, int(difference.max()))
        least_psnr = min(least_psnr, 10 * np.log10(255**2 / (difference**2).mean()))
    note.append(
        f"large JPEGs at reduced size: {count} against whole decoding, worst difference {worst} "
        f"of 255 levels, least PSNR {least_psnr:.1f} dB"
    )
    assert count >= 20
    assert worst <= 3
    assert least_psnr >= 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_turned_jpeg_is_cut_where_the_whole_one_is(orientation: int) -> None:
    """Its sides are no multiples of 8: the smaller copy has more than the image at two edges."""
    with Image.open(CAT) as cat:
        large = cat.convert("RGB").resize((2557, 3001))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    jpeg = encode(large, "JPEG", quality=92, exif=exif)
    reduced, exact = (
        decode(jpeg, PREPROCESSING, PixelBudget(MAX_PIXELS), reduced=flag).pixels.astype(int)
        for flag in (True, False)
    )
    assert not np.array_equal(reduced, exact)
    assert np.abs(reduced - exact).max() <= 3


def decode_in_threads(files: Sequence[bytes], budget: PixelBudget, threads: int) -> list[Any]:
    """Decode files as the pipeline does; return pixels or the type of the error of each."""
    images = [RequestImage("id", str(i), data) for i, data in enumerate(files)]

    def stage(image: RequestImage) -> None:
        image.decoded = decode(image.data, PREPROCESSING, budget)

    with ThreadPoolExecutor(threads) as pool:
        run_all([partial(run_isolated, image, stage) for image in images], pool)
    return [image.decoded.pixels if image.decoded else type(image.error) for image in images]


def test_images_decoded_in_threads_are_those_decoded_one_by_one() -> None:
    good = [quickly(image) for _, image in islice(photographs(), 12)]
    files, budget = [*good, b"", b"hello" * 100], PixelBudget(10 * MAX_PIXELS)
    in_threads, one_by_one = (decode_in_threads(files, budget, threads) for threads in (4, 1))
    for mine, expected in zip(in_threads[:12], one_by_one[:12], strict=True):
        assert np.array_equal(mine, expected)
    assert in_threads[12:] == [EmptyImage, NotAnImage]


def test_threads_share_one_budget() -> None:
    with Image.open(CAT) as cat:
        budget = PixelBudget(cat.width * cat.height * 3)
    found = decode_in_threads([CAT.read_bytes()] * 8, budget, 4)
    assert sum(each is TooLarge for each in found) == 5
