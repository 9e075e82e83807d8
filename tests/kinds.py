"""Files with every kind of pixels, written here, and their colors by plain arithmetic.

Pillow writes few of these kinds, and reads some of them wrongly.
"""

import base64
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

# Samples: integers (height, width, samples), each of 0 to 2**bits - 1.
Samples = NDArray[np.integer]

# The visible colors: uint8 (height, width, 3), red, green, blue.
Seen = NDArray[np.uint8]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
NO_COMPRESSION, DEFLATE = 1, 8

_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# --- Visible colors ---


def to_8_bits(samples: Samples, bits: int) -> NDArray[np.int64]:
    """Scale to 0 to 255; of more than 8 bits, keep the 8 highest."""
    wide = samples.astype(np.int64)
    return wide >> (bits - 8) if bits > 8 else wide * 255 // (2**bits - 1)


def gray(levels: NDArray[np.integer]) -> Seen:
    """Return the colors of levels, (height, width, 1)."""
    return levels.astype(np.uint8).repeat(3, axis=2)


def on_white(
    colors: NDArray[np.integer], alpha: NDArray[np.integer], *, premultiplied: bool = False
) -> Seen:
    """Composite colors of 8 bits, (height, width, 1 or 3), with alpha, (height, width, 1)."""
    under = colors if premultiplied else colors * (alpha / 255)
    return np.broadcast_to(np.rint(under + (255.0 - alpha)), (*colors.shape[:2], 3)).astype(
        np.uint8
    )


def from_cmyk(inks: NDArray[np.integer]) -> Seen:
    """Convert without a color profile: multiply the light that each ink and black leave."""
    return np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:4]) / 255).astype(np.uint8)


# --- Writers ---


def packed(samples: Samples, bits: int, order: str = ">") -> list[bytes]:
    """Return the bytes of each row of (height, width, samples), padded to whole bytes."""
    rows = samples.reshape(len(samples), -1)
    if bits % 8 == 0:
        return [row.tobytes() for row in rows.astype(f"{order}u{bits // 8}")]
    each_bit = rows[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return [row.tobytes() for row in np.packbits(each_bit.reshape(len(rows), -1), axis=1)]


# Types of values, in TIFF and in `struct`.
_SHORT, _LONG = (3, "H"), (4, "I")

Tag = tuple[tuple[int, str], Sequence[int]]


def shorts(*values: int) -> Tag:
    """Return a tag's value of 16-bit numbers."""
    return _SHORT, values


def longs(*values: int) -> Tag:
    """Return a tag's value of 32-bit numbers."""
    return _LONG, values


def tiff(  # a tag each
    samples: Samples | Sequence[bytes],
    bits: int,
    photometric: int,
    *,
    size: tuple[int, int, int] | None = None,
    order: str = "<",
    in_planes: bool = False,
    reversed_bits: bool = False,
    extra: Sequence[int] = (),
    number: int = 1,
    compression: int = NO_COMPRESSION,
    strips: int = 2,
    tags: Mapping[int, Tag] | None = None,
    without: Iterable[int] = (),
) -> bytes:
    """Return a TIFF of one page.

    Args:
        samples: of the image, or whole strips as in the file, which need `size`.
        bits: per sample.
        photometric: the color space.
        size: height, width and samples per pixel.
        order: `<` or `>`.
        in_planes: one channel after the other, instead of pixel by pixel.
        reversed_bits: the first pixel is in the lowest bits.
        extra: meanings of the samples after the colors.
        number: 1 unsigned, 2 signed, 3 floating-point.
        compression: only deflate is applied here; other strips must be compressed already.
        strips: per plane.
        tags: additional ones, or other values.
        without: tags to leave out.
    """
    if isinstance(samples, np.ndarray):
        height, width, count = samples.shape
        rows_a_strip = -(-height // strips)
        planes = np.split(samples, count, axis=2) if in_planes else [samples]
        chunks = [
            b"".join(packed(plane[top : top + rows_a_strip], bits, order))
            for plane in planes
            for top in range(0, height, rows_a_strip)
        ]
    else:
        assert size is not None
        (height, width, count), chunks, rows_a_strip = size, list(samples), size[0]
    if compression == DEFLATE:
        chunks = [zlib.compress(chunk) for chunk in chunks]
    if reversed_bits:
        chunks = [chunk.translate(_REVERSED_BITS) for chunk in chunks]
    starts = itertools.accumulate((len(chunk) for chunk in chunks), initial=8)
    entries: dict[int, Tag] = {
        256: shorts(width),
        257: shorts(height),
        258: shorts(*[bits] * count),
        259: shorts(compression),
        262: shorts(photometric),
        266: shorts(2 if reversed_bits else 1),
        273: (_LONG, list(starts)[:-1]),
        277: shorts(count),
        278: shorts(rows_a_strip),
        279: (_LONG, [len(chunk) for chunk in chunks]),
        284: shorts(2 if in_planes else 1),
        338: shorts(*extra),
        339: shorts(*[number] * count),
        **(tags or {}),
    }
    for tag in (*without, *([] if extra else [338])):
        del entries[tag]
    body = b"".join(chunks)
    beginning = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body))
    return beginning + body + directory(entries, 8 + len(body), order)


