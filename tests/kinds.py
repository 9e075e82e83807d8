"""Files of every kind of pixels, written by hand, and what they show by plain arithmetic.

Pillow writes few of these kinds, and reads some of them wrongly, so it is not asked.
"""

import base64
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# Samples: integers (height, width, samples), each of 0 to 2**bits - 1.
Samples = NDArray[np.integer]

# What a person sees: uint8 (height, width, 3), red, green, blue.
Seen = NDArray[np.uint8]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
NO_COMPRESSION, DEFLATE = 1, 8

_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# --- What a person sees ---


def to_8_bits(samples: Samples, bits: int) -> NDArray[np.int64]:
    """0 and the greatest become 0 and 255; of more than 8 bits the higher 8 count."""
    wide = samples.astype(np.int64)
    return wide >> (bits - 8) if bits > 8 else wide * 255 // (2**bits - 1)


def grey(levels: NDArray[np.integer]) -> Seen:
    """From (height, width, 1)."""
    return levels.astype(np.uint8).repeat(3, axis=2)


def on_white(
    colours: NDArray[np.integer], alpha: NDArray[np.integer], *, premultiplied: bool = False
) -> Seen:
    """Colours of 8 bits, (height, width, 1 or 3), under alpha, (height, width, 1)."""
    under = colours if premultiplied else colours * (alpha / 255)
    return np.broadcast_to(np.rint(under + (255.0 - alpha)), (*colours.shape[:2], 3)).astype(
        np.uint8
    )


def from_cmyk(inks: NDArray[np.integer]) -> Seen:
    """Without a profile: each ink takes its share of the light that black leaves."""
    return np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:4]) / 255).astype(np.uint8)


def from_ycbcr(samples: NDArray[np.integer]) -> Seen:
    """ITU-R BT.601, full range, as JPEG has it."""
    luma, blue, red = (samples[..., channel].astype(float) for channel in range(3))
    blue, red = blue - 128, red - 128
    channels = luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue
    return np.rint(np.stack(channels, axis=2)).clip(0, 255).astype(np.uint8)


# --- Writers ---


