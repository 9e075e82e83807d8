"""Valid images of all formats, and corrupt or hostile bytes, all made from one photograph."""

import gzip
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from scripts.samples import CAT
from tests import kinds
from tests.images import encode
from tests.kinds import chunk, png_header

pillow_heif.register_heif_opener()

WIDTH, HEIGHT = 320, 240


@dataclass(frozen=True)
class Valid:
    """An image and its visible colors, RGB, by Pillow or by arithmetic."""

    name: str
    data: bytes
    seen: Image.Image


@dataclass(frozen=True)
class Hostile:
    """Bytes that are rejected, with the status and type of the error."""

    name: str
    data: bytes
    status: int
    type: str


def photograph() -> Image.Image:
    """Return the photograph that the corpus is made from, RGB, 320 x 240."""
    with Image.open(CAT) as cat:
        return cat.convert("RGB").resize((WIDTH, HEIGHT))


def seen(data: bytes) -> Image.Image:
    """Decode with Pillow: upright, and transparency on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for the image with damaged EXIF
        with Image.open(io.BytesIO(data)) as image:
            turned: Image.Image = image
            for transpose in _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1), ()):
                turned = turned.transpose(transpose)
            if "A" in turned.getbands() or "transparency" in image.info:
                layer = turned.convert("RGBA")
                white = Image.new("RGBA", layer.size, "white")
                return Image.alpha_composite(white, layer).convert("RGB")
            return turned.convert("RGB")


# From the EXIF standard: rotate, then flip.
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
    """Yield each supported format and variant."""
    rgb = photograph()
    for name, data in chain(_jpegs(rgb), _pngs(rgb), _others(rgb)):
        yield Valid(name, data, seen(data))
    for name, data, sound in _with_harmless_faults(rgb):
        yield Valid(name, data, seen(sound))
    ten_bits, gray = io.BytesIO(), rgb.convert("L")
    deep = np.asarray(gray).astype(np.uint16) * 257
    pillow_heif.from_bytes("L;16", gray.size, deep.tobytes()).save(ten_bits, quality=-1)
    yield Valid("HEIC 10-bit grayscale", ten_bits.getvalue(), gray.convert("RGB"))
    interlaced = kinds.png(np.asarray(rgb), 8, 2, interlaced=True)
    yield Valid("PNG interlaced", interlaced, rgb)
    for name, data, shown in kinds.read(np.asarray(rgb)):
        yield Valid(name, data, Image.fromarray(shown))


def _jpegs(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    options: dict[str, dict[str, Any]] = {
        "baseline": {"quality": 95},
        "quality 5": {"quality": 5},
        "progressive": {"progressive": True},
        "optimized": {"optimize": True},
        "4:4:4": {"subsampling": "4:4:4"},
        "4:2:2": {"subsampling": "4:2:2"},
        "4:2:0": {"subsampling": "4:2:0"},
        "RGB components": {"keep_rgb": True},
        "restart markers": {"restart_marker_blocks": 4},
        **{f"orientation {held}": {"exif": _exif(held)} for held in range(1, 10)},
        "damaged EXIF": {"exif": b"Exif\0\0MM\0*\xff\xff\xff\xff"},
        "color profile": {
            "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        },
        "comment": {"comment": b"x" * 60_000},
    }
    for name, given in options.items():
        yield f"JPEG {name}", encode(rgb, "JPEG", **given)
    yield "JPEG grayscale", encode(rgb.convert("L"), "JPEG")
    cmyk = encode(rgb.convert("CMYK"), "JPEG")
    yield "JPEG CMYK Adobe", cmyk
    yield "JPEG CMYK progressive", encode(rgb.convert("CMYK"), "JPEG", progressive=True)
    adobe = cmyk.index(b"Adobe")
    yield "JPEG YCCK Adobe", cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]
    yield "JPEG CMYK without Adobe", cmyk[: adobe - 4] + cmyk[adobe + 12 :]
    yield "JPEG bytes after the end", encode(rgb, "JPEG") + b"\0" * 5000
    yield "JPEG two images (MPO)", encode(rgb, "MPO", save_all=True, append_images=[rgb])
    yield "JPEG 4000x3000", encode(rgb.resize((4000, 3000)), "JPEG")


def _pngs(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words " * 1000, zip=True)
    yield "PNG RGB", encode(rgb)
    yield "PNG RGBA", encode(_half_clear(rgb))
    yield "PNG 1 bit", encode(rgb.convert("1"))
    for bits in (1, 2, 4, 8):
        yield f"PNG palette {bits} bits", encode(rgb.quantize(2**bits), bits=bits)
    yield "PNG palette, clear color", encode(rgb.quantize(16), transparency=3)
    yield "PNG orientation 6", encode(rgb, exif=_exif(6))
    yield "PNG text", encode(rgb, pnginfo=text)
    yield "PNG animated", encode(rgb, save_all=True, append_images=[Image.new("RGB", rgb.size)])
    yield "PNG 1x1", encode(Image.new("RGB", (1, 1), (9, 99, 199)))
    yield "PNG 1x65000", encode(rgb.resize((1, 65_000)))
    yield "PNG 65000x1", encode(rgb.resize((65_000, 1)))


def _others(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    clear, black = _half_clear(rgb), Image.new("RGB", rgb.size)
    yield "WebP lossless", encode(rgb, "WEBP", lossless=True)
    for name in ("WEBP", "AVIF", "HEIF"):
        yield name, encode(rgb, name)
        yield f"{name} alpha", encode(clear, name)
        yield f"{name} grayscale", encode(rgb.convert("L"), name)
        for orientation in (6, 8):
            yield f"{name} orientation {orientation}", encode(rgb, name, exif=_exif(orientation))
    for name in ("WEBP", "GIF", "AVIF", "TIFF"):
        several = encode(rgb, name, save_all=True, append_images=[black])
        yield f"{name} of several frames or pages", several
    yield "GIF", encode(rgb, "GIF")
    yield "GIF grayscale", encode(rgb.convert("L"), "GIF", interlace=0)
    yield "GIF clear color", encode(rgb.quantize(16), "GIF", transparency=2)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"BMP {mode}", encode(clear.convert("RGB").convert(mode), "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF {compression}", encode(rgb, "TIFF", compression=compression)
    yield "TIFF fax", encode(rgb.convert("1"), "TIFF", compression="group4")
    for image in (*map(rgb.convert, ("L", "P", "CMYK")), clear):
        yield f"TIFF {image.mode}", encode(image, "TIFF")


def _half_clear(rgb: Image.Image) -> Image.Image:
    result = rgb.copy()
    result.putalpha(Image.linear_gradient("L").resize(rgb.size))
    return result


def _with_harmless_faults(rgb: Image.Image) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield complete images that Pillow rejects, and the same without the fault."""
    jpeg, progressive = encode(rgb, "JPEG"), encode(rgb, "JPEG", progressive=True)
    yield "JPEG without its last marker", jpeg[:-2], jpeg
    yield "JPEG after a script's blank lines", b"\xef\xbb\xbf\r\n\r\n" + jpeg, jpeg
    yield "JPEG with a film behind it", progressive + b"\xff\xda\0\1" * 50_000, progressive
    png = encode(rgb)
    bomb = b"\0\0" + zlib.compress(bytes(100_000_000), 9)
    wrong_checksum = chunk(b"tEXt", b"Comment\0x")[:-1] + b"?"
    yield "PNG after a script's blank lines", b"\n\n" + png, png
    for name, part in (
        ("100 MB of text in 100 kB", chunk(b"zTXt", b"Comment" + bomb)),
        ("a profile of 100 MB", chunk(b"iCCP", b"ICC" + bomb)),
        ("a wrong checksum in its text", wrong_checksum),
    ):
        yield f"PNG with {name}", png[:33] + part + png[33:], png
    yield "PNG without its last chunk", png[:-12], png


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


