"""Resize pixels with Pillow, or with a SIMD package that is seven times as fast.

The SIMD package rounds differently: a tenth of the pixels differ from Pillow's by one level of 255,
very few by two. With float32 this would change probabilities by up to 0.016, so it is used only
with reduced precision, whose own rounding error is as large.
"""

from PIL import Image
from PIL import __version__ as pillow_version

try:
    import cykooz_resizer as simd  # optional: not built for every platform
except ImportError:
    simd = None

# The package reads Pillow's in-memory images, whose layout may change with a major version.
_TESTED_PILLOW = "13."

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# Left, upper, right and lower edge, in pixels.
Box = tuple[float, float, float, float]


def can_resize_fast(interpolation: str) -> bool:
    """Return whether the SIMD package can be used: it is installed and fits Pillow's version.

    Only for bilinear; bicubic results differed from Pillow's by up to 6 levels.
    """
    return (
        interpolation == "bilinear"
        and simd is not None
        and pillow_version.startswith(_TESTED_PILLOW)
    )


def resize(
    image: Image.Image,
    size: tuple[int, int],
    *,
    interpolation: str,
    box: Box | None = None,
    fast: bool = False,
) -> Image.Image:
    """Return the image resized to `size`.

    Args:
        image: an RGB image.
        size: width and height, in pixels.
        interpolation: a key of `FILTERS`; bilinear and bicubic are antialiased.
        box: the part of the image to resize; all of it by default.
        fast: use the SIMD package if it can be used.
    """
    if not (fast and can_resize_fast(interpolation)):
        return image.resize(size, FILTERS[interpolation], box=box)
    left, top, right, bottom = box or (0, 0, *image.size)
    # Rounding can put an edge a trillionth of a pixel outside, which the package rejects.
    left, top = max(0.0, left), max(0.0, top)
    options = simd.ResizeOptions(
        simd.ResizeAlg.convolution(simd.FilterType.bilinear),
        crop_box=simd.CropBox(
            left, top, min(right, image.width) - left, min(bottom, image.height) - top
        ),
    )
    result = Image.new("RGB", size)
    simd.Resizer().resize_pil(image, result, options)
    return result
