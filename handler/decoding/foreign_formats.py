"""Recognize file formats that are uploaded by mistake, to name them in the error message."""

import codecs
import re

from PIL import Image

# Offset, bytes, and name with its article. The first match counts.
_SIGNATURES = (
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript or EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS"),
    (0, b"8BPS", "a Photoshop (PSD)"),
    (0, b"\x00\x00\x01\x00", "an icon (ICO)"),
    (128, b"DICM", "a DICOM"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"FUJIFILMCCD-RAW", "a camera RAW (RAF)"),
    (0, b"IIRO", "a camera RAW (ORF)"),
    (0, b"IIU\x00", "a camera RAW (RW2)"),
    (4, b"ftypcrx ", "a camera RAW (CR3)"),
    (4, b"ftyphe", "a HEIC"),
    (4, b"ftypmif1", "a HEIF"),
    (4, b"ftypmsf1", "a HEIF"),
    (4, b"ftypqt  ", "a QuickTime video (MOV)"),
    (4, b"ftyp", "an MP4 video"),
    (8, b"AVI ", "an AVI video"),
    (0, b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (0, b"PK\x03\x04", "a ZIP or Office"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office"),
    (0, b"\x1f\x8b", "a gzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip"),
    (0, b"Rar!\x1a\x07", "a RAR"),
)

# Beginnings of text formats in lower case, after a byte order mark and white space.
_TEXTS = (
    (re.compile(rb"<svg|<!doctype svg|<(\?xml|!--).*<svg", re.DOTALL), "an SVG"),
    (re.compile(rb"<!doctype html|<html|<(\?xml|!--).*<html", re.DOTALL), "an HTML"),
    (re.compile(rb"<\?xml"), "an XML"),
    (re.compile(rb'[{\[]\s*["{\[]'), "a JSON"),
)
_HEAD_BYTES = 1024

_TGA_FOOTER = b"TRUEVISION-XFILE.\x00"


def identify(data: bytes | bytearray) -> str | None:
    """Return the name of a file format that is not accepted, with its article; None if unknown."""
    head = bytes(data[:_HEAD_BYTES])
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    text = _utf8(head).lstrip().lower()
    return next((name for pattern, name in _TEXTS if pattern.match(text)), None)


def is_other_image(data: bytes | bytearray) -> bool:
    """Return whether the data is an image in a format that Pillow reads and this server rejects."""
    Image.init()
    prefix = bytes(data[:16]).ljust(16, b"\xff")
    return data.endswith(_TGA_FOOTER) or any(
        accept is not None and accept(prefix) is True for _, accept in Image.OPEN.values()
    )


def _utf8(head: bytes) -> bytes:
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if head.startswith(mark):
            return head[len(mark) :].decode(encoding, "ignore").encode()
    return head.removeprefix(codecs.BOM_UTF8)