def packed(samples: Samples, bits: int, order: str = ">") -> list[bytes]:
    """Each row as bytes, filled up to a whole one; (height, width, samples)."""
    rows = samples.reshape(len(samples), -1)
    if bits % 8 == 0:
        return [row.tobytes() for row in rows.astype(f"{order}u{bits // 8}")]
    each_bit = rows[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return [row.tobytes() for row in np.packbits(each_bit.reshape(len(rows), -1), axis=1)]


# How TIFF calls the types of its tags' values, and `struct` does.
_SHORT, _LONG, _BYTE, _RATIONAL = (3, "H"), (4, "I"), (1, "B"), (5, "I")

Tag = tuple[tuple[int, str], Sequence[int]]


def shorts(*values: int) -> Tag:
    """The value of a tag."""
    return _SHORT, values


def tiff(  # noqa: PLR0913  # a tag each
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
    """A TIFF of one page.

    Args:
        samples: the picture's, or whole strips as they stand in the file.
        bits: of each sample.
        photometric: what the numbers mean.
        size: height, width and samples, where strips are given.
        order: `<` or `>`.
        in_planes: one after the other, instead of pixel by pixel.
        reversed_bits: the first pixel in the lowest bits.
        extra: what the samples are that come after the colours.
        number: unsigned, signed, floating-point.
        compression: of the strips; deflate is made here, others must be in the strips.
        strips: how many a plane.
        tags: others, or other values.
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
    """A TIFF's directory that stands at `offset`, with its values behind it, and none after it."""
    result, values = struct.pack(f"{order}H", len(entries)), b""
    behind = offset + 2 + 12 * len(entries) + 4
    for tag, ((kind, format_), numbers) in sorted(entries.items()):
        count = len(numbers) // (2 if kind == _RATIONAL[0] else 1)
        content = struct.pack(f"{order}{len(numbers)}{format_}", *numbers)
        result += struct.pack(f"{order}HHI", tag, kind, count)
        if len(content) <= 4:
            result += content.ljust(4, b"\0")
        else:
            result += struct.pack(f"{order}I", behind + len(values))
            values += content
    return result + bytes(4) + values


def png(
    samples: Samples,
    bits: int,
    colour_type: int,
    *,
    clear: bytes | None = None,
    palette: Samples | None = None,
) -> bytes:
    """A PNG with any of the standard's kinds of pixels; `clear` is its chunk tRNS."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row for row in packed(samples, bits))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if palette is not None:
        chunks.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    if clear is not None:
        chunks.append((b"tRNS", clear))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def bmp(
    samples: Samples,
    bits: int,
    *,
    palette: Samples | None = None,
    compression: int = 0,
    masks: Sequence[int] = (),
) -> bytes:
    """A BMP, bottom row first; of 16 and 32 bits `samples` are whole pixels."""
    height, width, _ = samples.shape
    rows = packed(samples[::-1], bits, "<")
    pixels = b"".join(row + bytes(-len(row) % 4) for row in rows)
    colours = b"" if palette is None else bgr0(palette)
    header_size = 56 if masks else 40
    offset = 14 + header_size + len(colours)
    header = struct.pack(
        "<IiiHHIIiiII",
        header_size,
        width,
        height,
        1,
        bits,
        compression,
        len(pixels),
        0,
        0,
        len(colours) // 4,
        0,
    )
    field = struct.pack("<4I", *masks) if masks else b""
    start = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    return start + header + field + colours + pixels


def bgr0(palette: Samples) -> bytes:
    """A BMP's palette from (colours, 3)."""
    padded = np.pad(palette[:, ::-1], ((0, 0), (0, 1)))
    return padded.astype(np.uint8).tobytes()


def segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def lossless_jpeg(samples: Samples, *, adobe: bool = False) -> bytes:
    """A JPEG of process 14 (ITU-T T.81, annex H): each sample from its left neighbour.

    With Adobe's marker, which says that the channels are the picture's own and CMYK is inverted.
    """
    height, width, count = samples.shape
    wide = samples.astype(int)
    before = np.roll(wide, 1, axis=1)
    before[1:, 0], before[0, 0] = wide[:-1, 0], 128
    bits = []
    for difference in (wide - before).ravel().tolist():
        # 17 codes of 5 bits each: how many bits the difference has, and then these.
        length = abs(difference).bit_length()
        bits.append(f"{length:05b}")
        if length:
            bits.append(
                f"{difference if difference > 0 else difference + 2**length - 1:0{length}b}"
            )
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    codes = bytes([0] * 4 + [17] + [0] * 11) + bytes(range(17))
    components = b"".join(bytes([index + 1, 0x11, 0]) for index in range(count))
    selected = b"".join(bytes([index + 1, 0]) for index in range(count))
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xEE, b"Adobe\0\x64" + bytes(5)) if adobe else b"",
            segment(0xC3, struct.pack(">BHHB", 8, height, width, count) + components),
            segment(0xC4, b"\0" + codes),
            segment(0xDA, bytes([count]) + selected + b"\1\0\0"),
            scan,
            b"\xff\xd9",
        )
    )


