"""Class activation maps: exact, of the right class, and over the right part of the image."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from handler.decoding.pillow import DecodedImage
from handler.errors import ArchiveError
from handler.inference import explain
from handler.inference.cores import Cores
from handler.inference.engines import Extra, load_engine
from handler.inference.torch_models import empty_model
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from tests import kinds
from tests.images import decoded, encode
from tests.unit.test_handler import CELLS, SIDE, write_model

# float32 sums in another order than the model's own; logits are about 10 in size.
TOLERANCE = 1e-4


def test_a_map_sums_to_the_logit_without_the_bias(tmp_path: Path) -> None:
    """With PyTorch; with ONNX Runtime see below."""
    state = empty_model("resnet18", 10).state_dict()
    torch.save(state, tmp_path / "model.pth")
    preprocessing = Preprocessing(resize=64, crop=64)
    node = "layer4.1.relu_1"
    card = ModelCard("resnet18", 10, True, "", "", "", preprocessing, features=node)
    engine = load_engine(tmp_path / "model.pth", card, Cores(1, 1, tmp_path / "busy"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8)
    logits, features = engine.run(pixels, Extra.FEATURES)
    assert np.abs(engine.run(pixels).logits - logits).max() < TOLERANCE
    assert features.shape == (3, 512, 2, 2)
    for image, index in np.ndindex(logits.shape):
        weights = state["fc.weight"][index].numpy()
        activation = explain.class_activation_map(features[image], weights)
        assert activation.shape == (2, 2)
        assert activation.dtype == np.float32
        expected = logits[image, index] - float(state["fc.bias"][index])
        assert activation.sum() == pytest.approx(expected, abs=TOLERANCE)


def test_a_map_has_each_part_of_the_image_in_its_place(tmp_path: Path) -> None:
    """The tiny model's features are the mean colors of 2 x 2 cells."""
    write_model(tmp_path)
    card = ModelCard.load(tmp_path / MODEL_CARD)
    engine = load_engine(tmp_path / "model.onnx", card, Cores(1, 1, tmp_path / "busy"))
    colors = np.random.default_rng(3).integers(0, 256, (3, CELLS, CELLS), np.uint8)
    pixels = colors.repeat(SIDE // CELLS, axis=1).repeat(SIDE // CELLS, axis=2)
    (logits,), (features,) = engine.run(pixels[None], Extra.FEATURES)
    weights = explain.load_classifier(tmp_path / explain.CLASSIFIER, card.classes)
    assert isinstance(weights, np.memmap)  # a worker that never explains never reads them
    for index in (0, 7, card.classes - 1):
        expected = [
            [colors[:, row, column] @ weights[index] / CELLS**2 for column in range(CELLS)]
            for row in range(CELLS)
        ]
        activation = explain.class_activation_map(features, weights[index])
        np.testing.assert_allclose(activation, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert activation.sum() == pytest.approx(logits[index], abs=TOLERANCE)


# --- Heat maps ---


def photo(data: bytes | Image.Image, longest_side: int | None = explain.MAX_SIDE) -> DecodedImage:
    content = data if isinstance(data, bytes) else encode(data)
    return decoded(content, preview_side=longest_side)


def gray(width: int, height: int) -> DecodedImage:
    return photo(Image.new("RGB", (width, height), (128, 128, 128)))


def heat_image(of: DecodedImage, activation: NDArray[np.float32]) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(explain.heat_map(of, activation))) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def one_hot(row: int, column: int) -> NDArray[np.float32]:
    activation = np.zeros((7, 7), np.float32)
    activation[row, column] = 3
    return activation


def test_heat_lies_over_what_the_model_saw_and_the_rest_is_dimmed() -> None:
    of = gray(800, 400)
    left, top, right, bottom = of.crop
    assert (right - left, bottom - top) == pytest.approx((351.4, 351.4), abs=0.1)
    assert (left + right, top + bottom) == pytest.approx((800, 400), abs=2)
    image = heat_image(of, one_hot(0, 6))
    assert image.shape == (400, 800, 3)
    assert (image[:, : int(left) - 1] == 51).all()
    assert (image[:, int(right) + 2 :] == 51).all()
    assert (image[350, 250] == 128).all()
    hottest = np.unravel_index(image.astype(int).sum(axis=2).argmax(), (400, 800))
    cell = (right - left) / 7
    assert top - 1 <= hottest[0] <= top + cell
    assert right - cell <= hottest[1] <= right + 1


def test_the_image_itself_is_gray_and_only_the_heat_has_color() -> None:
    of = photo(Image.new("RGB", (300, 300), (240, 140, 40)))
    image = heat_image(of, one_hot(0, 6)).astype(int)
    assert (np.ptp(image, axis=2) == 0)[200:, :100].all()
    hottest = image[20, 280]
    assert hottest[:2].min() > hottest[2] + 50  # yellow
    uniform = heat_image(of, np.full((7, 7), 2, np.float32))
    assert (np.ptp(uniform.astype(int), axis=2) == 0).all()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        *(((2000, 1500), (1024, 768)), ((1, 1), (1, 1)), ((2, 1), (2, 1))),
        *(((1, 65_000), (1, 1024)), ((65_000, 1), (1024, 1)), ((1000, 20), (1000, 20))),
    ],
)
def test_images_of_any_size_are_shown_whole(size: tuple[int, int], shown: tuple[int, int]) -> None:
    of = gray(*size)
    assert of.size == size
    assert heat_image(of, one_hot(3, 3)).shape == (shown[1], shown[0], 3)


