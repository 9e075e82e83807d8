"""Class activation maps: exact, of the right class, and laid over the right part of the photo."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from handler import explain
from handler.cores import Cores
from handler.engines import Engine, load_engine
from handler.errors import ArchiveError
from handler.images import Photo, PixelBudget, decode, decode_photo
from handler.settings import Preprocessing
from scripts.build.weights import Weights
from scripts.store import read_card
from tests.pictures import encode, photographs

PREPROCESSING = Preprocessing()
PIXELS = 64_000_000

# float32 sums in another order than the model's own; logits are about 10 in size.
TOLERANCE = 1e-4

# A cell of the 7x7 map stands over 32 pixels of the model's 224.
CELL = 32


@pytest.fixture(scope="module", params=["onnx", "torch"])
def engine(
    request: pytest.FixtureRequest,
    archive: Path,
    weights: Weights,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    folder = tmp_path_factory.mktemp("engine")
    card = read_card(archive)
    assert card is not None
    return load_engine(
        model_file(request.param, archive, weights, folder),
        card,
        Cores(2, 2, folder / "busy"),
    )


def model_file(kind: str, archive: Path, weights: Weights, folder: Path) -> Path:
    if kind == "onnx":
        return member(archive, "model.onnx", folder)
    torch.save(weights.state_dict, folder / "model.pth")
    return folder / "model.pth"


def member(archive: Path, name: str, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as content:
        return Path(content.extract(name, folder))


@pytest.fixture(scope="module")
def classifier(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    folder = tmp_path_factory.mktemp("classifier")
    return explain.load_classifier(member(archive, explain.CLASSIFIER, folder), 1000)


def pixels(count: int) -> NDArray[np.uint8]:
    pictures = [image for _, image in photographs()][:count]
    budget = PixelBudget(10**9)
    return np.stack([decode(encode(picture), PREPROCESSING, budget) for picture in pictures])


def test_a_map_sums_to_the_logit_less_the_bias(
    engine: Engine, classifier: NDArray[np.float32], weights: Weights
) -> None:
    logits, features = engine.logits_and_features(pixels(8))
    bias = weights.state_dict["classifier.bias"].numpy()
    for image in range(8):
        for index in (0, int(logits[image].argmax()), int(logits[image].argmin()), 999):
            activation = explain.class_activation_map(features[image], classifier[index])
            assert activation.shape == (7, 7)
            assert activation.dtype == np.float32
            assert activation.sum() == pytest.approx(
                logits[image, index] - bias[index], abs=TOLERANCE
            )


def test_both_ways_to_ask_an_engine_give_the_same_logits(engine: Engine) -> None:
    images = pixels(3)
    logits, features = engine.logits_and_features(images)
    assert np.abs(engine.logits(images) - logits).max() < TOLERANCE
    assert features.shape == (3, 1024, 7, 7)
    assert features.dtype == np.float32
    assert features.min() >= 0


@pytest.mark.slow
def test_covering_the_hottest_part_costs_the_class_more_than_covering_the_coldest(
    archive: Path, classifier: NDArray[np.float32], tmp_path: Path, note: list[str]
) -> None:
    """A cell is covered with the picture's mean colour. The features of a cell see far beyond it,
    so this need not hold for each picture; that it holds for nearly all of them shows that the map
    is of this picture and of this class, and the right way up.
    """
    card = read_card(archive)
    assert card is not None
    cores = Cores(2, 2, tmp_path / "busy")
    engine = load_engine(member(archive, "model.onnx", tmp_path), card, cores)
    images = pixels(60)
    falls: dict[str, list[float]] = {"hottest": [], "coldest": [], "mirrored": []}
    for image in images:
        logits, features = engine.logits_and_features(image[None])
        best = int(logits[0].argmax())
        activation = explain.class_activation_map(features[0], classifier[best])
        hottest, coldest = int(activation.argmax()), int(activation.argmin())
        cells = {"hottest": hottest, "coldest": coldest, "mirrored": 48 - hottest}
        covered = np.stack([cover(image, cell) for cell in cells.values()])
        after = engine.logits(covered)[:, best]
        for name, logit in zip(cells, after, strict=True):
            falls[name].append(float(logits[0, best] - logit))
    hottest_falls, coldest_falls = np.array(falls["hottest"]), np.array(falls["coldest"])
    holds = int((hottest_falls > coldest_falls).sum())
    note.append(
        f"class activation maps: covering the hottest cell cost the class more than covering the "
        f"coldest in {holds} of {len(images)} pictures; mean fall of the logit "
        f"{hottest_falls.mean():.2f} (hottest), {coldest_falls.mean():.2f} (coldest), "
        f"{np.mean(falls['mirrored']):.2f} (hottest of the map turned by half)"
    )
    assert holds >= 0.8 * len(images)
    assert hottest_falls.mean() > coldest_falls.mean()


def cover(image: NDArray[np.uint8], cell: int) -> NDArray[np.uint8]:
    row, column = divmod(cell, 7)
    covered = image.copy()
    covered[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = image.mean(
        axis=(1, 2), keepdims=True
    ).astype(np.uint8)
    return covered


# --- Pictures ---


def photo(size: tuple[int, int], longest_side: int | None = explain.LONGEST_SIDE) -> Photo:
    grey = Image.new("RGB", size, (128, 128, 128))
    return decode_photo(encode(grey), PREPROCESSING, PixelBudget(PIXELS), longest_side)


def heat_picture(of: Photo, activation: NDArray[np.float32]) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(explain.heat_picture(of, activation))) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def one_hot(row: int, column: int) -> NDArray[np.float32]:
    activation = np.zeros((7, 7), np.float32)
    activation[row, column] = 3
    return activation


def test_heat_lies_over_what_the_model_saw_and_the_rest_is_dimmed() -> None:
    of = photo((800, 400))
    left, top, right, bottom = of.crop
    assert (right - left, bottom - top) == pytest.approx((351.4, 351.4), abs=0.1)
    assert (left + right, top + bottom) == pytest.approx((800, 400), abs=2)
    picture = heat_picture(of, one_hot(0, 6))
    assert picture.shape == (400, 800, 3)
    assert (picture[:, : int(left) - 1] == 51).all()
    assert (picture[:, int(right) + 2 :] == 51).all()
    assert (picture[350, 250] == 128).all()
    hottest = np.unravel_index(picture.astype(int).sum(axis=2).argmax(), (400, 800))
    cell = (right - left) / 7
    assert top - 1 <= hottest[0] <= top + cell
    assert right - cell <= hottest[1] <= right + 1


def test_the_only_colours_are_the_maps() -> None:
    orange = Image.new("RGB", (300, 300), (240, 140, 40))
    of = decode_photo(encode(orange), PREPROCESSING, PixelBudget(PIXELS), explain.LONGEST_SIDE)
    picture = heat_picture(of, one_hot(0, 6)).astype(int)
    is_grey = np.ptp(picture, axis=2) == 0
    assert is_grey[200:, :100].all()
    hottest = picture[20, 280]
    assert hottest[:2].min() > hottest[2] + 50  # yellow


def test_a_map_without_differences_is_shown_without_heat() -> None:
    picture = heat_picture(photo((300, 300)), np.full((7, 7), 2, np.float32))
    assert (picture[150, 150] == 128).all()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((4000, 3000), (1024, 768)),
        ((1, 1), (1, 1)),
        ((2, 1), (2, 1)),
        ((1, 65_000), (1, 1024)),
        ((65_000, 1), (1024, 1)),
        ((3, 5000), (1, 1024)),
        ((1000, 20), (1000, 20)),
    ],
)
def test_pictures_of_any_size_are_shown_whole(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    of = photo(size)
    assert of.size == size
    assert heat_picture(of, one_hot(3, 3)).shape == (shown[1], shown[0], 3)


def test_a_picture_of_noise_stays_far_below_what_torchserve_accepts() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    of = decode_photo(
        encode(Image.fromarray(noise)), PREPROCESSING, PixelBudget(PIXELS), explain.LONGEST_SIDE
    )
    assert len(explain.heat_picture(of, one_hot(0, 0))) < 3_300_000


def test_a_photo_is_upright_and_seen_by_the_model_as_ever() -> None:
    turned = Image.new("RGB", (60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(turned, "JPEG", exif=exif)
    of = decode_photo(data, PREPROCESSING, PixelBudget(PIXELS), None)
    assert of.size == (20, 60)
    assert of.preview is None
    assert (of.pixels == decode(data, PREPROCESSING, PixelBudget(PIXELS))).all()


# --- The weights' file ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no array", "cannot be read"),
        (np.zeros((999, 4), np.float32), r"expected float32 \(1000, channels\), got float32"),
        (np.zeros((1000, 4), np.float64), "got float64"),
        (np.zeros(1000, np.float32), r"got float32 \(1000,\)"),
        (np.array([{}]), "cannot be read"),
    ],
)
def test_wrong_weights_are_named(
    tmp_path: Path, content: bytes | NDArray[np.float32] | None, message: str
) -> None:
    path = tmp_path / explain.CLASSIFIER
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ArchiveError, match=rf"classifier\.npy: .*{message}"):
        explain.load_classifier(path, 1000)


def test_the_weights_are_mapped_not_read(classifier: NDArray[np.float32]) -> None:
    assert isinstance(classifier, np.memmap)
    assert classifier.shape == (1000, 1024)