# One picture of 40 x 30 in three ways, the last two made of the first by libjpeg-turbo's
# `jpegtran -arithmetic`, without loss.
HUFFMAN_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-"
    "gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBplmUDiAeE-"
    "`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-"
    "e0=}F01*fP9sno<0U`hb5di}c0sq7R7ytkQ0{{R3000000000000065009L5!~i7_00II60s#a90{{R3000000RjL6"
    "5g`N;F%v;iVFfagq4EF302l!P0|5a50000000000000000s{mA|HJ?p5di@K00RI300000000000003I0wFQ~+5ij#"
    "0RRFK0}%i}04`NUc_3&g83XPj(C!JrXh*j?(9S}J8R|Td5y(b*idG0^1P?#Xrh9v6o-WGrha<or-"
    "}xEFR#iUZ8qBT>Gf?5ON<UNBY>YyC-19|9i`N4r`@l2bNWQ|y2O1Jhx6x~`db$t>!kHy7gsoxe4ufF$gp>lkk&e8G-"
    "^YRJx8C8{fl0=*<|b@Du$S~NTMm`Z4n$&=vd18Rg}-"
    "6(D%ERi^hq5F%+bcDxhfA(J|fOI?W?bZg3ulN0yC*2DP>+wsG#L>vSgM`|Je"
)
ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-"
    "gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBplmUDiAeE-"
    "`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-"
    "e0=}O01*fP9sno<0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf05#3~pP#zN=1#sW;{U1p5LP2rWc$dcr"
    "_#PtP*>HP2mBu<4qO+MPz!Nd@?&|f!ZXWU%-X5I=KkAwnWsPR`$QRu$42+k!ktxG`r*JRq@tz_DN{|;D!}OLF?q-"
    "tyMFjAR7Kg7^7-"
    "M!qvyEMfM@rnPDxWzY!a?86zMW<Y6CCudellO#&evZU+5+cQ^;iOnB!p8lrG>mk>{`E1xnrdyo+7QzlTV1poJ`z4g2"
    "r@rDZ=;|THz;=FeHA9p5*H4OFH<pj1kf$vj5o"
)
PROGRESSIVE_ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-"
    "gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBplmUDiAeE-"
    "`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-"
    "e0=}P01*fP9sno<0U`hb5di}c0sqVZ1^^HN5dYc$3<CiG0uTcb0005Ii>O-"
    "#wFV3rK}xrPl36B!|I7dc5C#9*00;pA009L8OBx~Tp2vhY#Y&0>?$O#;aH_uBN#suPVE@bj1Q7-"
    "Q+5iXv0|5a)0l@#v00a>Q|Jncu0RjO5KLORi|I7dc5C#9*00;pA00ut-"
    "%nhCI3YP!O00a;P|Jncu0RaF3KOwfx1zu>L;JwkaX+Z+adPydzc~iFL6Mv8Nq^c1@Aa2keoXp1EhunR#g?J3A?!<0z"
    "fdAS63<CiG0ssR5000mSZhWRd|I7dc5e5I+00;pC0RcY{3iqaf|I7dc5e5I+00;pB0RcY{DuN$g;6VS(00a;P|Jncu"
    "0RaF3KM)fyE<u<p^Nev{*e%zqw5<&a9XAUBZH}W$hYGO&00!z<7IV9)52>YIC4#(i=A>FuAz8+;A@A^x@`(YkwrpdW"
    "Np2b#d|mgZF(DTq;eAXp^`_8yMARI;T?GHx"
)


# --- Kinds that are read ---


