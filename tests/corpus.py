"""A corpus of pictures that people send, and of bytes that attackers and accidents send.

Everything is made here, from one photograph; nothing is downloaded.
"""

import gzip
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from scripts.samples import CAT
from tests import kinds
from tests.pictures import encode

pillow_heif.register_heif_opener()

WIDTH, HEIGHT = 320, 240


@dataclass(frozen=True)
class Valid:
    """A picture and what the plain library makes of it, as a person would see it: RGB."""

    name: str
    data: bytes
    seen: Image.Image


@dataclass(frozen=True)
class Hostile:
    """Bytes that are refused, and how."""

    name: str
    data: bytes
    status: int
    type: str


def photograph() -> Image.Image:
    """The photograph that the corpus is made from, RGB, 320 x 240."""
    with Image.open(CAT) as cat:
        return cat.convert("RGB").resize((WIDTH, HEIGHT))


def seen(data: bytes) -> Image.Image:
    """The plain library's reading: upright, and transparency on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one picture's EXIF is damaged on purpose
        return _seen(data)


def _seen(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        turned: Image.Image = image
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        for transpose in _UPRIGHT.get(orientation, ()):
            turned = turned.transpose(transpose)
        if "A" in turned.getbands() or "transparency" in image.info:
            layer = turned.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
        return turned.convert("RGB")


# Written out by hand from the EXIF standard: rotate, then flip.
_FLIP, _90, _180, _270 = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)
_UPRIGHT = {
    2: (_FLIP,),
    3: (_180,),
    4: (_180, _FLIP),
    5: (_270, _FLIP),
    6: (_270,),
    7: (_90, _FLIP),
    8: (_90,),
}


def valid() -> Iterator[Valid]:
    """Every format and variant that a person's picture may have."""
    for name, data in _plain():
        yield Valid(name, data, seen(data))
    yield from _with_faults_that_do_not_matter()
    yield from _sixteen_bits()
    for name, data, shown in kinds.read(np.asarray(photograph())):
        yield Valid(name, data, Image.fromarray(shown))


def _plain() -> Iterator[tuple[str, bytes]]:
    rgb = photograph()
    yield from _jpegs(rgb)
    yield from _pngs(rgb)
    yield from _others(rgb)
    yield "size 1x1 PNG", encode(Image.new("RGB", (1, 1), (9, 99, 199)))
    yield "size 1x65000 PNG", encode(rgb.resize((1, 65_000)))
    yield "size 65000x1 PNG", encode(rgb.resize((65_000, 1)))
    yield "size 4000x3000 JPEG", encode(rgb.resize((4000, 3000)), "JPEG")