# --- Hostile ---


def hostile() -> Iterator[Hostile]:
    """Yield corrupt and hostile bytes, each with its error."""
    rgb = photograph()
    for make, status, type_name in (
        (_cut, 400, "DamagedImage"),
        (_corrupt, 400, "DamagedImage"),
        (_too_large, 413, "TooLarge"),
        (_other_formats, 415, "UnsupportedFormat"),
        (_no_images, 400, "NotAnImage"),
    ):
        for name, data in make(rgb):
            yield Hostile(f"{make.__name__.strip('_')}: {name}", data, status, type_name)


def _cut(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"):
        whole = encode(rgb, file_format)
        for percent in (10, 50, 90):
            yield f"{file_format} at {percent} %", whole[: len(whole) * percent // 100]
    progressive = encode(rgb, "JPEG", progressive=True)
    yield "JPEG progressive in half", progressive[: len(progressive) // 2]
    yield "JPEG after 2 bytes", encode(rgb, "JPEG")[:2]
    yield "PNG after 8 bytes", encode(rgb)[:8]
    yield "GIF after 6 bytes", encode(rgb, "GIF")[:6]


def _corrupt(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    png, jpeg, noise = encode(rgb), encode(rgb, "JPEG"), np.random.default_rng(1).bytes(1000)
    yield "PNG checksum of the header", png[:29] + b"\0\0\0\0" + png[33:]
    yield "PNG pixels zeroed", png[:200] + bytes(len(png) - 200)
    yield "PNG without pixels", png[:33] + chunk(b"IEND", b"")
    packed = zlib.compress(np.insert(np.asarray(rgb).reshape(HEIGHT, -1), 0, 0, axis=1).tobytes())
    parts = chunk(b"IDAT", packed[:999]), chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", packed[999:])
    yield "PNG pixels in two places", png[:33] + b"".join(parts) + png[-12:]
    yield "PNG width 0", _empty_png(0, 100)
    yield "PNG unknown compression", png[:26] + b"\x07" + png[27:]
    yield "JPEG without tables", jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :]
    yield "JPEG size 0x0", jpeg_with_size(jpeg, 0, 0)
    yield "JPEG only markers", b"\xff\xd8" + b"\xff\xff" * 1000 + b"\xff\xd9"
    yield "GIF no colors and no pixels", b"GIF89a\x10\0\x10\0\0\0\0;"
    circle = b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"
    yield "TIFF that points at itself", circle
    yield "TIFF of noise", b"MM\0*" + noise
    yield "WebP of noise", b"RIFF\xff\x0f\0\0WEBPVP8 " + noise
    yield "AVIF of noise", b"\0\0\0 ftypavif" + noise
    yield "HEIC of noise", b"\0\0\0 ftypheic" + noise


def _too_large(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    jpeg = encode(rgb, "JPEG")
    yield "JPEG header 30,000 x 30,000", jpeg_with_size(jpeg, 30_000, 30_000)
    yield "JPEG header 65,500 x 65,500", jpeg_with_size(jpeg, 65_500, 65_500)
    large = encode(rgb.resize((4000, 3000)), "JPEG", progressive=True)
    yield "JPEG of 500 scans", jpeg_of_scans(large, 500)
    yield "PNG header 50,000 x 50,000", _empty_png(50_000, 50_000)
    yield "PNG header 2,147,483,647 squared", _empty_png(2**31 - 1, 2**31 - 1)
    yield "PNG bomb, 9,000 x 9,000 of black", encode(Image.new("L", (9000, 9000)))
    gif = b"GIF89a\xff\xff\xff\xff\0\0\0" + b"," + bytes(8) + b"\0\2\0;"
    yield "GIF header 65,535 squared", gif
    bmp = encode(rgb, "BMP")
    for width, height in ((-1, 100), (100_000, 100_000)):  # -1 is read as 4,294,967,295
        yield f"BMP {width} x {height}", bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]
    webp = encode(Image.new("L", (12_000, 12_000)), "WEBP", lossless=True, method=0)
    yield "WebP 12,000 x 12,000", webp
    yield "TIFF 60,000 x 60,000", kinds.tiff([bytes(100)], 8, 1, size=(60_000, 60_000, 1))
    yield "TIFF of 1,000 pages", tiff_of_pages(1000)


def _other_formats(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    yield "Word", zipped.getvalue()
    yield "PostScript that would run a program", b"%!PS\n(%pipe%touch /tmp/x) (w) file\n"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    yield "SVG after an XML header", b'<?xml version="1.0"?><svg/>'
    yield "HTML", b"<!DOCTYPE html><title>cat</title>"
    yield "Photoshop", b"8BPS\0\1" + bytes(100)
    yield "gzip of a JPEG", gzip.compress(encode(rgb, "JPEG"))
    yield "JPEG XL", b"\xff\x0a" + bytes(100)
    yield "MP4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(100)
    yield "AVI", b"RIFF\0\1\0\0AVI LIST" + bytes(100)
    yield "WebM", b"\x1aE\xdf\xa3" + bytes(100)
    yield "icon", encode(rgb.resize((32, 32)), "ICO")
    yield "32-bit float TIFF", encode(rgb.convert("F"), "TIFF")
    for plugin in ("PDF", "EPS", "JPEG2000", "PPM", "TGA", "QOI", "PCX", "SGI", "DDS", "ICNS"):
        yield plugin, encode(rgb, plugin)
    yield "PGM", encode(rgb.convert("L"), "PPM")
    yield "PBM", encode(rgb.convert("1"), "PPM")
    yield "XBM", encode(rgb.convert("1"), "XBM")
    yield "TGA run-length", encode(rgb, "TGA", compression="tga_rle")
    yield "JPEG 2000 codestream", encode(rgb, "JPEG2000", no_jp2=True)


def _no_images(_: Image.Image) -> Iterator[tuple[str, bytes]]:
    yield "text", b"a photo of a cat"
    yield "one byte", b"\xff"
    yield "zeros", bytes(10_000)
    yield "noise", b"\x07" + np.random.default_rng(5).bytes(100_000)
    yield "program", b"\x7fELF" + bytes(1000)
    yield "pickle", b"\x80\x04\x95" + bytes(100)
    yield "a URL", b"http://127.0.0.1:8081/models"
    yield "base64 of a JPEG", b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQ"
    yield "a file name", b"cat.jpg"
    yield "a path", b"/etc/passwd"


def _empty_png(width: int, height: int) -> bytes:
    return png_header(width, height, 8, 2) + chunk(b"IDAT", zlib.compress(b"\0"))


def jpeg_with_size(jpeg: bytes, width: int, height: int, marker: int | None = None) -> bytes:
    """Change the size in a JPEG's header, and its kind of frame."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2")) + 1
    kind = bytes([marker or jpeg[at]])
    return (
        jpeg[:at]
        + kind
        + jpeg[at + 1 : at + 4]
        + struct.pack(">HH", height, width)
        + jpeg[at + 8 :]
    )


def jpeg_of_scans(progressive: bytes, scans: int) -> bytes:
    """Repeat the last scan of a progressive JPEG."""
    last = progressive.rindex(b"\xff\xda")
    return progressive[:-2] + progressive[last:-2] * scans + b"\xff\xd9"


def tiff_of_pages(pages: int) -> bytes:
    """Return a TIFF with pages of 8 x 8."""
    small = Image.new("L", (8, 8))
    return encode(small, "TIFF", save_all=True, append_images=[small] * (pages - 1))