def read(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    """Names, files and what they show, made from one photograph of even sides."""
    yield from _read_tiffs(photograph)
    yield from _read_pngs(photograph)
    yield from _read_bmps(photograph)
    small = photograph[:60, :80]
    yield "JPEG lossless", lossless_jpeg(small), small
    yield "JPEG lossless greyscale", lossless_jpeg(luma(small)), grey(luma(small))
    inks = np.concatenate([255 - small, slope(60, 80) // 2], 2)
    yield "JPEG lossless CMYK Adobe", lossless_jpeg(255 - inks, adobe=True), from_cmyk(inks)


def luma(photograph: Seen) -> NDArray[np.uint8]:
    """(height, width, 1)."""
    return np.rint(photograph @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None]


def deepened(samples: NDArray[np.integer], bits: int) -> Samples:
    """From 8 bits to more, of which the lower ones are noise, or to fewer."""
    if bits <= 8:
        return samples >> (8 - bits)
    noise = np.random.default_rng(bits).integers(0, 2 ** (bits - 8), samples.shape)
    return (samples.astype(np.int64) << (bits - 8)) | noise


def slope(height: int, width: int) -> NDArray[np.uint8]:
    """Alpha from clear to opaque, top to bottom: (height, width, 1)."""
    rows = np.linspace(0, 255, height).astype(np.uint8)
    return np.broadcast_to(rows[:, None, None], (height, width, 1))


def palette_of(photograph: Seen, bits: int) -> tuple[Samples, Samples]:
    """Indices (height, width, 1) and colours (2**bits, 3): green decides, the others follow."""
    indices = photograph[..., 1:2] >> (8 - bits)
    colours = [
        photograph[indices[..., 0] == index].mean(axis=0) if (indices == index).any() else [0] * 3
        for index in range(2**bits)
    ]
    return indices, np.rint(colours).astype(np.int64)


def color_map(colours: Samples) -> dict[int, Tag]:
    """A TIFF's palette: 16 bits, all reds first."""
    return {320: shorts(*(colours.T * 257).ravel().tolist())}


def _read_tiffs(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    levels, alpha = luma(photograph), slope(*photograph.shape[:2])
    for bits in (1, 2, 4, 8, 12, 16):
        samples = deepened(levels, bits)
        shown = grey(to_8_bits(samples, bits))
        yield f"TIFF {bits}-bit grey", tiff(samples, bits, BLACK_IS_ZERO), shown
        if bits != 12:
            name = f"TIFF {bits}-bit, white is zero"
            yield name, tiff(samples, bits, WHITE_IS_ZERO), 255 - shown
        if bits < 8:
            name = f"TIFF {bits}-bit, bits reversed"
            yield name, tiff(samples, bits, BLACK_IS_ZERO, reversed_bits=True), shown
    for bits in (8, 16):
        samples = deepened(photograph, bits)
        yield f"TIFF {bits}-bit RGB planes", tiff(samples, bits, RGB, in_planes=True), photograph
        big = tiff(samples, bits, RGB, order=">", compression=DEFLATE)
        yield f"TIFF {bits}-bit RGB big-endian", big, photograph
        with_alpha = deepened(np.concatenate([photograph, alpha], 2), bits)
        straight = tiff(with_alpha, bits, RGB, extra=[2])
        yield f"TIFF {bits}-bit RGB and alpha", straight, on_white(photograph, alpha)
        ignored = tiff(with_alpha, bits, RGB, extra=[0])
        yield f"TIFF {bits}-bit RGB and a sample of no meaning", ignored, photograph
        clear_below = np.where(alpha < 128, 0, 255)
        multiplied = deepened(np.concatenate([photograph * (alpha >= 128), clear_below], 2), bits)
        name = f"TIFF {bits}-bit RGB, premultiplied"
        yield name, tiff(multiplied, bits, RGB, extra=[1]), on_white(photograph, clear_below)
        inks = np.concatenate([255 - photograph, alpha // 2], 2)
        yield f"TIFF {bits}-bit CMYK", tiff(deepened(inks, bits), bits, CMYK), from_cmyk(inks)
    yield "TIFF of 64-bit offsets", _big_tiff(levels, "<"), grey(levels)
    opaque = np.full_like(alpha, 255)
    undeclared = tiff(np.concatenate([photograph, opaque], 2), 8, RGB)
    yield "TIFF RGB and an undeclared sample, all opaque", undeclared, photograph
    grey_alpha = np.concatenate([levels, alpha], 2)
    name = "TIFF grey and alpha"
    yield name, tiff(grey_alpha, 8, BLACK_IS_ZERO, extra=[2]), on_white(levels, alpha)
    for bits in (1, 2, 4, 8):
        indices, colours = palette_of(photograph, bits)
        data = tiff(indices, bits, PALETTE, tags=color_map(colours))
        yield f"TIFF {bits}-bit palette", data, colours[indices[..., 0]].astype(np.uint8)


def subsampled(photograph: Seen) -> tuple[bytes, Seen]:
    """Each four neighbours with one pair of colour differences (TIFF 6.0, section 21)."""
    height, width, _ = photograph.shape
    differences = photograph[::2, ::2, 1:]
    blocks = photograph[..., 0].reshape(height // 2, 2, width // 2, 2).swapaxes(1, 2)
    units = np.concatenate([blocks.reshape(height // 2, width // 2, 4), differences], axis=2)
    wide = differences.repeat(2, axis=0).repeat(2, axis=1)
    shown = from_ycbcr(np.concatenate([photograph[..., :1], wide], axis=2))
    tags = {530: shorts(2, 2)}
    size = (height, width, 3)
    return tiff([units.tobytes()], 8, YCBCR, size=size, tags=tags), shown


def _read_pngs(photograph: Seen) -> Iterator[tuple[str, bytes, Seen]]:
    levels, alpha = luma(photograph), slope(*photograph.shape[:2])
    for bits in (1, 2, 4, 8, 16):
        samples = deepened(levels, bits)
        shown = grey(to_8_bits(samples, bits))
        yield f"PNG {bits}-bit grey", png(samples, bits, 0), shown
        level = int(np.bincount(samples.ravel()).argmax())
        data = png(samples, bits, 0, clear=struct.pack(">H", level))
        yield f"PNG {bits}-bit grey, a clear level", data, np.where(samples == level, 255, shown)
    for bits in (8, 16):
        samples = deepened(photograph, bits)
        colour = samples[10, 10]
        data = png(samples, bits, 2, clear=struct.pack(">HHH", *colour.tolist()))
        is_clear = (samples == colour).all(axis=2, keepdims=True)
        yield f"PNG {bits}-bit RGB, a clear colour", data, np.where(is_clear, 255, photograph)
        for colour_type, colours in ((4, levels), (6, photograph)):
            data = png(deepened(np.concatenate([colours, alpha], 2), bits), bits, colour_type)
            shown = on_white(colours, alpha)
            yield f"PNG {bits}-bit {'grey' if colour_type == 4 else 'RGB'} and alpha", data, shown
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
        yield f"BMP {bits}-bit, black and white", data, grey((levels >> 7) * 255)
    ramp = np.arange(16).repeat(3).reshape(16, 3)
    yield "BMP 4-bit, nearly black", bmp(levels >> 4, 4, palette=ramp), grey(levels >> 4)
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


# --- Kinds that are not read ---


def unread(photograph: Seen) -> Iterator[tuple[str, bytes, str]]:
    """Names, files, and what a refusal must say."""
    yield from _unread_tiffs(photograph)
    yield from _camera_files(photograph)
    yield from _unread_jpegs()
    yield from _unread_bmps(photograph)
    yield "PNG of iOS", b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI" + bytes(100), "CgBI"


def _unread_tiffs(photograph: Seen) -> Iterator[tuple[str, bytes, str]]:
    levels = luma(photograph)
    alpha = slope(*photograph.shape[:2])
    for bits in (8, 16, 32):
        data = tiff(levels >> 1, bits, BLACK_IS_ZERO, number=2)
        yield f"TIFF signed {bits}-bit", data, f"signed {bits}-bit grey"
    for bits in (16, 32, 64):
        for photometric, samples in ((BLACK_IS_ZERO, levels), (RGB, photograph)):
            colours = "RGB" if photometric == RGB else "grey"
            data = tiff(samples, bits, photometric, number=3)
            yield f"TIFF float {bits}-bit {colours}", data, f"floating-point {bits}-bit {colours}"
    yield "TIFF undefined numbers", tiff(levels, 8, BLACK_IS_ZERO, number=4), "undefined 8-bit grey"
    yield "TIFF complex", tiff(levels, 64, BLACK_IS_ZERO, number=6), "complex floating-point 64-bit"
    yield "TIFF 32-bit", tiff(levels, 32, BLACK_IS_ZERO), "32-bit grey"
    yield "TIFF 10-bit", tiff(levels, 10, BLACK_IS_ZERO), "10-bit grey"
    yield "TIFF 12-bit RGB", tiff(photograph, 12, RGB), "12-bit RGB"
    deep = deepened(levels, 12)
    yield (
        "TIFF 12-bit big-endian",
        tiff(deep, 12, BLACK_IS_ZERO, order=">"),
        "12-bit grey, big-endian",
    )
    yield (
        "TIFF 12-bit, white is zero",
        tiff(deep, 12, WHITE_IS_ZERO),
        "12-bit grey where white is zero",
    )
    data = tiff(deepened(levels, 16), 16, WHITE_IS_ZERO, order=">")
    yield "TIFF 16-bit big-endian, white is zero", data, "white is zero, big-endian"
    data = tiff(photograph, 8, RGB, tags={258: shorts(5, 6, 5)})
    yield "TIFF of 5, 6 and 5 bits", data, "samples of different kinds"
    yield "TIFF mask", tiff(levels, 1, 4), "a mask"
    yield "TIFF ICCLab", tiff(photograph, 8, 9), "8-bit ICCLab"
    yield "TIFF LogLuv", tiff(photograph, 16, 32845), "16-bit LogLuv"
    yield "TIFF unknown colours", tiff(photograph, 8, 77), r"unknown colours \(77\)"
    data = tiff(levels, 8, BLACK_IS_ZERO, without=[262])
    yield "TIFF that says nothing of its colours", data, "no photometric tag"
    inks = np.concatenate([photograph, alpha], 2)
    data = tiff(inks, 8, CMYK, tags={332: shorts(2)})
    yield "TIFF of other inks", data, "inks other than CMYK"
    five = np.concatenate([inks, alpha], 2)
    yield "TIFF CMYK and alpha", tiff(five, 8, CMYK, extra=[2]), "CMYK with 5 samples"
    yield "TIFF RGB with an undeclared sample", tiff(inks, 8, RGB), "fourth channel"
    yield "TIFF RGB of 2 samples", tiff(inks[..., :2], 8, RGB), "RGB with 2 samples"
    grey_alpha = np.concatenate([levels, alpha], 2)
    data = tiff(grey_alpha, 8, BLACK_IS_ZERO, extra=[2], in_planes=True)
    yield "TIFF grey, alpha in its plane", data, "transparency in a plane of its own"
    data = tiff(grey_alpha, 16, BLACK_IS_ZERO, extra=[2])
    yield "TIFF 16-bit grey and alpha", data, "16-bit grey with 2 samples"
    data = tiff(deepened(photograph, 16), 16, RGB, reversed_bits=True)
    yield "TIFF 16-bit RGB, bits reversed", data, "bits in reverse order"
    yield "TIFF YCbCr of unknown subsampling", tiff(photograph, 8, YCBCR), "subsampled"
    data = tiff(levels >> 4, 4, PALETTE, tags={320: shorts(*range(48))})
    yield "TIFF with a palette of bytes", data, "palette has 8 bits"
    for number, name in (
        (6, "old-style JPEG"),
        (34887, "LERC"),
        (34933, "PNG"),
        (34712, "JPEG 2000"),
        (33003, "JPEG 2000"),
        (50001, "WebP"),
        (50002, "JPEG XL"),
        (34676, "SGILog"),
        (12345, r"unknown \(12345\)"),
    ):
        data = tiff([b"\0" * 1000], 8, RGB, size=(10, 10, 3), compression=number)
        yield f"TIFF {name} ({number})", data, f"TIFF with {name} compression"
    many = {tag: shorts(0) for tag in range(40_000, 41_001)}
    yield "TIFF of 1,001 tags", tiff(levels, 8, BLACK_IS_ZERO, tags=many), "more than 1000 tags"
    yield "TIFF big-endian, 64-bit", _big_tiff(levels), "big-endian and with 64-bit offsets"


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
    """A small rendered copy on the first page, the sensor's data on one below it."""
    small = photograph[::4, ::4]
    reduced = {254: (_LONG, [1])}
    yield "RAW DNG", tiff(small, 8, RGB, tags={50706: (_BYTE, [1, 4, 0, 0])}), r"camera RAW \(DNG\)"
    sensor = luma(photograph)
    yield "RAW PEF", tiff(sensor, 12, 32803), "camera RAW"
    for name, tags in (("NEF", reduced), ("ARW", {})):
        data = tiff(small, 8, RGB, tags={**tags, 330: (_LONG, [0])})
        # The first entry's value is known only now: the directory below comes last.
        at = data.index(struct.pack("<HHI", 330, 4, 1)) + 8
        data = data[:at] + struct.pack("<I", len(data)) + data[at + 4 :]
        below = {254: (_LONG, [0]), 258: shorts(12), 259: shorts(34713), 262: shorts(32803)}
        yield f"RAW {name}", data + directory(below, len(data)), "camera RAW"
    cr2 = tiff(small, 8, RGB)
    moved = b"II*\0\x10\0\0\0CR\2\0" + bytes(4)
    yield "RAW CR2", moved + directory({254: shorts(0)}, 16) + cr2, r"camera RAW \(CR2\)"
    yield "TIFF thumbnail first", tiff(small, 8, RGB, tags=reduced), "small copy of another"


def _unread_jpegs() -> Iterator[tuple[str, bytes, str]]:
    frame = HUFFMAN_JPEG.index(b"\xff\xc0")

    def changed(offset: int, value: int) -> bytes:
        data = bytearray(HUFFMAN_JPEG)
        data[frame + offset] = value
        return bytes(data)

    yield "JPEG 12-bit", changed(4, 12), "12 bits a channel"
    yield "JPEG 2 channels", changed(9, 2), "2 channels"
    yield "JPEG-LS", changed(1, 0xF7), "a JPEG-LS"
    yield "JPEG hierarchical", changed(1, 0xC5), "hierarchical"
    yield "JPEG lossless arithmetic", changed(1, 0xCB), "lossless JPEG with arithmetic"
    deep = lossless_jpeg(np.zeros((4, 4, 1), np.uint8)).replace(
        b"\xc3\0\x0b\x08", b"\xc3\0\x0b\x10"
    )
    yield "JPEG lossless 16-bit", deep, "16 bits a channel"


def _unread_bmps(photograph: Seen) -> Iterator[tuple[str, bytes, str]]:
    levels = luma(photograph)
    two = np.array([[0] * 3, [255] * 3])
    yield "BMP 2-bit", bmp(levels >> 6, 2, palette=np.zeros((4, 3), int)), "2 bits a pixel"
    yield "BMP with a JPEG", bmp(levels, 32, compression=4), "a JPEG inside"
    yield "BMP with a PNG", bmp(levels, 32, compression=5), "a PNG inside"
    data = bmp(levels, 16, compression=3, masks=(0xF00, 0xF0, 0xF, 0))
    yield "BMP 4-4-4", data, "16 bits a pixel in an unusual order"
    runs = bmp(levels >> 7, 8, palette=two, compression=1)
    yield "BMP black and white, run-length", runs, "run-length encoded and black and white"


# --- Other formats ---


def named() -> Iterator[tuple[str, bytes, str]]:
    """Names, the beginnings of files, and what a refusal must say; no library wrote these."""
    yield (
        "TGA without a footer",
        bytes([0, 0, 2, *[0] * 9, 9, 0, 9, 0, 24, 32]) + bytes(300),
        "a TGA",
    )
    yield (
        "TGA with a palette",
        bytes([0, 1, 1, 0, 0, 0, 1, 24, *[0] * 4, 9, 0, 9, 0, 8, 0]),
        "a TGA",
    )
    # Of a kind that no header tells from noise; the footer does.
    yield "TGA with a footer", bytes(100) + b"TRUEVISION-XFILE.\0", "a TGA"
    yield "PAM", b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\0", "a PAM"
    yield "PPM after a comment", b"P3#x\n1 1 1 0 0 0", "a PPM"
    yield "float map", b"PF\n1 1\n-1.0\n" + bytes(12), "a PFM"
    yield "cursor", b"\0\0\2\0\1\0" + bytes(100), "a cursor"
    yield "GIMP", b"gimp xcf v011\0" + bytes(100), "a GIMP"
    yield "DICOM", bytes(128) + b"DICM" + bytes(100), "a DICOM"
    yield "FITS", b"SIMPLE  =                    T" + b" " * 50, "a FITS"
    yield "OpenEXR", b"\x76\x2f\x31\x01\x02\0\0\0" + bytes(100), "an OpenEXR"
    yield "Radiance", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "a Radiance HDR"
    yield "JPEG XL in boxes", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "a JPEG XL"
    yield "JPEG XR", b"II\xbc\1" + bytes(100), "a JPEG XR"
    yield "FLIF", b"FLIF1" + bytes(100), "a FLIF"
    yield "RAW CR3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100), r"camera RAW \(CR3\)"
    yield "RAW RAF", b"FUJIFILMCCD-RAW 0201" + bytes(100), r"camera RAW \(RAF\)"
    yield "RAW ORF", b"IIRO\x08\0\0\0" + bytes(100), r"camera RAW \(ORF\)"
    yield "RAW RW2", b"IIU\0\x18\0\0\0" + bytes(100), r"camera RAW \(RW2\)"
    yield "MOV", b"\0\0\0\x14ftypqt  \0\0\2\0qt  " + bytes(100), r"QuickTime video \(MOV\)"
    yield "MOV of old", b"\0\1\0\0mdat" + bytes(100), r"QuickTime video \(MOV\)"
    svg = "<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "SVG after a byte order mark", b"\xef\xbb\xbf" + svg.encode(), "an SVG"
    yield "SVG after white space", b"\n\t  " + svg.encode(), "an SVG"
    yield "SVG in UTF-16", svg.encode("utf-16"), "an SVG"
    comment = b"<?xml version='1.0'?>\n<!-- by a program -->\n"
    yield "SVG after a comment", comment + svg.encode(), "an SVG"
    yield "SVG after its document type", b"<!DOCTYPE svg PUBLIC>" + svg.encode(), "an SVG"
    yield "HTML in small letters", b"<!doctype html><p>no such page", "an HTML"
