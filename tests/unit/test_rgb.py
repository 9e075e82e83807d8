"""Every kind of pixels is read exactly or refused by its name, against plain arithmetic."""

import io
import itertools
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from handler.errors import DamagedImage, UnsupportedFormat
from handler.formats import survey
from handler.images import PixelBudget, decode, decode_photo
from handler.rgb import upright
from handler.settings import Preprocessing
from tests import corpus, kinds
from tests.kinds import BLACK_IS_ZERO, CIELAB, CMYK, PALETTE, RGB, WHITE_IS_ZERO, YCBCR
from tests.pictures import encode

PHOTOGRAPH = np.asarray(corpus.photograph())
MAX_PIXELS = 64_000_000


def shown(data: bytes) -> NDArray[np.uint8]:
    """What the handler makes of a file: uint8 (height, width, 3)."""
    assert survey(data) is not None
    with Image.open(io.BytesIO(data)) as image:
        result = upright(image, data)
        assert result.mode == "RGB"
        assert result.info == {}
        return np.asarray(result)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(data, expected, id=name)
        for name, data, expected in kinds.read(PHOTOGRAPH[:120, :160])
    ],
)
def test_a_kind_that_is_read_shows_what_arithmetic_says(
    data: bytes, expected: NDArray[np.uint8]
) -> None:
    assert np.array_equal(shown(data), expected)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(data, words, id=name)
        for name, data, words in (*kinds.unread(PHOTOGRAPH[:24, :32]), *kinds.NAMED)
    ],
)
def test_any_other_kind_is_rejected_by_its_name(data: bytes, words: str) -> None:
    with pytest.raises(UnsupportedFormat, match=words):
        decode(data, Preprocessing(), PixelBudget(MAX_PIXELS))


# --- TIFF, all of it ---

H, W = 7, 13  # rows that do not end at a byte
RANDOM = np.random.default_rng(1)
COLORS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
EXTRA: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 2))


def expected_of(
    samples: kinds.Samples,
    bits: int,
    photometric: int,
    extra: tuple[int, ...],
    palette: kinds.Samples,
) -> NDArray[np.uint8]:
    levels = kinds.to_8_bits(samples, bits)
    colors: kinds.Samples = levels[..., : COLORS[photometric]]
    match photometric:
        case kinds.WHITE_IS_ZERO:
            colors = 255 - colors
        case kinds.PALETTE:
            colors = palette[samples[..., 0]]
        case kinds.CMYK:
            colors = kinds.from_cmyk(colors)
        case kinds.YCBCR:
            colors = kinds.from_ycbcr(colors)
    if extra and extra[0]:
        alpha = levels[..., COLORS[photometric] : COLORS[photometric] + 1]
        return kinds.on_white(colors, alpha, premultiplied=extra[0] == 1)
    return np.broadcast_to(colors, (H, W, 3)).astype(np.uint8)


