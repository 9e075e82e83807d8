"""The names of file formats that people send and this server does not read, by how they begin.

A refusal that says 'this is a camera RAW (CR3)' tells its reader what to do; 'not a picture' of a
file that shows as one everywhere else does not.
"""

import codecs

# Enough to tell a format by, with a byte order mark, white space or an XML header before it.
_HEAD_BYTES = 1024

# Where, and which bytes stand there. The first that fits counts, so that the longer come first.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    # Pictures of screens, printers and games
    (0, b"\x00\x00\x01\x00", "an icon (ICO)"),
    (0, b"\x00\x00\x02\x00", "a cursor (CUR)"),
    (0, b"icns", "an Apple icon (ICNS)"),
    (0, b"qoif", "a QOI"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"\xabKTX ", "a KTX texture"),
    (0, b"\x13\xab\xa1\x5c", "an ASTC texture"),
    (0, b"\x01\xda", "an SGI"),
    (0, b"\x59\xa6\x6a\x95", "a Sun raster"),
    (0, b"FLIF", "a FLIF"),
    (0, b"BPG\xfb", "a BPG"),
    (0, b"farbfeld", "a farbfeld"),
    (0, b"/* XPM */", "an XPM"),
    (0, b"\x8aMNG\r\n\x1a\n", "an MNG animation"),
    (0, b"\x8bJNG\r\n\x1a\n", "a JNG"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)"),
    (40, b" EMF\x00\x00\x01\x00", "a Windows metafile (EMF)"),
    # The JPEGs after JPEG
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 codestream"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"II\xbc", "a JPEG XR"),
    # Editors
    (0, b"8BPS", "a Photoshop (PSD)"),
    (0, b"gimp xcf", "a GIMP (XCF)"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS"),
    (0, b"%!PS", "a PostScript"),
    (0, b"%PDF", "a PDF"),
    (0, b"AT&TFORM", "a DjVu"),
    # High dynamic range, science and medicine
    (0, b"\x76\x2f\x31\x01", "an OpenEXR"),
    (0, b"#?RADIANCE", "a Radiance HDR"),
    (0, b"#?RGBE", "a Radiance HDR"),
    (0, b"SIMPLE  =", "a FITS"),
    (128, b"DICM", "a DICOM"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5"),
    (344, b"n+1\x00", "a NIfTI"),
    (0, b"\x93NUMPY", "a NumPy array"),
    # Cameras' RAW files; those that are TIFFs are told by `handler.tiff`.
    (0, b"FUJIFILMCCD-RAW", "a camera RAW (RAF)"),
    (0, b"IIRO", "a camera RAW (ORF)"),
    (0, b"IIRS", "a camera RAW (ORF)"),
    (0, b"MMOR", "a camera RAW (ORF)"),
    (0, b"IIU\x00", "a camera RAW (RW2)"),
    (0, b"FOVb", "a camera RAW (X3F)"),
    (0, b"\x00MRM", "a camera RAW (MRW)"),
    (6, b"HEAPCCDR", "a camera RAW (CRW)"),
    (4, b"ftypcrx ", "a camera RAW (CR3)"),
    # Films and sound
    (4, b"ftypheic", "a HEIC"),
    (4, b"ftypheix", "a HEIC"),
    (4, b"ftyphevc", "a HEIC"),
    (4, b"ftypmif1", "a HEIF"),
    (4, b"ftypmsf1", "a HEIF"),
    (4, b"ftypqt  ", "a QuickTime video (MOV)"),
    (4, b"ftypM4A", "an M4A"),
    (4, b"ftyp3g", "a 3GP video"),
    (4, b"ftyp", "an MP4 video"),
    (4, b"moov", "a QuickTime video (MOV)"),
    (4, b"mdat", "a QuickTime video (MOV)"),
    (8, b"AVI ", "an AVI video"),
    (8, b"WAVE", "a WAV"),
    (8, b"ACON", "an animated cursor (ANI)"),
    (0, b"RIFF", "an AVI or WAV"),
    (0, b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (0, b"\x00\x00\x01\xba", "an MPEG video"),
    (0, b"\x00\x00\x01\xb3", "an MPEG video"),
    (0, b"FLV\x01", "a Flash video"),
    (0, b"ID3", "an MP3"),
    # What pictures are packed in
    (0, b"PK\x03\x04", "a ZIP or Office"),
    (0, b"\x1f\x8b", "a gzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip"),
    (0, b"Rar!\x1a\x07", "a RAR"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard"),
    (0, b"BZh", "a bzip2"),
    (0, b"\xfd7zXZ\x00", "an XZ"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office"),
)

# Text, after a byte order mark and white space, in lower case.
_TEXTS = (
    (b"<svg", "an SVG"),
    (b"<!doctype svg", "an SVG"),
    (b"<!doctype html", "an HTML"),
    (b"<html", "an HTML"),
    (b"#define", "an XBM"),
)
_XML = (b"<?xml", b"<!--")

# Netpbm: these letters and white space, or a comment.
_NETPBM = {
    b"P1": "a PBM",
    b"P2": "a PGM",
    b"P3": "a PPM",
    b"P4": "a PBM",
    b"P5": "a PGM",
    b"P6": "a PPM",
    b"P7": "a PAM",
    b"PF": "a PFM",
    b"Pf": "a PFM",
}

_TGA_FOOTER = b"TRUEVISION-XFILE.\x00"
# Of a TGA without that footer: colour maps, image types and bits per pixel that there are.
_TGA_TYPES = {0: {2, 3, 10, 11}, 1: {1, 9}}
_TGA_BITS = {8, 15, 16, 24, 32}
_TGA_MAP_BITS = {15, 16, 24, 32}
_TGA_HEADER = 18

_PCX_VERSIONS = {0, 2, 3, 4, 5}
_PCX_BITS = {1, 2, 4, 8}


def name_of(data: bytes | bytearray) -> str | None:
    """The name of a well-known format that is not read here, with its article; None if unknown."""
    head = bytes(data[:_HEAD_BYTES])
    # First, since the usual TGA begins with the four bytes of a cursor.
    if _is_tga(head, data):
        return "a TGA"
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    return _netpbm(head) or _text(head) or _pcx(head)


def _netpbm(head: bytes) -> str | None:
    if head[2:3].isspace() or head[2:3] == b"#":
        return _NETPBM.get(head[:2])
    return None


def _text(head: bytes) -> str | None:
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if head.startswith(mark):
            head = head[len(mark) :].decode(encoding, "ignore").encode()
    text = head.lstrip().lower()
    for beginning, name in _TEXTS:
        if text.startswith(beginning):
            return name
    if text.startswith(_XML):
        if b"<svg" in text:
            return "an SVG"
        return "an HTML" if b"<html" in text else "an XML or SVG"
    return None


def _is_tga(head: bytes, data: bytes | bytearray) -> bool:
    """A TGA has no beginning of its own: its footer is sure, its header's numbers are nearly so."""
    if data.endswith(_TGA_FOOTER):
        return True
    if len(head) < _TGA_HEADER:
        return False
    has_map, kind, map_of, bits, flags = head[1], head[2], head[3:8], head[16], head[17]
    return (
        kind in _TGA_TYPES.get(has_map, ())
        and (map_of[4] in _TGA_MAP_BITS if has_map else not any(map_of))
        and bits in _TGA_BITS
        and any(head[12:14])
        and any(head[14:16])
        # The two highest bits are never set; the lowest four count the bits of alpha.
        and flags < 0x40  # noqa: PLR2004
        and flags & 15 in {0, 1, 8}
    )


def _pcx(head: bytes) -> str | None:
    sound = (
        len(head) >= 4  # noqa: PLR2004
        and head[0] == 0x0A  # noqa: PLR2004
        and head[1] in _PCX_VERSIONS
        and head[2] == 1
        and head[3] in _PCX_BITS
    )
    return "a PCX" if sound else None