def test_a_heat_map_of_noise_stays_below_the_response_limit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    of = photo(Image.fromarray(noise))
    assert len(explain.heat_map(of, one_hot(0, 0))) < 3_300_000


RGB = Image.new("RGB", (40, 30), (240, 140, 40))


@pytest.mark.parametrize(
    "data",
    [
        encode(RGB, "TIFF", icc_profile=bytes(8_000_000)),
        encode(RGB.convert("CMYK"), "JPEG", icc_profile=b"of CMYK" * 1000),
        kinds.tiff(np.asarray(RGB), 8, kinds.RGB, tags={34675: kinds.shorts(7)}),
        encode(RGB, transparency=RGB.getpixel((5, 5)), dpi=(300, 300)),
    ],
    ids=["large profile", "CMYK", "odd profile", "transparency"],
)
def test_a_heat_map_has_no_metadata_of_the_image(data: bytes) -> None:
    """A profile of 8 MB made an answer that ended the worker."""
    png, position, found = explain.heat_map(photo(data), one_hot(3, 3)), 8, set()
    while position < len(png):
        found.add(png[position + 4 : position + 8])
        position += 12 + int.from_bytes(png[position : position + 4], "big")
    assert found == {b"IHDR", b"IDAT", b"IEND"}


def test_an_explained_image_is_upright_and_decoded_as_for_a_prediction() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.effect_noise((60, 20), 80), "JPEG", exif=exif)
    of = photo(data, None)
    assert of.size == (20, 60)
    assert of.preview is None
    assert (of.pixels == decoded(data).pixels).all()


# --- The weights' file ---


def test_malformed_weights_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / explain.CLASSIFIER
    with pytest.raises(ArchiveError, match=r"classifier\.npy: .*cannot be read"):
        explain.load_classifier(path, 1000)
    for content, message in (
        (np.array([{}]), "cannot be read"),
        (np.zeros((999, 4), np.float32), r"expected float32 \(1000, channels\), got float32"),
        (np.zeros((1000, 4), np.float64), "got float64"),
        (np.zeros(1000, np.float32), r"got float32 \(1000,\)"),
    ):
        np.save(path, content)
        with pytest.raises(ArchiveError, match=rf"classifier\.npy: .*{message}"):
            explain.load_classifier(path, 1000)
