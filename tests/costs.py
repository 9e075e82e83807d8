"""Bodies that cost as much as they can: of each kind the largest that the frontend takes.

Nothing is committed; all are made here in seconds. `Probe` measures what deciding about one costs.
"""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

from handler.settings import MAX_REQUEST_BYTES
from tests.corpus import _tiff_of_pages, chunk, photograph, png
from tests.pictures import encode

pillow_heif.register_heif_opener()

# Less a form's own lines.
LARGEST = MAX_REQUEST_BYTES - 4096

Kind = tuple[str, Callable[[], bytes]]


def filled(head: bytes, part: bytes, tail: bytes = b"") -> bytes:
    """As many times `part` between the two as the largest body holds."""
    return head + part * ((LARGEST - len(head) - len(tail)) // len(part)) + tail


@cache
def noise(side: int) -> Image.Image:
    """A picture that nothing can compress."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8))


@cache
def small(file_format: str, **options: Any) -> bytes:
    """The photograph, 320 x 240."""
    return encode(photograph(), file_format, **options)


def kinds() -> Iterator[Kind]:
    """Name of each kind, and what makes its largest body."""
    yield from _jpegs()
    yield from _more_jpegs()
    yield from _pngs()
    yield from _gifs_and_bmps()
    yield from _webps()
    yield from _tiffs()
    yield from _isos()


# --- JPEG ---


def segment(marker: int, content: bytes = b"") -> bytes:
    """One segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _in_jpeg(part: bytes) -> bytes:
    jpeg = small("JPEG")
    return filled(jpeg[:2], part, jpeg[2:])


def _with_size(jpeg: bytes, width: int, height: int, marker: int | None = None) -> bytes:
    at = next(i for i in (jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2")) if i > 0)
    kind = bytes([marker]) if marker else jpeg[at + 1 : at + 2]
    return (
        jpeg[: at + 1]
        + kind
        + jpeg[at + 2 : at + 5]
        + struct.pack(">HH", height, width)
        + jpeg[at + 9 :]
    )


def _many_scans(width: int, height: int, scans: int) -> bytes:
    jpeg = small("JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return _with_size(jpeg[:-2] + jpeg[last:-2] * scans + b"\xff\xd9", width, height)


def _exif(entries: list[tuple[int, int, int, int]], tail: bytes = b"", next_: int = 0) -> bytes:
    packed = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return (
        b"MM\0*\0\0\0\x08"
        + struct.pack(">H", len(entries))
        + packed
        + struct.pack(">I", next_)
        + tail
    )


def _jpegs() -> Iterator[Kind]:
    exif = b"Exif\0\0"
    yield "JPEG: tiny Exif segments", lambda: _in_jpeg(segment(0xE1, exif + b"x" * 8))
    yield "JPEG: four-byte segments", lambda: _in_jpeg(segment(0xE5))
    yield "JPEG: comments", lambda: _in_jpeg(segment(0xFE, b"x" * 60_000))
    yield (
        "JPEG: profile of 20 MB",
        lambda: _in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 65_000)),
    )
    yield (
        "JPEG: extended XMP",
        lambda: _in_jpeg(segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 65_000)),
    )
    yield (
        "JPEG: Photoshop blocks",
        lambda: _in_jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000)),
    )
    tags = [(i, 7, 65_000, 8) for i in range(5400)]
    yield (
        "JPEG: Exif whose tags each take all of it",
        lambda: _in_jpeg(segment(0xE1, exif + _exif(tags))),
    )
    circle = _exif([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0x014A, 4, 1, 8)], next_=8)
    yield "JPEG: Exif that points at itself", lambda: _in_jpeg(segment(0xE1, exif + circle))
    mpf = b"MPF\0MM\0*\0\0\0\x08\0\x02" + struct.pack(
        ">HHIIHHII", 0xB001, 4, 1, 4000, 0xB002, 7, 64_000, 38
    )
    yield (
        "JPEG: 4,000 pictures announced (MPO)",
        lambda: _in_jpeg(segment(0xE2, mpf + b"\0" * 65_000)),
    )
    yield "JPEG: pictures behind the picture", lambda: filled(small("JPEG"), small("JPEG"))
    yield (
        "JPEG: film behind the picture",
        lambda: filled(small("JPEG", progressive=True), b"\xff\xda\0\1"),
    )
    yield "JPEG: padding before a marker", lambda: _in_jpeg(b"\xff")
    yield "JPEG: restart markers between segments", lambda: _in_jpeg(b"\xff\xd0")
    yield "JPEG: bytes between segments", lambda: _in_jpeg(b"\xe0")
    tables = small("JPEG")
    table = tables[tables.index(b"\xff\xc4") : tables.index(b"\xff\xda")]
    yield "JPEG: tables", lambda: _in_jpeg(table)