def directory(entries: Mapping[int, Tag], offset: int, order: str = "<") -> bytes:
    """Return the last directory of a TIFF, at `offset`, followed by its values."""
    result, values = struct.pack(f"{order}H", len(entries)), b""
    behind = offset + 2 + 12 * len(entries) + 4
    for tag, ((kind, format_), numbers) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(numbers)}{format_}", *numbers)
        result += struct.pack(f"{order}HHI", tag, kind, len(numbers))
        if len(content) <= 4:
            result += content.ljust(4, b"\0")
        else:
            result += struct.pack(f"{order}I", behind + len(values))
            values += content
    return result + bytes(4) + values


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


PNG_START = b"\x89PNG\r\n\x1a\n"
_ADAM7 = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)


def png_header(width: int, height: int, bits: int, color_type: int, interlaced: int = 0) -> bytes:
    """Return the beginning of a PNG with its header chunk."""
    fields = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, interlaced)
    return PNG_START + chunk(b"IHDR", fields)


def png(  # a chunk or field each
    samples: Samples,
    bits: int,
    color_type: int,
    *,
    clear: bytes | None = None,
    palette: Samples | None = None,
    interlaced: bool = False,
) -> bytes:
    """Return a PNG of any kind of pixels; `clear` is its chunk tRNS."""
    height, width, _ = samples.shape
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = (samples[top::down, left::right] for top, left, down, right in passes)
    rows = b"".join(b"\0" + row for part in parts for row in packed(part, bits))
    return (
        png_header(width, height, bits, color_type, interlaced)
        + (b"" if palette is None else chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
        + (b"" if clear is None else chunk(b"tRNS", clear))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def bmp(  # a field each
    samples: Samples,
    bits: int,
    *,
    palette: Samples | None = None,
    compression: int = 0,
    masks: Sequence[int] = (),
    pixels: bytes = b"",
) -> bytes:
    """Return a BMP, bottom row first.

    With 16 and 32 bits, `samples` are whole pixels. `pixels` are run-length encoded already.
    """
    height, width, _ = samples.shape
    if not pixels:
        rows = packed(samples[::-1], bits, "<")
        pixels = b"".join(row + bytes(-len(row) % 4) for row in rows)
    colors = b"" if palette is None else bgr0(palette)
    header_size = 56 if masks else 40
    offset = 14 + header_size + len(colors)
    fields = (width, height, 1, bits, compression, len(pixels), 0, 0, len(colors) // 4, 0)
    header = struct.pack("<IiiHHIIiiII", header_size, *fields)
    field = struct.pack("<4I", *masks) if masks else b""
    start = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    return start + header + field + colors + pixels


def bgr0(palette: Samples) -> bytes:
    """Return a BMP's palette from (colors, 3)."""
    padded = np.pad(palette[:, ::-1], ((0, 0), (0, 1)))
    return padded.astype(np.uint8).tobytes()


def segment(marker: int, content: bytes = b"") -> bytes:
    """Return a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


# One image of 40 x 30: with Huffman coding, and converted losslessly by libjpeg-turbo's
# `jpegtran -arithmetic`, baseline and progressive.
_START = b"\xff\xd8\xff"
HUFFMAN_JPEG, *ARITHMETIC_JPEGS = (
    _START + rest
    for rest in zlib.decompress(
        base64.b85decode(
            "c-s4a<NpH&0WUXCHwH#V1_nkTWcYuZ!I?pXk6(zNS42oaNL*AzLe5B0PDVz~R!2|8$kV~c+ugy<H6W@uDIhdA%+)QWBQ"
            ">|Yy0NLzFQIpOPwlkgy2cuiA&jEp;&M`Q){2VOHNkGdH6(-o2N(o77~~i<m>HEAm;@P_1sVSzVUS>8U}9!K20$(&3s6Q"
            "?fPo1J7+K)*j7$v7f{H9chQf}4iL6Ew7k&g8z{tQ1@-2!9EFhyL1sQ=7D26i%GASDVzs11A%m{P>vmk>#gI=g>r9y^=B"
            "=b9^3-34&X1H&+x^T{^P4bn^M8OkoRb62msVw~V=ayAhXUx+(^{HL?fc*WRlE=bA?H)^=S;uW0@NkoteejK(9;fO%pIt"
            "q=uQRLsK45&`W8b0U>{3F$+b?EssM;mKc4(%mLCf02mwe3$KU$_R?VZ@Sr{n(d#+TdgJ-pHAd2I7DwH&(*)4%9P^G!X+"
            "=aMva({Y7{*8PbewXSAofAN&%Jah5b@|{}z0d`8~EZ(kO-_mqJ_BWI9N@dN|INucuo)&IOndbZd=KsN+0#0J4fHMqS3<"
            "3hIi~@qJsPS?@@NP<1fSj-#Yr*|bf8{;CI5`$xt(bnC<A<Em{hI~VHdBvTNi5ntQ}ckZ;iq@6z8=n#`y_r(ZZ50+t6Ac"
            "yy=mW0h~L%a>6yM`qUPb6<puh0KF(8O^_n0qefY~X(RXQ+{<*Sz=oV{VA10Ap=Crvtw#(h?&MK|>mhy)j@1NN>H;qeJ="
            "F8eTqxhTWuE$H<VtO9>HG-*Ir6t&SY3m-hH&OfjcP1}YnWwb&++_cb<8yrO*fkw1Dc3yoLn7*-`a}bjy6$;TUcK_R`mv"
            "=)@RI7LK_4}zutg0Ug8-udELsGZ1%S@p-Mu23bt@Z>grnE?hDniXjX-5A0-(6#0D6m&mC0L5@%6mpE#^nPy4c=bycJ%s"
            "YTs?oCw?CjKnevR3V|8cp78*Z024^y>H!q9*zB3k@XmeDH4W7Ud&O<%SmQG0J=lA3bEYHHnJQ1U6_vr;o(b3Ye_66h&`"
            "BZhg4~=l$L_Y@som6C!L#b!k-UNim><BUfdEfl%`yix=Lm3pU)F%;A_1)?`M3uTX!Z*T>+3nr(Ei+07=J_e`syufdAVf"
            "Gxfyf&7JIjIZTQc?_9{ZGc=t;Fl}qDPoAwkvTM`wd7<p`?;`<MMpE?;gY|BZW>6s@bQ4{-pnW3V%!oyl0qp!;@RJvS|*"
            "&EC9|0V!@U=-f"
        )
    ).split(_START)[1:]
)


# 8 x 8, process 14 (ITU-T T.81, annex H).
_LOSSLESS_JPEG = zlib.decompress(
    base64.b85decode(
        "c-s4a<Nsj>K@J8WWM&j(U=n0t7G(H;gh7P?1Oyq703#DK3o9Et2PYRd4=*3T!2eqeJj{#?ObpBnj0_CUzvM6ci)"
        "WaJiI{%O8w%p{|K9`vpz}}h"
    )
)


# --- Supported kinds ---


def read(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    """Yield names, files and their colors, made from a photograph with even sides."""
    yield from _read_tiffs(photograph)
    yield from _read_pngs(photograph)
    yield from _read_bmps(photograph)
    down, right = np.mgrid[:8, :8]
    steps = np.stack([right * 30, down * 30, (down + right) * 15], axis=2)
    yield "JPEG lossless", _LOSSLESS_JPEG, steps.astype(np.uint8)


def luma(photograph: Seen) -> NDArray[np.uint8]:
    """Return the luminance, (height, width, 1)."""
    return np.rint(photograph @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None]


def deepened(samples: NDArray[np.integer], bits: int) -> Samples:
    """Convert 8 bits to more, whose lower ones are noise, or to fewer."""
    if bits <= 8:
        return samples >> (8 - bits)
    noise = np.random.default_rng(bits).integers(0, 2 ** (bits - 8), samples.shape)
    return (samples.astype(np.int64) << (bits - 8)) | noise


def slope(height: int, width: int) -> NDArray[np.uint8]:
    """Return alpha from clear at the top to opaque: (height, width, 1)."""
    rows = np.linspace(0, 255, height).astype(np.uint8)
    return np.broadcast_to(rows[:, None, None], (height, width, 1))


def palette_of(photograph: Seen, bits: int) -> tuple[Samples, Samples]:
    """Quantize by the green channel: indices (height, width, 1) and colors (2**bits, 3)."""
    indices = photograph[..., 1:2] >> (8 - bits)
    colors = [
        photograph[indices[..., 0] == index].mean(axis=0) if (indices == index).any() else [0] * 3
        for index in range(2**bits)
    ]
    return indices, np.rint(colors).astype(np.int64)


def color_map(colors: Samples) -> dict[int, Tag]:
    """Return a TIFF's palette: 16 bits, all reds first."""
    return {320: shorts(*(colors.T * 257).ravel().tolist())}


def _read_tiffs(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    """Yield a few; `unit/test_rgb` has all combinations of tags."""
    levels, alpha = luma(photograph), slope(*photograph.shape[:2])
    yield "TIFF of 64-bit offsets", _big_tiff(levels, "<"), gray(levels)
    data = tiff(deepened(photograph, 16), 16, RGB, order=">", compression=DEFLATE, in_planes=True)
    yield "TIFF 16-bit RGB planes, big-endian", data, photograph
    with_alpha = deepened(np.concatenate([photograph, alpha], 2), 16)
    data = tiff(with_alpha, 16, RGB, extra=[2])
    yield "TIFF 16-bit RGB and alpha", data, on_white(photograph, alpha)
    inks = np.concatenate([255 - photograph, alpha // 2], 2)
    yield "TIFF 16-bit CMYK", tiff(deepened(inks, 16), 16, CMYK), from_cmyk(inks)
    indices, colors = palette_of(photograph, 4)
    data = tiff(indices, 4, PALETTE, tags=color_map(colors))
    yield "TIFF 4-bit palette", data, colors[indices[..., 0]].astype(np.uint8)


def _read_pngs(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    levels, alpha = luma(photograph), slope(*photograph.shape[:2])
    for bits in (1, 2, 4, 8, 16):
        samples = deepened(levels, bits)
        shown = gray(to_8_bits(samples, bits))
        yield f"PNG {bits}-bit gray", png(samples, bits, 0), shown
        level = int(np.bincount(samples.ravel()).argmax())
        data = png(samples, bits, 0, clear=struct.pack(">H", level))
        yield f"PNG {bits}-bit gray, a clear level", data, np.where(samples == level, 255, shown)
    for bits in (8, 16):
        samples = deepened(photograph, bits)
        if bits == 8:
            color = samples[10, 10]
            data = png(samples, bits, 2, clear=struct.pack(">HHH", *color.tolist()))
            is_clear = (samples == color).all(axis=2, keepdims=True)
            yield "PNG 8-bit RGB, a clear color", data, np.where(is_clear, 255, photograph)
        for color_type, colors in ((4, levels), (6, photograph)):
            data = png(deepened(np.concatenate([colors, alpha], 2), bits), bits, color_type)
            shown = on_white(colors, alpha)
            yield f"PNG {bits}-bit {'gray' if color_type == 4 else 'RGB'} and alpha", data, shown
    for bits in (1, 2, 4, 8):
        indices, palette = palette_of(photograph, bits)
        clear = np.linspace(0, 255, 2**bits).astype(np.uint8)
        data = png(indices, bits, 3, palette=palette, clear=clear.tobytes())
        shown = on_white(palette[indices[..., 0]], clear[indices])
        yield f"PNG {bits}-bit palette, clear entries", data, shown


def _read_bmps(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    levels = luma(photograph)
    black_and_white = np.array([[0] * 3, [255] * 3])
    for bits in (1, 4, 8):
        data = bmp(levels >> 7, bits, palette=black_and_white)
        yield f"BMP {bits}-bit, black and white", data, gray((levels >> 7) * 255)
    pairs = np.concatenate([np.ones_like(levels), levels >> 7], 2).reshape(len(levels), -1)
    runs = b"".join(row.tobytes() + b"\0\0" for row in pairs[::-1])
    data = bmp(levels >> 7, 8, palette=black_and_white, compression=1, pixels=runs)
    yield "BMP run-length, black and white", data, gray((levels >> 7) * 255)
    ramp = np.arange(16).repeat(3).reshape(16, 3)
    yield "BMP 4-bit, nearly black", bmp(levels >> 4, 4, palette=ramp), gray(levels >> 4)
    indices, palette = palette_of(photograph, 4)
    data = bmp(indices, 4, palette=palette)
    yield "BMP 4-bit palette", data, palette[indices[..., 0]].astype(np.uint8)
    red, green, blue = (
        photograph[..., channel : channel + 1].astype(np.int64) for channel in range(3)
    )
    few = (red >> 3 << 10) | (green >> 3 << 5) | blue >> 3
    shown = (photograph >> 3).astype(np.int64) * 255 // 31
    yield "BMP 16-bit", bmp(few, 16), shown.astype(np.uint8)
    alpha = slope(*photograph.shape[:2]).astype(np.int64)
    whole = (alpha << 24) | (red << 16) | (green << 8) | blue
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    data = bmp(whole, 32, compression=3, masks=masks)
    yield "BMP 32-bit with alpha", data, on_white(photograph, alpha)
    yield "BMP 32-bit, the fourth byte unused", bmp(whole, 32), photograph


# --- Unsupported kinds ---


def unread(photograph: Seen) -> Iterator[tuple[str, bytes, str]]:
    """Yield names, files, and parts of their error messages."""
    yield from _unread_tiffs(photograph)
    yield from _camera_files(photograph)
    yield from _unread_jpegs()
    levels = luma(photograph)
    yield "BMP 2-bit", bmp(levels >> 6, 2, palette=np.zeros((4, 3), int)), r"depth \(2\)"
    yield "BMP with a JPEG", bmp(levels, 32, compression=4), r"compression \(4\)"
    data = bmp(levels, 16, compression=3, masks=(0xF00, 0xF0, 0xF, 0))
    yield "BMP 4-4-4", data, "bitfields layout"
    yield "PNG of iOS", PNG_START + b"\0\0\0\4CgBI" + bytes(100), "CgBI"
    clear = png(deepened(photograph, 16), 16, 2, clear=bytes(6))
    yield "PNG 16-bit RGB, a clear color", clear, "16-bit RGB with a transparent color"


def _unread_tiffs(photograph: Seen) -> Iterator[tuple[str, bytes, str]]:
    levels, alpha = luma(photograph), slope(*photograph.shape[:2])
    inks = np.concatenate([photograph, alpha], 2)
    gray_alpha = np.concatenate([levels, alpha], 2)
    gray_ = partial(tiff, photometric=BLACK_IS_ZERO)
    for name, data, words in (
        ("signed 8-bit", gray_(levels >> 1, 8, number=2), "signed 8-bit gray"),
        ("float 32-bit RGB", tiff(photograph, 32, RGB, number=3), "floating-point 32-bit RGB"),
        ("undefined numbers", gray_(levels, 8, number=4), "undefined 8-bit gray"),
        ("complex", gray_(levels, 64, number=6), "complex 64-bit"),
        ("32-bit", gray_(levels, 32), "32-bit gray"),
        ("12-bit", gray_(levels, 12), "12-bit gray"),
        ("16-bit, white is zero", tiff(levels, 16, WHITE_IS_ZERO), "gray where white is zero"),
        ("5, 6 and 5 bits", tiff(photograph, 8, RGB, tags={258: shorts(5, 6, 5)}), "different"),
        ("CIELab", tiff(photograph, 8, CIELAB), "8-bit CIELab"),
        ("LogLuv", tiff(photograph, 16, 32845), r"unknown colors \(32845\)"),
        ("no photometric tag", gray_(levels, 8, without=[262]), r"unknown colors \(None\)"),
        ("other inks", tiff(inks, 8, CMYK, tags={332: shorts(2)}), "inks other than CMYK"),
        (
            "RGB with an undeclared sample",
            tiff(inks, 8, RGB),
            "with 4 samples a pixel instead of 3",
        ),
        (
            "gray, alpha in its plane",
            gray_(gray_alpha, 8, extra=[2], in_planes=True),
            "transparency in a plane",
        ),
        ("RGB, bits reversed", tiff(photograph, 8, RGB, reversed_bits=True), "reverse order"),
        ("YCbCr", tiff(photograph, 8, YCBCR), "without JPEG compression"),
        (
            "a palette of bytes",
            tiff(levels >> 4, 4, PALETTE, tags={320: shorts(*range(48))}),
            "palette has 8 bits",
        ),
        ("old JPEG", gray_(levels, 8, tags={259: shorts(6)}), r"tiff_jpeg compression \(6\)"),
        ("LERC", gray_(levels, 8, tags={259: shorts(34887)}), r"unknown compression \(34887\)"),
        ("big-endian, 64-bit", _big_tiff(levels), "Accepted are: JPEG"),
    ):
        yield f"TIFF {name}", data, words


def _big_tiff(levels: Samples, order: str = ">") -> bytes:
    height, width, _ = levels.shape
    numbers = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: height}
    numbers[279] = levels.size
    start = b"II+\0" if order == "<" else b"MM\0+"
    result = start + struct.pack(f"{order}HHQ", 8, 0, 16 + levels.size) + levels.tobytes()
    result += struct.pack(f"{order}Q", len(numbers))
    for tag, number in numbers.items():
        result += struct.pack(f"{order}HHQI", tag, 4, 1, number) + bytes(4)
    return result + bytes(8)


def _camera_files(photograph: Seen) -> Iterator[tuple[str, bytes, str]]:
    """Yield RAW files: a small preview on the first page, the sensor's data below it."""
    small = photograph[::4, ::4]
    reduced = {254: longs(1)}
    yield "RAW DNG", tiff(small, 8, RGB, tags={50706: ((1, "B"), [1, 4, 0, 0])}), "camera RAW"
    yield "RAW PEF", tiff(luma(photograph), 12, 32803), "camera RAW"
    data = tiff(small, 8, RGB, tags={330: longs(0)})
    # The offset of the directory below is known only now.
    at = data.index(struct.pack("<HHI", 330, 4, 1)) + 8
    data = data[:at] + struct.pack("<I", len(data)) + data[at + 4 :]
    below = {254: longs(0), 258: shorts(12), 259: shorts(34713), 262: shorts(32803)}
    yield "RAW ARW", data + directory(below, len(data)), "camera RAW"
    cr2 = b"II*\0\x10\0\0\0CR\2\0" + bytes(4) + directory({254: shorts(0)}, 16)
    yield "RAW CR2", cr2, r"camera RAW \(CR2\)"
    yield "TIFF thumbnail first", tiff(small, 8, RGB, tags=reduced), "small copy of another"


def _unread_jpegs() -> Iterator[tuple[str, bytes, str]]:
    frame = HUFFMAN_JPEG.index(b"\xff\xc0")
    for name, offset, value, words in (
        ("12-bit", 4, 12, "12 bits a channel"),
        ("2 channels", 9, 2, "2 channels"),
        ("LS", 1, 0xF7, "a JPEG-LS"),
        ("hierarchical", 1, 0xC5, "hierarchical"),
        ("lossless arithmetic", 1, 0xCB, "lossless JPEG with arithmetic"),
    ):
        at = frame + offset
        yield f"JPEG {name}", HUFFMAN_JPEG[:at] + bytes([value]) + HUFFMAN_JPEG[at + 1 :], words


# --- Other formats ---


_SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"

# Names, beginnings of files written by hand, and parts of their error messages.
NAMED = [
    ("TGA with a footer", bytes(100) + b"TRUEVISION-XFILE.\0", "unsupported format"),
    ("cursor", b"\0\0\2\0\1\0" + bytes(100), "unsupported format"),
    ("DICOM", bytes(128) + b"DICM" + bytes(100), "a DICOM"),
    ("FITS", b"SIMPLE  =                    T" + b" " * 50, "unsupported format"),
    ("JPEG XL in boxes", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "a JPEG XL"),
    ("RAW CR3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100), r"camera RAW \(CR3\)"),
    ("RAW RAF", b"FUJIFILMCCD-RAW 0201" + bytes(100), r"camera RAW \(RAF\)"),
    ("MOV", b"\0\0\0\x14ftypqt  \0\0\2\0qt  " + bytes(100), r"QuickTime video \(MOV\)"),
    ("JSON", b'{"image": "aGk="}', "a JSON"),
    ("SVG after a byte order mark", b"\xef\xbb\xbf" + _SVG, "an SVG"),
    ("SVG in UTF-16", _SVG.decode().encode("utf-16"), "an SVG"),
    ("SVG after a comment", b"<?xml version='1.0'?>\n<!-- by a program -->\n" + _SVG, "an SVG"),
    ("HTML in small letters", b"<!doctype html><p>no such page", "an HTML"),
]
