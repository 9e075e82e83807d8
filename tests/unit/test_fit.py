"""Images that are not square: cropped, squashed or padded, as timm's own transforms do."""

import io
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from handler.inference import explain
from handler.settings import Preprocessing
from tests.images import decoded, encode, generated, photographs

TIMMS = {"crop": "center", "squash": "squash", "pad": "border"}
# Without those of which the others make one row or column.
IMAGES = [
    (title, image.convert("RGB"))
    for images in (islice(photographs(), 0, None, 13), islice(generated(), 0, None, 19))
    for title, image in images
    if max(image.size) <= 60 * min(image.size)
]


@pytest.mark.parametrize(("percent", "interpolation"), [(1.0, "bilinear"), (0.875, "bicubic")])
@pytest.mark.parametrize("fit", TIMMS)
def test_pixels_equal_timms_transform(fit: str, percent: float, interpolation: str) -> None:
    resize = int(96 / percent)
    preprocessing = Preprocessing(resize, 96, interpolation=interpolation, fit=fit)
    theirs = transforms_imagenet_eval(
        96,
        crop_pct=percent,
        crop_mode=TIMMS[fit],
        interpolation=interpolation,
        mean=preprocessing.mean,
        normalize=False,
    )
    assert len(IMAGES) > 10
    for title, rgb in IMAGES:
        mine = decoded(encode(rgb, compress_level=1), preprocessing).pixels
        assert np.array_equal(mine, theirs(rgb).numpy()), (title, rgb.size)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_the_longest_images_give_an_input_of_the_usual_size(fit: str) -> None:
    strip = encode(Image.new("RGB", (60_000, 1), (255, 0, 0)))
    pixels = decoded(strip, Preprocessing(224, 224, fit=fit)).pixels
    assert pixels.shape == (3, 224, 224)
    assert pixels[0].max() == 255


def test_a_heat_map_of_a_padded_image_has_no_border() -> None:
    """The model's input is a square; only the middle rows of the map are the image's."""
    preprocessing = Preprocessing(96, 96, fit="pad")
    wide = encode(Image.new("RGB", (400, 200), (200, 200, 200)))
    photo = decoded(wide, preprocessing, preview_side=1024)
    assert photo.crop == (0, -100, 400, 300)
    rows = np.zeros((4, 4), np.float32)
    rows[0] = 1  # all of it in the border above
    with Image.open(io.BytesIO(explain.heat_map(photo, rows))) as heat:
        shown = np.asarray(heat).astype(int)
    assert shown.shape == (200, 400, 3)
    assert np.ptp(shown[60:], axis=(0, 1)).max() <= 2, "nothing below the border is warm"
