"""The fast resize: within two levels of Pillow's for any size and box, and optional."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handler.decoding import transform as module
from handler.decoding.transform import crop_box, resize_and_crop
from handler.settings import ModelCard, Preprocessing

pytestmark = pytest.mark.slow  # the package comes with the group precision


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def difference(image: Image.Image, preprocessing: Preprocessing) -> int:
    """The most levels between the fast way and Pillow's."""
    fast, exact = (
        np.asarray(resize_and_crop(image, preprocessing, fast=fast)).astype(int)
        for fast in (True, False)
    )
    assert fast.shape == exact.shape
    return int(np.abs(fast - exact).max())


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    fit=st.sampled_from(["crop", "squash", "pad"]),
    seed=st.integers(0, 9),
)
def test_no_pixel_is_more_than_two_levels_from_pillows(
    width: int, height: int, fit: str, seed: int
) -> None:
    image = noise(width, height, seed)
    assert difference(image, Preprocessing(fit=fit)) <= 2


def test_extreme_sizes_and_boxes_whose_edge_rounds_to_outside() -> None:
    # Of long images both compute only the crop; Pillow has the box in 32 bits.
    for size in ((1, 30_000), (30_000, 1), (255, 255), (4000, 3000), (3, 2000)):
        assert difference(noise(*size), Preprocessing()) <= 2
    image = noise(333, 777)
    left, top, right, bottom = crop_box(image.size, Preprocessing(resize=224))
    box = (left - 1e-12, top, right + 1e-12, bottom)
    small = module.resize(image, (224, 224), interpolation="bilinear", box=box, fast=True)
    assert small.size == (224, 224)


def test_it_is_used_only_with_the_measured_interpolation_and_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = noise(400, 300)
    for interpolation in ("bicubic", "nearest"):
        assert difference(image, Preprocessing(interpolation=interpolation)) <= 0
    assert difference(image, Preprocessing()) == 1
    monkeypatch.setattr(module, "pillow_version", "14.0.0")
    assert difference(image, Preprocessing()) == 0


def test_without_the_package_pillow_resizes() -> None:
    code = (
        "import sys, json; sys.modules['cykooz_resizer'] = None\n"
        "from handler.decoding import transform\n"
        "from PIL import Image\n"
        "image = Image.new('RGB', (9, 9))\n"
        "small = transform.resize(image, (3, 3), interpolation='bilinear', fast=True)\n"
        "print(json.dumps([transform.can_resize_fast('bilinear'), small.size]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(run.stdout) == [False, [3, 3]]


def test_only_reduced_precision_uses_it() -> None:
    card = ModelCard("densenet121", 2, True, "w.pth", "0" * 64, "0" * 64)
    assert not card.fast_resize
    for precision in ("bf16", "int8"):
        assert ModelCard(**{**vars(card), "precision": precision}).fast_resize
