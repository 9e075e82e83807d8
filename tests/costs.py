"""Bodies that cost the most time and memory: of each kind the largest that the frontend accepts."""

import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

from benchmarks.images import noise as incompressible
from handler.settings import MAX_REQUEST_BYTES
from tests.corpus import jpeg_of_scans, jpeg_with_size, photograph
from tests.images import encode
from tests.kinds import (
    BLACK_IS_ZERO,
    bmp,
    chunk,
    longs,
    png,
    png_header,
    segment,
    shorts,
    tiff,
)

pillow_heif.register_heif_opener()

# Without a form's own lines.
LARGEST = MAX_REQUEST_BYTES - 4096

# The kinds that come closest to the limits of time and memory.
WORST = (
    "JPEG: padding in a progressive scan",
    "JPEG: 900 x 65,000",
    "PNG: 49 megapixels of RGB",
    "PNG: 25 megapixels of 64 bits",
    "BMP: 8 megapixels of runs of 1",
    "WebP: 12 megapixels",
    "TIFF: text",
    "AVIF: noise",
)

# By name, the function that makes the largest body of a kind.
Kinds = dict[str, Callable[[], bytes]]


def kinds() -> Kinds:
    """Return all kinds."""
    parts = (jpegs(), pngs(), webps(), others(), simple())
    return dict(chain.from_iterable(part.items() for part in parts))


def filled(head: bytes, part: bytes, tail: bytes = b"") -> bytes:
    """Repeat `part` between head and tail until the body has the largest size."""
    return head + part * ((LARGEST - len(head) - len(tail)) // len(part)) + tail


noise = cache(incompressible)


@cache
def small(file_format: str, **options: Any) -> bytes:
    """Return the photograph, 320 x 240."""
    return encode(photograph(), file_format, **options)


def flat(file_format: str, width: int, height: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    """Return an image of one color."""
    color = {"RGB": (9, 99, 9), "RGBA": (1, 2, 3, 100)}.get(mode, 0)
    return encode(Image.new(mode, (width, height or width), color), file_format, **options)


# --- JPEG ---


def in_jpeg(part: bytes) -> bytes:
    """Repeat segments before those of the image."""
    jpeg = small("JPEG")
    return filled(jpeg[:2], part, jpeg[2:])


def _many_scans(width: int, height: int, scans: int) -> bytes:
    return jpeg_with_size(jpeg_of_scans(small("JPEG", progressive=True), scans), width, height)


Entry = tuple[int, int, int, int]


def _directory(
    entries: Sequence[Entry], tail: bytes = b"", next_: int = 0, order: str = "<"
) -> bytes:
    """Return a directory of TIFF or Exif with these values, which may have false offsets."""
    head = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order]
    packed = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    next_page = struct.pack(f"{order}I", next_)
    return head + struct.pack(f"{order}H", len(entries)) + packed + next_page + tail


_exif = partial(_directory, order=">")


def jpegs() -> Kinds:
    """Data in a scan, before and after it, and slow compression."""
    exif, x65 = b"Exif\0\0", b"x" * 65_000
    circle = _exif([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0x014A, 4, 1, 8)], next_=8)
    tags = [(i, 7, 65_000, 8) for i in range(5400)]
    pages = struct.pack(">HHIIHHII", 0xB001, 4, 1, 4000, 0xB002, 7, 64_000, 38)
    mpf = b"MPF\0MM\0*\0\0\0\x08\0\x02" + pages
    progressive = small("JPEG", progressive=True)
    scan = progressive[: progressive.rindex(b"\xff\xda") + 14]
    jpeg = small("JPEG")
    tables = jpeg[jpeg.index(b"\xff\xc4") : jpeg.index(b"\xff\xda")]
    photoshop = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000
    parts = {
        "tiny Exif segments": segment(0xE1, exif + b"x" * 8),
        "four-byte segments": segment(0xE5),
        "comments": segment(0xFE, b"x" * 60_000),
        "profile of 20 MB": segment(0xE2, b"ICC_PROFILE\0\1\1" + x65),
        "extended XMP": segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + x65),
        "Photoshop blocks": segment(0xED, photoshop),
        "Exif whose tags each take all of it": segment(0xE1, exif + _exif(tags)),
        "Exif that points at itself": segment(0xE1, exif + circle),
        "4,000 images announced (MPO)": segment(0xE2, mpf + bytes(65_000)),
        "padding before a marker": b"\xff",
        "restart markers between segments": b"\xff\xd0",
        "bytes between segments": b"\xe0",
        "tables": tables,
    }
    q60 = partial(flat, "JPEG", quality=60)
    return {f"JPEG: {name}": partial(in_jpeg, part) for name, part in parts.items()} | {
        "JPEG: images behind the image": lambda: filled(jpeg, jpeg),
        "JPEG: film behind the image": lambda: filled(progressive, b"\xff\xda\0\1"),
        "JPEG: noise of 20 MB": lambda: encode(noise(2350), "JPEG", quality=99, subsampling=0),
        "JPEG: 100 scans of 12 megapixels": lambda: _many_scans(4000, 3000, 90),
        "JPEG: 500 scans": lambda: _many_scans(2000, 2000, 500),
        "JPEG: arithmetic coding": lambda: jpeg_with_size(
            encode(noise(2400), "JPEG", quality=100), 8000, 8000, 0xC9
        ),
        "JPEG: 64 megapixels": lambda: q60(8000),
        "JPEG: 64 megapixels, a restart each block": lambda: q60(8000, restart_marker_blocks=1),
        "JPEG: 64 megapixels, progressive": lambda: q60(8000, progressive=True),
        "JPEG: 50 megapixels of CMYK": lambda: q60(7070, mode="CMYK"),
        "JPEG: 900 x 65,000": lambda: q60(900, 65_000),
        "JPEG: 64 megapixels without data": lambda: jpeg_with_size(jpeg, 8000, 8000),
        "JPEG: stuffed bytes, progressive": lambda: filled(scan, b"\xff\0", b"\xff\xd9"),
        "JPEG: padding in a progressive scan": lambda: filled(scan, b"\xff", b"\xff\xd9"),
    }