def _more_jpegs() -> Iterator[Kind]:
    yield "JPEG: noise of 20 MB", lambda: encode(noise(2350), "JPEG", quality=99, subsampling=0)
    yield "JPEG: 100 scans of 64 megapixels", lambda: _many_scans(8000, 8000, 90)
    yield "JPEG: 100 scans of 12 megapixels", lambda: _many_scans(4000, 3000, 90)
    yield "JPEG: 100 scans of 4 megapixels", lambda: _many_scans(2000, 2000, 90)
    yield "JPEG: 500 scans", lambda: _many_scans(2000, 2000, 500)
    yield (
        "JPEG: arithmetic coding",
        lambda: _with_size(encode(noise(2400), "JPEG", quality=100), 8000, 8000, 0xC9),
    )
    yield (
        "JPEG: arithmetic coding, progressive",
        lambda: _with_size(
            encode(noise(2000), "JPEG", quality=100, progressive=True), 4000, 4000, 0xCA
        ),
    )
    yield "JPEG: lossless process", lambda: _with_size(small("JPEG"), 8000, 8000, 0xC3)
    flat = Image.new("RGB", (8000, 8000), (90, 120, 10))
    yield "JPEG: 64 megapixels", lambda: encode(flat, "JPEG", quality=60)
    yield (
        "JPEG: 64 megapixels, a restart each block",
        lambda: encode(flat, "JPEG", quality=60, restart_marker_blocks=1),
    )
    yield (
        "JPEG: 64 megapixels, progressive",
        lambda: encode(flat, "JPEG", quality=60, progressive=True),
    )
    yield (
        "JPEG: 50 megapixels of CMYK",
        lambda: encode(Image.new("CMYK", (7070, 7070)), "JPEG", quality=60),
    )
    yield "JPEG: 900 x 65,000", lambda: encode(Image.new("RGB", (900, 65_000)), "JPEG", quality=60)
    yield "JPEG: 64 megapixels without data", lambda: _with_size(small("JPEG"), 8000, 8000)
    stuffed = small("JPEG", progressive=True)
    scan = stuffed.rindex(b"\xff\xda") + 14
    yield "JPEG: stuffed bytes, progressive", lambda: filled(stuffed[:scan], b"\xff\0", b"\xff\xd9")
    yield (
        "JPEG: padding in a progressive scan",
        lambda: filled(stuffed[:scan], b"\xff", b"\xff\xd9"),
    )


# --- PNG ---


def _header(width: int, height: int, bits: int, colour: int, interlaced: int = 0) -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields)


