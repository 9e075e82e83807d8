"""Every kind of pixels is read exactly or rejected by its name, compared with plain arithmetic.

`test_corpus.py` reads the files of `kinds.read`.
"""

import io
import itertools
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from handler.decoding import pillow
from handler.decoding.formats import probe
from handler.errors import DamagedImage, UnsupportedFormat
from handler.settings import Preprocessing
from tests import corpus, kinds
from tests.images import MAX_PIXELS, decoded, encode
from tests.kinds import BLACK_IS_ZERO, CMYK, PALETTE, RGB, WHITE_IS_ZERO, YCBCR

PHOTOGRAPH = np.asarray(corpus.photograph())


def shown(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels that the decoder process reads: uint8 (height, width, 3)."""
    header = probe(data)
    task = pillow.Task(
        Preprocessing(8, 8),
        reduced=False,
        preview_side=10**6,
        names=header.names,
        orientation=header.orientation,
        size=header.size,
        max_pixels=MAX_PIXELS,
    )
    preview = pillow.decode_here(b"".join(header.pieces), task).preview
    assert preview is not None
    assert preview.info == {}
    return np.asarray(preview)


REJECTED = {name: one for name, *one in (*kinds.unread(PHOTOGRAPH[:24, :32]), *kinds.NAMED)}


@pytest.mark.parametrize(("data", "words"), REJECTED.values(), ids=REJECTED)
def test_any_other_kind_is_rejected_by_its_name(data: bytes, words: str) -> None:
    with pytest.raises(UnsupportedFormat, match=words):
        decoded(data)


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
    if extra and extra[0]:
        alpha = levels[..., COLORS[photometric] : COLORS[photometric] + 1]
        return kinds.on_white(colors, alpha, premultiplied=extra[0] == 1)
    return np.broadcast_to(colors, (H, W, 3)).astype(np.uint8)


@pytest.mark.parametrize("photometric", COLORS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_a_tiff_is_read_exactly_as_its_tags_say_or_rejected(bits: int, photometric: int) -> None:
    """All combinations of tags: what is not read exactly is rejected as unsupported, and nothing
    that is sound is called damaged.
    """
    read = 0
    palette = RANDOM.integers(0, 256, (2**bits, 3))
    is_indexed = photometric == PALETTE and bits <= 8
    for extra, order, in_planes, reversed_bits, (compression, strips) in itertools.product(
        EXTRA, "<>", (False, True), (False, True), ((1, 3), (8, 1))
    ):
        count = COLORS[photometric] + len(extra)
        samples = RANDOM.integers(0, 2**bits, (H, W, count))
        if extra[:1] == (1,):
            alpha = samples[..., COLORS[photometric], None]
            samples[..., : COLORS[photometric]] = RANDOM.integers(
                0, alpha + 1, (H, W, COLORS[photometric])
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
            tags=kinds.color_map(palette) if is_indexed else {},
        )
        try:
            pixels = shown(data)
        except UnsupportedFormat:
            continue
        expected = expected_of(samples, bits, photometric, extra, palette)
        # Alpha is divided by and multiplied with again.
        allowed = 1 if extra[:1] == (1,) else 0
        worst = np.abs(pixels.astype(int) - expected).max()
        assert worst <= allowed, (extra, order, in_planes, reversed_bits, compression, strips)
        read += 1
    assert read == READ.get((photometric, bits), 0)


# By photometric and bits, of 128 combinations each: how many are read.
READ = {
    **{(photometric, bits): 16 for photometric in (0, 1, PALETTE) for bits in (1, 2, 4, 8)},
    (1, 8): 32,
    (1, 16): 8,
    (RGB, 8): 32,
    (RGB, 16): 32,
    (CMYK, 8): 8,
    (CMYK, 16): 8,
}


COLOR = ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd")
BILEVEL = ("tiff_ccitt", "group3", "group4")


@pytest.mark.parametrize("compression", [*COLOR, *BILEVEL])
def test_each_accepted_tiff_compression_is_in_pillows_libtiff(compression: str) -> None:
    page = Image.fromarray(PHOTOGRAPH).convert("RGB" if compression in COLOR else "1")
    data = encode(page, "TIFF", compression=compression)
    assert np.array_equal(shown(data), np.asarray(page.convert("RGB")))


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
def test_a_malformed_header_is_reported_as_damage(data: bytes) -> None:
    with pytest.raises(DamagedImage):
        decoded(data)


# --- PNG and JPEG ---


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_only_the_transparent_level_of_a_gray_png_is_white(bits: int) -> None:
    for level in sorted({0, 1, 2**bits // 2, 2**bits - 2, 2**bits - 1}):
        samples = RANDOM.integers(0, 2**bits, (H, W, 1))
        samples[0, :3, 0] = level, level ^ 1, level ^ (2**bits >> 1)
        data = kinds.png(samples, bits, 0, clear=struct.pack(">H", level))
        expected = np.where(samples == level, 255, kinds.to_8_bits(samples, bits))
        assert np.array_equal(shown(data), kinds.gray(expected)), level


def test_arithmetic_coding_changes_no_pixel() -> None:
    """Nor does a repeated quantization table, which ends Pillow's first block within the scan."""
    with Image.open(io.BytesIO(kinds.HUFFMAN_JPEG)) as image:
        expected = np.asarray(image)
    assert expected.std() > 20
    assert len(kinds.ARITHMETIC_JPEGS) == 2
    for data in kinds.ARITHMETIC_JPEGS:
        table = b"\0" + b"\x01" * 64  # the file's own table 0 follows, and counts
        count = (65_536 - len(data) // 2) // len(table)
        padded = data[:2] + kinds.segment(0xDB, table * count) + data[2:]
        assert len(data) < 65_536 < len(padded)
        for each in (data, padded):
            assert np.array_equal(shown(each), expected)


# --- Color profiles ---


def test_no_color_profile_changes_the_pixels_or_stays_with_them() -> None:
    """The tutorial's transform knows no profiles, and an explanation's PNG would contain them."""
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    data = encode(Image.fromarray(PHOTOGRAPH), icc_profile=xyz)
    assert np.array_equal(shown(data), PHOTOGRAPH)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(3_000_000)
    rgb = Image.fromarray(PHOTOGRAPH)
    modes = (("TIFF", "RGB"), ("TIFF", "CMYK"), ("JPEG", "CMYK"), ("WEBP", "RGBA"))
    for file_format, mode in modes:
        data = encode(rgb.convert(mode), file_format, icc_profile=profile)
        assert len(data) > 3_000_000
        photo = decoded(data, preview_side=1024)
        assert photo.preview is not None
        assert photo.preview.info == {}