def _jpegs(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    yield "JPEG baseline", encode(rgb, "JPEG", quality=95)
    yield "JPEG quality 5", encode(rgb, "JPEG", quality=5)
    yield "JPEG progressive", encode(rgb, "JPEG", progressive=True)
    yield "JPEG optimised", encode(rgb, "JPEG", optimize=True)
    yield "JPEG greyscale", encode(rgb.convert("L"), "JPEG")
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield f"JPEG {subsampling}", encode(rgb, "JPEG", subsampling=subsampling)
    yield "JPEG RGB components", encode(rgb, "JPEG", keep_rgb=True)
    yield "JPEG restart markers", encode(rgb, "JPEG", restart_marker_blocks=4)
    cmyk = encode(rgb.convert("CMYK"), "JPEG")
    yield "JPEG CMYK Adobe", cmyk
    yield "JPEG CMYK progressive", encode(rgb.convert("CMYK"), "JPEG", progressive=True)
    adobe = cmyk.index(b"Adobe")
    yield "JPEG YCCK Adobe", cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]
    yield "JPEG CMYK without Adobe", cmyk[: adobe - 4] + cmyk[adobe + 12 :]
    for orientation in range(1, 9):
        yield f"JPEG orientation {orientation}", encode(rgb, "JPEG", exif=_exif(orientation))
    yield "JPEG orientation 9", encode(rgb, "JPEG", exif=_exif(9))
    yield "JPEG damaged EXIF", encode(rgb, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    yield "JPEG colour profile", encode(rgb, "JPEG", icc_profile=profile.tobytes())
    yield "JPEG comment", encode(rgb, "JPEG", comment=b"x" * 60_000)
    yield "JPEG bytes after the end", encode(rgb, "JPEG") + b"\0" * 5000
    yield "JPEG two pictures (MPO)", encode(rgb, "MPO", save_all=True, append_images=[rgb])


def _pngs(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    half_clear = rgb.copy()
    half_clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    yield "PNG RGB", encode(rgb)
    yield "PNG RGBA", encode(half_clear)
    yield "PNG greyscale", encode(rgb.convert("L"))
    yield "PNG greyscale and alpha", encode(half_clear.convert("LA"))
    yield "PNG 1 bit", encode(rgb.convert("1"))
    for bits in (1, 2, 4, 8):
        yield f"PNG palette {bits} bits", encode(rgb.quantize(2**bits), bits=bits)
    yield "PNG palette, clear colour", encode(rgb.quantize(16), transparency=3)
    yield "PNG palette, clear bytes", encode(rgb.quantize(4), transparency=b"\x00\x40\x80\xff")
    yield "PNG grey, clear level", encode(rgb.convert("L"), transparency=120)
    yield "PNG RGB, clear colour", encode(rgb, transparency=rgb.getpixel((5, 5)))
    yield "PNG orientation 6", encode(rgb, exif=_exif(6))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words " * 1000, zip=True)
    yield "PNG text", encode(rgb, pnginfo=text)
    yield "PNG animated", encode(rgb, save_all=True, append_images=[Image.new("RGB", rgb.size)])


def _others(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    half_clear = rgb.copy()
    half_clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    black = Image.new("RGB", rgb.size)
    yield "WebP lossy", encode(rgb, "WEBP")
    yield "WebP lossless", encode(rgb, "WEBP", lossless=True)
    yield "WebP alpha", encode(half_clear, "WEBP")
    yield "WebP animated", encode(rgb, "WEBP", save_all=True, append_images=[black])
    yield "WebP orientation 8", encode(rgb, "WEBP", exif=_exif(8))
    yield "GIF", encode(rgb, "GIF")
    yield "GIF greyscale", encode(rgb.convert("L"), "GIF", interlace=0)
    yield "GIF clear colour", encode(rgb.quantize(16), "GIF", transparency=2)
    yield "GIF animated", encode(rgb, "GIF", save_all=True, append_images=[black])
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"BMP {mode}", encode(half_clear.convert("RGB").convert(mode), "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF {compression}", encode(rgb, "TIFF", compression=compression)
    yield "TIFF fax", encode(rgb.convert("1"), "TIFF", compression="group4")
    for mode in ("L", "P", "CMYK", "RGBA", "LAB"):
        image = half_clear if mode == "RGBA" else rgb.convert(mode) if mode != "LAB" else _lab(rgb)
        yield f"TIFF {mode}", encode(image, "TIFF")
    yield "TIFF two pages", encode(rgb, "TIFF", save_all=True, append_images=[black])
    yield "AVIF", encode(rgb, "AVIF")
    yield "AVIF alpha", encode(half_clear, "AVIF")
    yield "AVIF greyscale", encode(rgb.convert("L"), "AVIF")
    yield "AVIF animated", encode(rgb, "AVIF", save_all=True, append_images=[black])
    yield "AVIF orientation 6", encode(rgb, "AVIF", exif=_exif(6))
    yield "HEIC", encode(rgb, "HEIF")
    yield "HEIC alpha", encode(half_clear, "HEIF")
    yield "HEIC greyscale", encode(rgb.convert("L"), "HEIF")
    yield "HEIC orientation 6", encode(rgb, "HEIF", exif=_exif(6))


def _with_faults_that_do_not_matter() -> Iterator[Valid]:
    """What the plain library refuses, though all of the picture is there."""
    rgb = photograph()
    jpeg, progressive, whole = (
        encode(rgb, "JPEG"),
        encode(rgb, "JPEG", progressive=True),
        encode(rgb),
    )
    film = b"\xff\xda\0\1" * 50_000
    for name, data, sound in (
        ("JPEG without its last marker", jpeg[:-2], jpeg),
        ("JPEG after a script's blank lines", b"\xef\xbb\xbf\r\n\r\n" + jpeg, jpeg),
        ("JPEG with a film behind it", progressive + film, progressive),
        ("PNG after a script's blank lines", b"\n\n" + whole, whole),
        (
            "PNG with 100 MB of text in 100 kB",
            _after_header(whole, _bomb(b"zTXt", b"Comment")),
            whole,
        ),
        ("PNG with a profile of 100 MB", _after_header(whole, _bomb(b"iCCP", b"ICC")), whole),
        (
            "PNG with a wrong checksum in its text",
            _after_header(whole, chunk(b"tEXt", b"Comment\0x")[:-1] + b"?"),
            whole,
        ),
        ("PNG without its last chunk", whole[:-12], whole),
    ):
        yield Valid(name, data, seen(sound))


def _after_header(png_file: bytes, part: bytes) -> bytes:
    return png_file[:33] + part + png_file[33:]


def _bomb(kind: bytes, name: bytes) -> bytes:
    return chunk(kind, name + b"\0\0" + zlib.compress(bytes(100_000_000), 9))


def _sixteen_bits() -> Iterator[Valid]:
    """8-bit pictures times 257 are the same pictures in 16 bits, which the plain library's own
    conversion would clip: what is expected is the 8-bit picture.
    """
    rgb = photograph()
    grey = rgb.convert("L")
    deep_grey = np.asarray(grey).astype(np.uint16) * 257
    image = Image.fromarray(deep_grey)
    yield Valid("PNG 16-bit greyscale", encode(image), grey.convert("RGB"))
    yield Valid("TIFF 16-bit greyscale", encode(image, "TIFF"), grey.convert("RGB"))
    big_endian = Image.frombytes("I;16B", grey.size, deep_grey.astype(">u2").tobytes())
    yield Valid("TIFF 16-bit big-endian", encode(big_endian, "TIFF"), grey.convert("RGB"))
    ten_bits = io.BytesIO()
    pillow_heif.from_bytes("L;16", grey.size, deep_grey.tobytes()).save(ten_bits, quality=-1)
    yield Valid("HEIC 10-bit greyscale", ten_bits.getvalue(), grey.convert("RGB"))
    deep_rgb = np.asarray(rgb).astype(np.uint16) * 257
    yield Valid("PNG 16-bit RGB", png(deep_rgb, colour_type=2), rgb)
    opaque = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    yield Valid("PNG 16-bit RGBA", png(np.concatenate([deep_rgb, opaque], 2), colour_type=6), rgb)
    interlaced = png(np.asarray(rgb).astype(np.uint8), colour_type=2, interlaced=True)
    yield Valid("PNG interlaced", interlaced, rgb)


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _lab(rgb: Image.Image) -> Image.Image:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    converted = ImageCms.applyTransform(rgb, to_lab)
    assert converted is not None
    return converted


def png(
    pixels: NDArray[np.uint8] | NDArray[np.uint16], colour_type: int, *, interlaced: bool = False
) -> bytes:
    """A PNG that Pillow reads but cannot write: 16 bits a channel, or Adam7 interlaced."""
    height, width, _ = pixels.shape
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    passes = (
        [
            (0, 0, 8, 8),
            (0, 4, 8, 8),
            (4, 0, 8, 4),
            (0, 2, 4, 4),
            (2, 0, 4, 2),
            (0, 1, 2, 2),
            (1, 0, 2, 1),
        ]
        if interlaced
        else [(0, 0, 1, 1)]
    )
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in big_endian[top::down, left::right]
    )
    header = struct.pack(
        ">IIBBBBB", width, height, pixels.dtype.itemsize * 8, colour_type, 0, 0, int(interlaced)
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def hostile() -> Iterator[Hostile]:
    """What accidents and attackers send, each with its answer."""
    for name, data in _cut():
        yield Hostile(f"cut: {name}", data, 400, "DamagedImage")
    for name, data in _corrupt():
        yield Hostile(f"corrupt: {name}", data, 400, "DamagedImage")
    for name, data in _too_large():
        yield Hostile(f"large: {name}", data, 413, "TooLarge")
    for name, data in _other_formats():
        yield Hostile(f"format: {name}", data, 415, "UnsupportedFormat")
    for name, data in _no_pictures():
        yield Hostile(f"no picture: {name}", data, 400, "NotAnImage")


def _cut() -> Iterator[tuple[str, bytes]]:
    rgb = photograph()
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"):
        whole = encode(rgb, file_format)
        for percent in (10, 50, 90):
            yield f"{file_format} at {percent} %", whole[: len(whole) * percent // 100]
    progressive = encode(rgb, "JPEG", progressive=True)
    yield "JPEG progressive in half", progressive[: len(progressive) // 2]
    yield "JPEG after 2 bytes", encode(rgb, "JPEG")[:2]
    yield "PNG after 8 bytes", encode(rgb)[:8]
    yield "GIF after 6 bytes", encode(rgb, "GIF")[:6]


def _corrupt() -> Iterator[tuple[str, bytes]]:
    rgb = photograph()
    whole = encode(rgb)
    yield "PNG checksum of the header", whole[:29] + b"\0\0\0\0" + whole[33:]
    yield "PNG pixels zeroed", whole[:200] + bytes(len(whole) - 200)
    yield "PNG without pixels", whole[:33] + chunk(b"IEND", b"")
    yield "PNG width 0", _png_header(0, 100)
    yield "PNG unknown compression", whole[:26] + b"\x07" + whole[27:]
    jpeg = encode(rgb, "JPEG")
    yield "JPEG without tables", jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :]
    yield "JPEG size 0x0", _jpeg_with_size(0, 0)
    yield "JPEG only markers", b"\xff\xd8" + b"\xff\xff" * 1000 + b"\xff\xd9"
    yield "GIF no colours and no pixels", b"GIF89a\x10\0\x10\0\0\0\0;"
    yield (
        "TIFF that points at itself",
        b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
    )
    yield "TIFF of noise", b"MM\0*" + np.random.default_rng(1).bytes(1000)
    yield "WebP of noise", b"RIFF\xff\x0f\0\0WEBPVP8 " + np.random.default_rng(2).bytes(1000)
    yield "AVIF of noise", b"\0\0\0 ftypavif" + np.random.default_rng(3).bytes(1000)
    yield "HEIC of noise", b"\0\0\0 ftypheic" + np.random.default_rng(4).bytes(1000)


def _too_large() -> Iterator[tuple[str, bytes]]:
    yield "JPEG header 30,000 x 30,000", _jpeg_with_size(30_000, 30_000)
    yield "JPEG header 65,500 x 65,500", _jpeg_with_size(65_500, 65_500)
    yield "PNG header 50,000 x 50,000", _png_header(50_000, 50_000)
    yield "PNG header 2,147,483,647 squared", _png_header(2**31 - 1, 2**31 - 1)
    yield "PNG bomb, 9,000 x 9,000 of black", encode(Image.new("L", (9000, 9000)))
    yield (
        "GIF header 65,535 squared",
        b"GIF89a\xff\xff\xff\xff\0\0\0" + b"," + bytes(8) + b"\0\2\0;",
    )
    yield "BMP of width -1, which is read as 4,294,967,295", _bmp_with_size(-1, 100)
    yield "BMP header 100,000 x 100,000", _bmp_with_size(100_000, 100_000)
    yield (
        "WebP 12,000 x 12,000",
        encode(Image.new("L", (12_000, 12_000)), "WEBP", lossless=True, method=0),
    )
    yield "TIFF 60,000 x 60,000", _tiff_with_size(60_000, 60_000)
    yield "TIFF of 1,000 pages", _tiff_of_pages(1000)
    yield "JPEG of 500 scans", _jpeg_of_scans(500)


def _other_formats() -> Iterator[tuple[str, bytes]]:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    yield "PDF", encode(photograph(), "PDF")
    yield "EPS", encode(photograph(), "EPS")
    yield "PostScript that would run a program", b"%!PS\n(%pipe%touch /tmp/x) (w) file\n"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    yield "SVG after an XML header", b'<?xml version="1.0"?><svg/>'
    yield "HTML", b"<!DOCTYPE html><title>cat</title>"
    yield "Photoshop", b"8BPS\0\1" + bytes(100)
    yield "Word", zipped.getvalue()
    yield "gzip of a JPEG", gzip.compress(encode(photograph(), "JPEG"))
    yield "icon", encode(photograph().resize((32, 32)), "ICO")
    yield "JPEG 2000", encode(photograph(), "JPEG2000")
    yield "JPEG XL", b"\xff\x0a" + bytes(100)
    yield "MP4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(100)
    yield "AVI", b"RIFF\0\1\0\0AVI LIST" + bytes(100)
    yield "WebM", b"\x1aE\xdf\xa3" + bytes(100)
    yield "32-bit float TIFF", encode(photograph().convert("F"), "TIFF")
    for plugin in ("PPM", "TGA", "QOI", "PCX", "SGI", "DDS", "ICNS"):
        yield plugin, encode(photograph(), plugin)
    yield "PGM", encode(photograph().convert("L"), "PPM")
    yield "PBM", encode(photograph().convert("1"), "PPM")
    yield "XBM", encode(photograph().convert("1"), "XBM")
    yield "TGA run-length", encode(photograph(), "TGA", compression="tga_rle")
    yield "JPEG 2000 codestream", encode(photograph(), "JPEG2000", no_jp2=True)
    for name, data, _ in (*kinds.unread(np.asarray(photograph())), *kinds.named()):
        yield name, data


def _no_pictures() -> Iterator[tuple[str, bytes]]:
    yield "text", b"a picture of a cat"
    yield "one byte", b"\xff"
    yield "zeros", bytes(10_000)
    yield "noise", b"\x07" + np.random.default_rng(5).bytes(100_000)
    yield "program", b"\x7fELF" + bytes(1000)
    yield "pickle", b"\x80\x04\x95" + bytes(100)
    yield "base64 of a JPEG", b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQ"
    yield "a path", b"/etc/passwd"
    yield "a URL", b"http://127.0.0.1:8081/models"


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def _jpeg_with_size(width: int, height: int) -> bytes:
    jpeg = encode(photograph(), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _jpeg_of_scans(scans: int) -> bytes:
    jpeg = encode(photograph(), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * scans + b"\xff\xd9"


def _bmp_with_size(width: int, height: int) -> bytes:
    bmp = encode(photograph(), "BMP")
    return bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]


def _tiff_with_size(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (262, 1), (273, 8), (278, height), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def _tiff_of_pages(pages: int) -> bytes:
    small = Image.new("L", (8, 8))
    return encode(small, "TIFF", save_all=True, append_images=[small] * (pages - 1))