@cache
def _zeros(length: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    packed = b"".join(packer.compress(block) for _ in range(length >> 20))
    return packed + packer.compress(bytes(length & 0xFFFFF)) + packer.flush()


def _black(width: int, height: int, bits: int, colour: int, interlaced: int = 0) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    length = height * (1 + width * channels * bits // 8) + (height * 8 if interlaced else 0)
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    return (
        _header(width, height, bits, colour, interlaced)
        + palette
        + chunk(b"IDAT", _zeros(length))
        + chunk(b"IEND", b"")
    )


def _in_png(part: bytes) -> bytes:
    whole = small("PNG")
    return filled(whole[:33], part, whole[33:])


def _pngs() -> Iterator[Kind]:
    packed = zlib.compress(bytes(50_000_000), 9)
    yield "PNG: empty chunks", lambda: _in_png(chunk(b"teSt", b""))
    yield "PNG: empty chunks of pixels", lambda: _in_png(chunk(b"IDAT", b""))
    yield (
        "PNG: tiny chunks of pixels",
        lambda: _header(5000, 5000, 8, 2) + chunk(b"IDAT", b"\0") * 1_500_000,
    )
    yield (
        "PNG: text that unpacks to gigabytes",
        lambda: _in_png(chunk(b"zTXt", b"Comment\0\0" + packed)),
    )
    yield (
        "PNG: profiles that unpack to gigabytes",
        lambda: _in_png(chunk(b"iCCP", b"ICC\0\0" + packed)),
    )
    yield "PNG: text", lambda: _in_png(chunk(b"tEXt", b"Comment\0" + b"x" * 10_000_000))
    yield (
        "PNG: XMP",
        lambda: _in_png(
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"tiff:Orientation=" * 600_000)
        ),
    )
    yield "PNG: palettes", lambda: _in_png(chunk(b"PLTE", bytes(768)))
    tags = [(i, 7, 9_000_000, 8) for i in range(65_000)]
    yield "PNG: Exif whose tags each take all of it", lambda: _in_png(chunk(b"eXIf", _exif(tags)))
    frame = chunk(b"fcTL", bytes(26)) + chunk(b"fdAT", bytes(10))
    yield "PNG: animation", lambda: _in_png(chunk(b"acTL", struct.pack(">II", 400_000, 0)) + frame)
    yield "PNG: 64 megapixels of RGB", lambda: _black(8000, 8000, 8, 2)
    yield "PNG: 64 megapixels of RGBA", lambda: _black(8000, 8000, 8, 6)
    yield "PNG: 49 megapixels of RGB", lambda: _black(7000, 7000, 8, 2)
    yield "PNG: 25 megapixels of RGBA", lambda: _black(5000, 5000, 8, 6)
    yield "PNG: 64 megapixels of grey", lambda: _black(8000, 8000, 8, 0)
    yield "PNG: 36 megapixels of grey", lambda: _black(6000, 6000, 8, 0)
    yield "PNG: 36 megapixels with a palette", lambda: _black(6000, 6000, 8, 3)
    yield "PNG: 25 megapixels of grey with alpha", lambda: _black(5000, 5000, 8, 4)
    yield "PNG: 36 megapixels of 16 bits", lambda: _black(6000, 6000, 16, 0)
    yield "PNG: 25 megapixels of 64 bits", lambda: _black(5000, 5000, 16, 6)
    yield "PNG: 36 megapixels, interlaced", lambda: _black(6000, 6000, 8, 2, 1)
    yield "PNG: 64,000,000 x 1", lambda: _black(64_000_000, 1, 8, 0)
    yield "PNG: 1 x 64,000,000", lambda: _black(1, 64_000_000, 8, 0)
    yield "PNG: noise of 19 MB", lambda: png(np.asarray(noise(2520)), colour_type=2)
    yield (
        "PNG: noise, interlaced",
        lambda: png(np.asarray(noise(2500)), colour_type=2, interlaced=True),
    )
    # Fixed code, no symbols, three bits and an end of block: four blocks in five bytes.
    yield (
        "PNG: empty blocks of deflate",
        lambda: _header(1, 1, 8, 0) + chunk(b"IDAT", filled(b"\x78\x01", b"\0\0\0\xff\xff")),
    )
    yield (
        "PNG: empty blocks with codes of their own",
        lambda: _header(1, 1, 8, 0) + chunk(b"IDAT", _dynamic_blocks()),
    )


def _dynamic_blocks() -> bytes:
    """Blocks of deflate that describe two trees and hold nothing but their end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    text = bytes(np.random.default_rng(3).integers(0, 255, 400, np.uint8) % 97)
    packer.compress(text)
    block = packer.flush(zlib.Z_FULL_FLUSH)
    return filled(b"\x78\x01", block)


# --- GIF, BMP ---


def _in_gif(part: bytes) -> bytes:
    gif = small("GIF")
    at = 13 + 768
    return filled(gif[:at], part, gif[at:])


def _bmp_of_runs(side: int, compression: int, run: bytes) -> bytes:
    bits = 8 if compression == 1 else 4
    pixels = (run * (side // run[0]) + b"\0\0") * side
    fields = struct.pack(
        "<IiiHHIIiiII",
        40,
        side,
        side,
        1,
        bits,
        compression,
        len(pixels),
        0,
        0,
        256 if bits == 8 else 16,
        0,
    )
    palette = bytes(1024 if bits == 8 else 64)
    offset = 14 + 40 + len(palette)
    return (
        b"BM"
        + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
        + fields
        + palette
        + pixels[:LARGEST]
    )


def _gifs_and_bmps() -> Iterator[Kind]:
    yield "GIF: comments", lambda: _in_gif(b"!\xfe" + (b"\xff" + b"x" * 255) * 70_000 + b"\0")
    yield "GIF: comments of one byte", lambda: _in_gif(b"!\xfe\1x\0")
    yield (
        "GIF: a comment in blocks of one byte",
        lambda: _in_gif(b"!\xfe" + b"\1x" * 1_000_000 + b"\0"),
    )
    yield "GIF: programs' blocks", lambda: _in_gif(b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0")
    yield "GIF: delays", lambda: _in_gif(b"!\xf9\4\0\0\0\0\0")
    yield "GIF: animation", lambda: filled(small("GIF")[:-1], small("GIF")[13 + 768 : -1], b";")
    flat = Image.new("P", (8000, 8000))
    yield "GIF: 64 megapixels", lambda: encode(flat, "GIF")
    yield (
        "GIF: 36 megapixels, interlaced",
        lambda: encode(Image.new("P", (6000, 6000)), "GIF", interlace=1),
    )
    yield "GIF: noise", lambda: encode(noise(3600).convert("L"), "GIF")[:LARGEST]
    whole = small("GIF")
    yield (
        "GIF: 64 megapixels around a small frame",
        lambda: whole[:6] + struct.pack("<HH", 8000, 8000) + whole[10:],
    )
    codes = struct.pack("<HHHHBB", 0, 0, 6000, 6000, 0, 8) + b"\xff" + b"\0" * 255
    yield (
        "GIF: codes that clear",
        lambda: filled(
            b"GIF89a" + struct.pack("<HHBBB", 6000, 6000, 0xF7, 0, 0) + bytes(768) + b"," + codes,
            b"\xff" + b"\x00\x01" * 127 + b"\0",
        ),
    )
    yield "BMP: 64 megapixels of runs", lambda: _bmp_of_runs(7905, 1, b"\xff\1")
    yield "BMP: 8 megapixels of runs", lambda: _bmp_of_runs(2805, 1, b"\xff\1")
    yield "BMP: 8 megapixels of runs of 1", lambda: _bmp_of_runs(2800, 1, b"\1\1")
    yield "BMP: 8 megapixels of runs, 4 bits", lambda: _bmp_of_runs(2794, 2, b"\xfe\x12")
    yield "BMP: 64 megapixels of 1 bit", lambda: encode(Image.new("1", (8000, 8000)), "BMP")
    yield "BMP: 20 MB", lambda: encode(noise(2640), "BMP")
    deep = encode(Image.new("RGBA", (2280, 2280)), "BMP")
    yield "BMP: 20 MB of 32 bits", lambda: deep
    yield (
        "BMP: a palette of four billion",
        lambda: small("BMP")[:46] + b"\xff" * 8 + small("BMP")[54:],
    )


# --- WebP ---


def _riff(*parts: bytes) -> bytes:
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a WebP file."""
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _vp8x(width: int, height: int, flags: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def _webps() -> Iterator[Kind]:
    picture = small("WEBP")[12:]
    extended = _vp8x(320, 240, 0x2C)
    yield (
        "WebP: chunks before the picture",
        lambda: _riff(filled(extended, riff_chunk(b"teSt", b""), picture)),
    )
    yield (
        "WebP: chunks behind the picture",
        lambda: _riff(filled(extended + picture, riff_chunk(b"EXIF", b""))),
    )
    yield (
        "WebP: a profile",
        lambda: _riff(extended, riff_chunk(b"ICCP", bytes(20_000_000)), picture),
    )
    tags = [(i, 7, 9_000_000, 8) for i in range(65_000)]
    yield (
        "WebP: Exif whose tags each take all of it",
        lambda: _riff(extended, picture, riff_chunk(b"EXIF", _exif(tags, bytes(10_000_000)))),
    )
    frame = riff_chunk(
        b"ANMF",
        bytes(6)
        + (319).to_bytes(3, "little")
        + (239).to_bytes(3, "little")
        + b"\1\0\0\0"
        + picture,
    )
    head = _vp8x(320, 240, 2) + riff_chunk(b"ANIM", bytes(6))
    yield "WebP: animation", lambda: _riff(filled(head, frame))
    clear = Image.new("RGBA", (8000, 8000), (1, 2, 3, 100))
    yield "WebP: 64 megapixels, transparent", lambda: encode(clear, "WEBP", lossless=True, method=0)
    yield (
        "WebP: 9 megapixels, transparent",
        lambda: encode(clear.crop((0, 0, 3000, 3000)), "WEBP", lossless=True, method=0),
    )
    yield (
        "WebP: 12 megapixels",
        lambda: encode(Image.new("RGB", (4000, 3000), (9, 9, 9)), "WEBP", method=0),
    )
    yield (
        "WebP: 12 megapixels of noise",
        lambda: encode(
            noise(2000).resize((4000, 3000), Image.Resampling.NEAREST),
            "WEBP",
            quality=100,
            method=0,
        )[:LARGEST],
    )
    yield (
        "WebP: noise, lossless",
        lambda: encode(noise(2600), "WEBP", lossless=True, method=0, quality=0)[:LARGEST],
    )
    still = encode(Image.new("RGB", (320, 240)), "WEBP", lossless=True)[12:]
    yield (
        "WebP: 256 megapixels around a small frame",
        lambda: _riff(
            _vp8x(16383, 16383, 2),
            riff_chunk(b"ANIM", bytes(6)),
            riff_chunk(b"ANMF", bytes(6) + frame[14:20] + b"\1\0\0\0" + still),
        ),
    )


# --- TIFF ---


def _tiff(entries: list[tuple[int, int, int, int]], data: bytes, next_: int = 0) -> bytes:
    """Little-endian; values are given as they stand in the directory, `data` follows it."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + packed
        + struct.pack("<I", next_)
        + data
    )


def _plain_tiff(
    width: int, height: int, compression: int, bits: int, data: bytes, **more: int
) -> bytes:
    at = 8 + 2 + 12 * (9 + len(more)) + 4
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, at),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        *((int(tag[1:]), 3, 1, value) for tag, value in more.items()),
    ]
    return _tiff(tags, data)


def _tiff_of_strips(height: int) -> bytes:
    """One row a strip, each of which is the same one."""
    at = 8 + 2 + 12 * 9 + 4
    rows = struct.pack("<I", at) * height + struct.pack("<I", 64) * height
    tags = [(256, 4, 1, 64), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [
        (273, 4, height, at),
        (277, 3, 1, 1),
        (278, 4, 1, 1),
        (279, 4, height, at + 4 * height),
    ]
    return _tiff(tags, rows)


def _tiff_of_tiles(side: int) -> bytes:
    count = (side // 16) ** 2
    at = 8 + 2 + 12 * 10 + 4
    tiles = struct.pack("<I", at) * count + struct.pack("<I", 256) * count
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [
        (277, 3, 1, 1),
        (322, 3, 1, 16),
        (323, 3, 1, 16),
        (324, 4, count, at),
        (325, 4, count, at + 4 * count),
    ]
    return _tiff(tags, tiles)


def _tiffs() -> Iterator[Kind]:
    yield "TIFF: 100 pages", lambda: _tiff_of_pages(100)
    yield "TIFF: a circle of pages", lambda: _tiff([(256, 4, 1, 64)], b"", 8)
    empty = [(60_000 + i % 5000, 4, 1, 0) for i in range(65_535)]
    yield "TIFF: 65,535 tags", lambda: filled(_tiff(empty, b""), b"\0")
    fat = [
        (256, 4, 1, 64),
        (257, 4, 1, 64),
        *((40_000 + i, 7, 19_000_000, 8) for i in range(20_000)),
    ]
    yield "TIFF: tags that each take all of it", lambda: filled(_tiff(fat, b""), b"\0")
    numbers = [
        (256, 4, 1, 64),
        (257, 4, 1, 64),
        (273, 4, 4_900_000, 8),
        (279, 4, 4_900_000, 8),
        (258, 3, 9_000_000, 8),
    ]
    yield "TIFF: five million strips", lambda: filled(_tiff(numbers, b""), b"\0")
    text = [(256, 4, 1, 64), (257, 4, 1, 64), *((40_000 + i, 2, 19_000_000, 8) for i in range(50))]
    yield "TIFF: text", lambda: filled(_tiff(text, b""), b"a")
    yield "TIFF: strips of one row", lambda: _tiff_of_strips(900_000)
    yield "TIFF: tiles", lambda: _tiff_of_tiles(6400)
    yield "TIFF: 64 megapixels, deflate", lambda: _plain_tiff(8000, 8000, 8, 8, _zeros(64_000_000))
    yield "TIFF: 36 megapixels, deflate", lambda: _plain_tiff(6000, 6000, 8, 8, _zeros(36_000_000))
    yield (
        "TIFF: deflate that unpacks to more",
        lambda: _plain_tiff(100, 100, 8, 8, _zeros(400_000_000)),
    )
    yield (
        "TIFF: 64 megapixels, packed bits",
        lambda: _plain_tiff(8000, 8000, 32773, 8, b"\x81\0" * 500_000),
    )
    flat = Image.new("L", (6000, 6000))
    for compression in ("tiff_lzw", "lzma", "zstd", "jpeg"):
        yield (
            f"TIFF: 36 megapixels, {compression}",
            partial(encode, flat, "TIFF", compression=compression),
        )
    bits = Image.new("1", (8000, 8000))
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield (
            f"TIFF: 64 megapixels, {compression}",
            partial(encode, bits, "TIFF", compression=compression),
        )
    yield (
        "TIFF: 64 bits a pixel, planes",
        lambda: _plain_tiff(1500, 1100, 1, 16, bytes(20_000_000), t284=2),
    )
    yield "TIFF: noise, LZW", lambda: encode(noise(2200), "TIFF", compression="tiff_lzw")[:LARGEST]
    yield "TIFF: CMYK", lambda: encode(Image.new("CMYK", (2280, 2280)), "TIFF")


# --- AVIF, HEIC ---


def box(kind: bytes, content: bytes) -> bytes:
    """One box of an ISO media file."""
    return struct.pack(">I", len(content) + 8) + kind + content


def _isos() -> Iterator[Kind]:
    flat = Image.new("RGB", (8000, 8000), (9, 99, 9))
    yield "AVIF: 64 megapixels", lambda: encode(flat, "AVIF", speed=10)
    yield "AVIF: 20 megapixels", lambda: encode(flat.crop((0, 0, 4500, 4500)), "AVIF", speed=10)
    yield "AVIF: noise", lambda: encode(noise(1400), "AVIF", speed=10, quality=100)
    small_ = Image.new("RGB", (64, 64))
    yield (
        "AVIF: animation",
        lambda: encode(small_, "AVIF", speed=10, save_all=True, append_images=[small_] * 300),
    )
    yield "HEIC: 12 megapixels", lambda: encode(flat.crop((0, 0, 4000, 3000)), "HEIF", quality=1)
    yield "HEIC: noise", lambda: encode(noise(700), "HEIF", quality=100)
    for brand in (b"avif", b"heic"):
        name = "AVIF" if brand == b"avif" else "HEIC"
        whole = small("AVIF" if brand == b"avif" else "HEIF")
        head = box(b"ftyp", brand + bytes(4) + brand + b"mif1")
        yield f"{name}: empty boxes", partial(_after_ftyp, whole, box(b"free", b""))
        yield f"{name}: boxes in boxes", partial(_nested, head, 500_000)
        items = b"".join(
            struct.pack(">I4sBBBBHH4sB", 21, b"infe", 2, 0, 0, 0, i & 0xFFFF, 0, b"hvc1", 0)
            for i in range(65_000)
        )
        iinf = box(b"iinf", struct.pack(">IH", 0, 65_000) + items)
        meta = box(b"meta", bytes(4) + box(b"hdlr", bytes(8) + b"pict" + bytes(13)) + iinf)
        yield f"{name}: 65,000 items", partial(head.__add__, meta)


def _after_ftyp(whole: bytes, part: bytes) -> bytes:
    (length,) = struct.unpack_from(">I", whole)
    return filled(whole[:length], part, whole[length:])


def _nested(head: bytes, depth: int) -> bytes:
    """Boxes that each hold the next."""
    sizes = range(8 * depth, 0, -8)
    return head + b"".join(struct.pack(">I4s", size, b"meta") for size in sizes)


# --- What one costs ---


@dataclass(frozen=True)
class Cost:
    """What deciding about one picture cost.

    Attributes:
        answer: what became of it.
        seconds: of CPU, of the worker's side and of the decoder process with its start.
        megabytes: at its peak, of both, above what the worker had before, with the body itself.
    """

    answer: str
    seconds: float
    megabytes: float


class Probe:
    """A process that puts pictures through the image stage, each in a fresh copy of itself."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.costs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )

    def measure(self, data: bytes, times: int = 1) -> Cost:
        """What deciding about `data` costs, so many times in one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack("<II", times, len(data)) + data)
        self._process.stdin.flush()
        return Cost(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def _serve_probe() -> None:
    import os  # noqa: PLC0415

    while prefix := sys.stdin.buffer.read(8):
        times, length = struct.unpack("<II", prefix)
        data = sys.stdin.buffer.read(length)
        pid = os.fork()
        if pid == 0:
            print(json.dumps(_cost(data, times)), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


def _cost(data: bytes, times: int) -> dict[str, object]:
    import resource  # noqa: PLC0415

    from handler import images  # noqa: PLC0415
    from handler.errors import ClientError  # noqa: PLC0415
    from handler.settings import Preprocessing  # noqa: PLC0415

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS:")
    budget = images.PixelBudget(times * 64_000_000)
    results = images.decode_all([(data, budget, images.decode)] * times, Preprocessing(), None)
    (answer,) = {
        f"{result.status} {result.type}" if isinstance(result, ClientError) else "classified"
        for result in results
    }
    images._decoder_process.close()
    own, other = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "answer": answer,
        "seconds": sum(usage.ru_utime + usage.ru_stime for usage in (own, other)),
        "megabytes": (kilobytes("VmHWM:") - before + other.ru_maxrss) / 1e3 + len(data) / 1e6,
    }


def kilobytes(name: str) -> int:
    """A figure of this process's memory, by its name in `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    _serve_probe()