@pytest.mark.parametrize("photometric", COLORS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_no_tiff_is_read_otherwise_than_its_tags_say(bits: int, photometric: int) -> None:
    """All combinations of tags: what is not read exactly is rejected as unsupported, and nothing
    that is sound is called damaged.
    """
    read = 0
    palette = RANDOM.integers(0, 256, (2**bits, 3))
    tags = {530: kinds.shorts(1, 1)}
    if photometric == PALETTE and bits <= 8:
        tags |= kinds.color_map(palette)
    for extra, order, in_planes, reversed_bits, compression, strips in itertools.product(
        EXTRA, "<>", (False, True), (False, True), (1, 8), (1, 3)
    ):
        count = COLORS[photometric] + len(extra)
        samples = RANDOM.integers(0, 2**bits, (H, W, count))
        if extra[:1] == (1,):
            most = samples[..., COLORS[photometric], None]
            samples[..., : COLORS[photometric]] = RANDOM.integers(
                0, most + 1, (H, W, COLORS[photometric])
            )
        data = kinds.tiff(
            samples,
            bits,
            photometric,
            order=order,
            in_planes=in_planes and count > 1,
            reversed_bits=reversed_bits,
            extra=extra,
            compression=compression,
            strips=strips,
            tags=tags,
        )
        try:
            pixels = shown(data)
        except UnsupportedFormat:
            continue
        expected = expected_of(samples, bits, photometric, extra, palette)
        # Alpha is divided by and multiplied with again; YCbCr is computed in whole numbers.
        allowed = 1 if extra[:1] == (1,) or photometric == YCBCR else 0
        worst = np.abs(pixels.astype(int) - expected).max()
        assert worst <= allowed, (extra, order, in_planes, reversed_bits, compression, strips)
        read += 1
    assert read == READ.get((photometric, bits), 0)


# By photometric and bits, of 256 combinations each: how many are read.
READ = {
    **{(photometric, bits): 32 for photometric in (0, 1, PALETTE) for bits in (1, 2, 4)},
    (0, 8): 32,
    (1, 8): 64,
    (RGB, 8): 112,
    (PALETTE, 8): 56,
    (CMYK, 8): 48,
    (YCBCR, 8): 16,
    (1, 12): 8,
    (0, 16): 8,
    (1, 16): 16,
    (RGB, 16): 64,
    (CMYK, 16): 16,
}


def test_subsampled_colors_stand_where_they_belong() -> None:
    data, expected = kinds.subsampled(PHOTOGRAPH)
    assert np.abs(shown(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        *itertools.product(
            ["RGB"], ["tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd"]
        ),
        *itertools.product(["1"], ["tiff_ccitt", "group3", "group4"]),
    ],
)
def test_each_compression_that_is_read_is_in_pillows_libtiff(mode: str, compression: str) -> None:
    page = Image.fromarray(PHOTOGRAPH).convert(mode)
    data = encode(page, "TIFF", compression=compression)
    assert np.array_equal(shown(data), np.asarray(page.convert("RGB")))


def test_cielab_is_turned_into_srgb() -> None:
    """Against the formulas of CIE 15 and IEC 61966-2-1, and Bradford's adaptation to D65."""
    lightness, a, b = 55.0, np.array([-40, -10, 0, 20, 45]), np.array([30, -20, 0, 25, -30])
    coded = [np.full(5, round(lightness * 2.55)), a % 256, b % 256]
    data = kinds.tiff(np.stack(coded, axis=1)[None], 8, CIELAB, strips=1)
    y = (coded[0][0] / 2.55 + 16) / 116
    f = np.stack([y + a / 500, np.full(5, y), y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    xyz *= np.array([0.9642, 1, 0.8249])[:, None]
    to_linear = np.array(
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    linear = (to_linear @ xyz).clip(0, 1)
    coded_rgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    assert np.abs(shown(data)[0] - coded_rgb.T * 255).max() < 2.5


@pytest.mark.parametrize(
    "data",
    [
        b"II*\0\xff\xff\xff\xff",
        b"II+\0\x08\0\0\0" + b"\xff" * 8,
        b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x02\0\4\0\0\x03\0\xff\xff\xff\xff" * 9,
        b"II*\0\x08\0\0\0\0\0",
        b"II*\0",
        b"BM" + bytes(60),
        b"\xff\xd8" + b"\xff" * 100,
    ],
)
def test_a_header_without_sense_is_damage_not_a_kind(data: bytes) -> None:
    with pytest.raises(DamagedImage):
        decode(data, Preprocessing(), PixelBudget(MAX_PIXELS))


# --- PNG and JPEG ---


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_each_clear_level_of_a_grey_png_is_white_and_no_other(bits: int) -> None:
    for level in sorted({0, 1, 2**bits // 2, 2**bits - 2, 2**bits - 1}):
        samples = RANDOM.integers(0, 2**bits, (H, W, 1))
        samples[0, :3, 0] = level, level ^ 1, level ^ (2**bits >> 1)
        data = kinds.png(samples, bits, 0, clear=struct.pack(">H", level))
        expected = np.where(samples == level, 255, kinds.to_8_bits(samples, bits))
        assert np.array_equal(shown(data), kinds.grey(expected)), level


def test_a_clear_color_of_16_bits_is_compared_in_all_of_them() -> None:
    samples = np.full((600, 1000, 3), 0x1234)  # more than a band
    samples[300:, :, 1] = 0x1235
    data = kinds.png(samples, 16, 2, clear=struct.pack(">HHH", *[0x1234] * 3))
    expected = np.full((600, 1000, 3), 0x12)
    expected[:300] = 255
    assert np.array_equal(shown(data), expected)


def test_arithmetic_coding_changes_no_pixel() -> None:
    with Image.open(io.BytesIO(kinds.HUFFMAN_JPEG)) as image:
        expected = np.asarray(image)
    assert expected.std() > 20
    assert len(kinds.ARITHMETIC_JPEGS) == 2
    for data in kinds.ARITHMETIC_JPEGS:
        assert np.array_equal(shown(data), expected)


# --- What goes on with the pixels ---


def test_no_profile_nor_text_goes_on_with_the_pixels() -> None:
    """They would be written into an explanation's PNG, whose size they then decide."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(3_000_000)
    rgb = Image.fromarray(PHOTOGRAPH)
    modes = (("TIFF", "RGB"), ("TIFF", "CMYK"), ("JPEG", "CMYK"), ("WEBP", "RGBA"))
    for file_format, mode in modes:
        data = encode(rgb.convert(mode), file_format, icc_profile=profile)
        assert len(data) > 3_000_000
        photo = decode_photo(data, Preprocessing(), PixelBudget(MAX_PIXELS), 1024)
        assert photo.preview is not None
        assert photo.preview.info == {}


def test_pixels_are_those_of_the_file_whatever_its_profile() -> None:
    """The tutorial's transform knows no profiles, and a model was trained without."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    data = encode(Image.fromarray(PHOTOGRAPH), icc_profile=profile)
    assert np.array_equal(shown(data), PHOTOGRAPH)