# --- PNG ---


@cache
def _zeros(length: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    packed = b"".join(packer.compress(block) for _ in range(length >> 20))
    return packed + packer.compress(bytes(length & 0xFFFFF)) + packer.flush()


def black_png(width: int, height: int, bits: int, color_type: int, interlaced: int = 0) -> bytes:
    """Return a PNG with the highest compression ratio."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    length = height * (1 + width * channels * bits // 8) + (height * 8 if interlaced else 0)
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if color_type == 3 else b""
    pixels = chunk(b"IDAT", _zeros(length)) + chunk(b"IEND", b"")
    return png_header(width, height, bits, color_type, interlaced) + palette + pixels


def _in_png(*chunks: tuple[bytes, bytes]) -> bytes:
    whole, part = small("PNG"), b"".join(chunk(*each) for each in chunks)
    return filled(whole[:33], part, whole[33:])


def _empty_blocks() -> bytes:
    """Return empty blocks of deflate with two Huffman trees."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packer.compress(bytes(np.random.default_rng(3).integers(0, 255, 400, np.uint8) % 97))
    return packer.flush(zlib.Z_FULL_FLUSH)


def pngs() -> Kinds:
    """Chunks, and each kind of pixels."""
    packed = zlib.compress(bytes(50_000_000), 9)
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b"tiff:Orientation=" * 600_000
    tags = [(i, 7, 9_000_000, 8) for i in range(65_000)]
    parts = {
        "empty chunks": (b"teSt", b""),
        "empty chunks of pixels": (b"IDAT", b""),
        "text that unpacks to gigabytes": (b"zTXt", b"Comment\0\0" + packed),
        "profiles that unpack to gigabytes": (b"iCCP", b"ICC\0\0" + packed),
        "text": (b"tEXt", b"Comment\0" + b"x" * 10_000_000),
        "XMP": (b"iTXt", xmp),
        "palettes": (b"PLTE", bytes(768)),
        "Exif whose tags each take all of it": (b"eXIf", _exif(tags)),
    }
    pixels = {
        "64 megapixels of RGBA": (8000, 8000, 8, 6),
        "49 megapixels of RGB": (7000, 7000, 8, 2),
        "25 megapixels of 64 bits": (5000, 5000, 16, 6),
        "36 megapixels, interlaced": (6000, 6000, 8, 2, 1),
        "64,000,000 x 1": (64_000_000, 1, 8, 0),
        "1 x 64,000,000": (1, 64_000_000, 8, 0),
    }
    # Fixed code, no symbols, three bits and an end of block: four blocks in five bytes.
    deflated = {"empty blocks": b"\0\0\0\xff\xff", "blocks with codes": _empty_blocks()}
    return {
        **{f"PNG: {name}": partial(_in_png, part) for name, part in parts.items()},
        **{f"PNG: {name}": partial(black_png, *fields) for name, fields in pixels.items()},
        **{
            f"PNG: {name} of deflate": partial(_png_of_blocks, block)
            for name, block in deflated.items()
        },
        "PNG: animation": lambda: _in_png(
            (b"acTL", struct.pack(">II", 400_000, 0)), (b"fcTL", bytes(26)), (b"fdAT", bytes(10))
        ),
        "PNG: tiny chunks of pixels": lambda: (
            png_header(5000, 5000, 8, 2) + chunk(b"IDAT", b"\0") * 1_500_000
        ),
        "PNG: noise of 19 MB": lambda: png(np.asarray(noise(2520)), 8, 2),
        "PNG: noise, interlaced": lambda: png(np.asarray(noise(2500)), 8, 2, interlaced=True),
    }


def _png_of_blocks(block: bytes) -> bytes:
    return png_header(1, 1, 8, 0) + chunk(b"IDAT", filled(b"\x78\x01", block))


# --- WebP ---


def webps() -> Kinds:
    """Metadata and pixels."""
    tags = _exif([(i, 7, 9_000_000, 8) for i in range(65_000)], bytes(10_000_000))
    large = noise(2000).resize((4000, 3000), Image.Resampling.NEAREST)
    fast = partial(encode, file_format="WEBP", method=0)
    return {
        "WebP: Exif whose tags each take all of it": lambda: small("WEBP", exif=tags),
        "WebP: 64 megapixels, transparent": lambda: flat(
            "WEBP", 8000, mode="RGBA", lossless=True, method=0
        ),
        "WebP: 12 megapixels": lambda: flat("WEBP", 4000, 3000, method=0),
        "WebP: 12 megapixels of noise": lambda: fast(large, quality=100)[:LARGEST],
        "WebP: noise, lossless": lambda: fast(noise(2600), lossless=True, quality=0)[:LARGEST],
    }


# --- Formats of the decoder process ---


def bmp_of_runs(side: int, run: bytes) -> bytes:
    """Return a run-length encoded BMP."""
    pixels = (run * (side // run[0]) + b"\0\0") * side
    palette = np.zeros((256, 3), int)
    head = bytearray(bmp(np.zeros((1, 1, 1), int), 8, palette=palette, compression=1))
    head = head[: 14 + 40 + 4 * 256]
    struct.pack_into("<I", head, 2, len(head) + len(pixels))
    struct.pack_into("<ii", head, 18, side, side)
    struct.pack_into("<I", head, 34, len(pixels))
    return bytes(head) + pixels[:LARGEST]


def others() -> Kinds:
    """Return the slowest and the largest of each format; the kernel limits whatever they do."""
    gif = small("GIF")
    canvas = b"GIF89a" + struct.pack("<HHBBB", 6000, 6000, 0xF7, 0, 0) + bytes(768)
    frame = b"," + struct.pack("<HHHHBB", 0, 0, 6000, 6000, 0, 8) + b"\xff" + b"\0" * 255
    size = [(256, 4, 1, 64), (257, 4, 1, 64), (262, 3, 1, 1)]
    texts = [*size, *((40_000 + i, 2, 19_000_000, 8) for i in range(50))]
    lies = [*size, *((40_000 + i, 7, 19_000_000, 8) for i in range(20_000))]
    tiles = {
        **{322: shorts(16), 323: shorts(16)},
        **{324: longs(*[8] * 160_000), 325: longs(*[256] * 160_000)},
    }
    return {
        "GIF: comments": lambda: filled(gif[:781], b"!\xfe\1x\0", gif[781:]),
        "GIF: 64 megapixels": lambda: flat("GIF", 8000, mode="P"),
        "GIF: codes that clear": lambda: filled(canvas + frame, b"\xff" + b"\0\1" * 127 + b"\0"),
        "BMP: 64 megapixels of runs": lambda: bmp_of_runs(7905, b"\xff\1"),
        "BMP: 8 megapixels of runs of 1": lambda: bmp_of_runs(2800, b"\1\1"),
        "TIFF: tags that each take all of it": lambda: filled(_directory(lies), b"\0"),
        "TIFF: text": lambda: filled(_directory(texts), b"a"),
        "TIFF: 36 megapixels, LZMA": lambda: flat("TIFF", 6000, mode="L", compression="lzma"),
        "TIFF: tiles": lambda: tiff(
            [bytes(256)],
            8,
            BLACK_IS_ZERO,
            size=(6400, 6400, 1),
            tags=tiles,
            without=(273, 278, 279),
        ),
        "AVIF: 64 megapixels": lambda: flat("AVIF", 8000, speed=10),
        "AVIF: noise": lambda: encode(noise(1400), "AVIF", speed=10, quality=100),
        "HEIC: 12 megapixels": lambda: flat("HEIF", 4000, 3000, quality=1),
        "HEIC: noise": lambda: encode(noise(700), "HEIF", quality=100),
        "HEIC: empty boxes": _heic_of_boxes,
    }


def _heic_of_boxes() -> bytes:
    whole = small("HEIF")
    (length,) = struct.unpack_from(">I", whole)
    return filled(whole[:length], struct.pack(">I4s", 8, b"free"), whole[length:])


# --- The most that a worker decodes in its own process ---


def simple() -> Kinds:
    """Scans, bytes, segments and pixels."""
    part = segment(0xE1, b"Exif\0\0" + _exif([(i, 7, 65_000, 8) for i in range(5400)]))
    jpeg = small("JPEG")
    return {
        "in the worker: JPEG of 48 scans": lambda: _many_scans(2000, 2000, 38),
        "in the worker: JPEG of 10 MB": lambda: encode(noise(2500), "JPEG", quality=98),
        "in the worker: Exif in 180 segments": lambda: jpeg[:2] + part * 180 + jpeg[2:],
        "in the worker: PNG of 5,000 chunks": lambda: (
            small("PNG")[:33] + chunk(b"eXIf", b"II*\0") * 4990 + small("PNG")[33:]
        ),
        "in the worker: blocks of deflate": lambda: (
            png_header(1, 1, 8, 0) + chunk(b"IDAT", b"\x78\x01" + _empty_blocks() * 16_000)
        ),
        "in the worker: WebP of 4 MB": lambda: encode(noise(1800), "WEBP", method=0, quality=99),
    }


# --- Cost ---


def kilobytes(name: str) -> int:
    """Return a value of `/proc/self/status` in kB, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))
