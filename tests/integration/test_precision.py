"""Archives of each precision, of a model trained for the purpose, in a real TorchServe."""

import base64
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import requests
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from examples.digits.train import NAMES, Split
from examples.digits.train import load as load_digits
from handler.cores import Cores
from handler.engines import Engine, load_engine
from handler.openvino_engine import OpenVinoEngine
from handler.precision import CHECK_LABELS, MODEL_FILES
from handler.settings import Preprocessing
from scripts.build.archive import Recipe, build, recipe
from scripts.build.lower_precision import chosen
from scripts.build.weights import load as load_weights
from scripts.serve.running import Running, free_ports
from scripts.serve.server import start, stop
from scripts.store import read_card
from scripts.terminal import UserError

# Training and calibration are the first test's.
pytestmark = pytest.mark.timeout(600)

TIMEOUT = 60
EPOCHS = 3
# A ResNet-18 has features of 2 x 2 at this side, so that it can be explained.
SIDE = 64
PREPROCESSING = Preprocessing(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
# Points of 360 pictures that one precision may lose: the mechanics are tested here, not the digits.
MAX_LOSS = 3.0
# The largest change of a probability from float32's that is allowed for.
CHANGES = {"float32": 1e-5, "bf16": 0.25, "int8": 0.5}
# The least cosine of an embedding and float32's. Rounding to bfloat16's 8 bits changes a number by
# 0.4 % at most, to int8 by half a step of 255; much of what all channels and layers add of that
# cancels. The cosine of different digits is lower: a test of its own says so.
ALIKE = {"float32": 1 - 1e-6, "bf16": 0.999, "int8": 0.98}

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = tuple(name for name in CHANGES if name != "bf16" or HAS_BF16)


def _write(split: Split, folder: Path) -> None:
    for number, (picture, digit) in enumerate(zip(split.pictures, split.digits, strict=True)):
        path = folder / NAMES[digit] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB").save(path)


def _pixels(folder: Path) -> NDArray[np.uint8]:
    """uint8 (N, 3, SIDE, SIDE), in the order of the files' names."""
    files = sorted(folder.glob("*/*.png"))
    return np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])


def _train(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    images = torch.from_numpy(_pixels(folder)).float() / 127.5 - 1
    classes = torch.tensor([NAMES.index(p.parent.name) for p in sorted(folder.glob("*/*.png"))])
    model: nn.Module = resnet18(num_classes=len(NAMES))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(32):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights, and pictures: `train` to calibrate on, `test` held out."""
    folder = tmp_path_factory.mktemp("precision")
    seen, held_out = load_digits()
    _write(seen, folder / "train")
    _write(held_out, folder / "test")
    torch.save(_train(folder / "train").state_dict(), folder / "weights.pth")
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


def _recipe(folder: Path, precision: str, **choice: Any) -> Recipe:
    if precision != "float32":
        choice.setdefault("evaluate", folder / "test")
    if precision == "int8":
        choice.setdefault("calibrate", folder / "train")
    lower = chosen(precision, **{"max_loss": MAX_LOSS, **choice} if choice else {})
    weights = load_weights(folder / "weights.pth", "resnet18")
    return recipe(weights, precision, folder / "classes.txt", PREPROCESSING, lower=lower)


@pytest.fixture(scope="module")
def archives(folder: Path) -> dict[str, Path]:
    store = folder / "model_store"
    return {precision: build(_recipe(folder, precision), store) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def server(archives: dict[str, Path], folder: Path) -> Iterator[Running]:
    first, *others = archives.values()
    running = start(first, free_ports(), 1, folder / "run", beside=others)
    yield running
    stop(running, folder / "run")


def _description(running: Running) -> dict[str, Any]:
    (model,) = requests.get(
        running.model_url, params={"customized": "true"}, timeout=TIMEOUT
    ).json()
    found: dict[str, Any] = model["customizedMetadata"]
    return found


def _engine(archive: Path, folder: Path) -> Engine:
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    card = read_card(archive)
    assert card is not None
    cores = Cores(1, 2, folder / "busy")
    if card.precision == "float32":
        return load_engine(folder / "model.onnx", card, cores)
    return OpenVinoEngine(folder / MODEL_FILES[card.precision], card.precision, cores)


@pytest.mark.parametrize("precision", CHANGES)
def test_each_answers_every_way_in(precision: str, server: Running, folder: Path) -> None:
    if precision not in PRECISIONS:
        pytest.skip("this processor does not compute in bfloat16")
    picture = next((folder / "test" / "three").iterdir()).read_bytes()
    text = base64.b64encode(picture).decode()
    url = server.serving(precision).predictions_url
    root = url.partition("/predictions/")[0]
    kserve = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [text]}
    answers = [
        requests.post(url, data=picture, timeout=TIMEOUT),
        requests.post(url, files={"file": picture}, timeout=TIMEOUT),
        requests.post(url, json={"image": text}, timeout=TIMEOUT),
        requests.post(f"{root}/{precision}/predict?topk=5", data=picture, timeout=TIMEOUT),
    ]
    v1 = requests.post(url, json={"instances": [{"b64": text}]}, timeout=TIMEOUT)
    v2 = requests.post(url, json={"inputs": [kserve]}, timeout=TIMEOUT)
    several = requests.post(url, files={"a": picture, "b": picture}, timeout=TIMEOUT)
    bodies = [answer.json() for answer in answers]
    bodies += [v1.json()["predictions"][0], *several.json()["results"]]
    assert {body["class_name"] for body in bodies} == {"three"}
    assert len({body["probability"] for body in bodies}) == 1
    (by_v2,) = [o["data"] for o in v2.json()["outputs"] if o["name"] == "probability"]
    assert by_v2 == pytest.approx([bodies[0]["probability"]], abs=1e-6)
    everything = [*answers, v1, v2, several]

    explanations = url.replace("predictions", "explanations")
    explained = requests.post(
        explanations, data=picture, headers={"Accept": "application/json"}, timeout=TIMEOUT
    )
    assert explained.json()["probability"] == pytest.approx(bodies[0]["probability"], abs=1e-6)
    drawn = requests.post(explanations, data=picture, timeout=TIMEOUT)
    assert drawn.content.startswith(b"\x89PNG")
    page = requests.get(url, headers={"Accept": "text/html"}, timeout=TIMEOUT)
    for answer in (*everything, explained, drawn, page):
        assert answer.status_code == 200
        assert answer.headers["x-model-precision"] == precision

    described = _description(server.serving(precision))
    assert described["precision"] == described["archive_precision"] == precision
    assert "fallback" not in described
    metrics = requests.get(server.metrics_url, timeout=TIMEOUT).text
    assert f'precision="{precision}",archive_precision="{precision}"' in metrics


@pytest.fixture(scope="module")
def digits(folder: Path) -> list[Path]:
    """Five held-out pictures of each digit."""
    return [path for name in NAMES for path in sorted((folder / "test" / name).iterdir())[:5]]


def _embeddings(running: Running, pictures: list[Path]) -> NDArray[np.float32]:
    """float32 (N, 512), as a server answers."""
    rows = [
        requests.post(
            running.predictions_url,
            files={"file": path.read_bytes()},
            data={"embedding": "true"},
            timeout=TIMEOUT,
        ).json()
        for path in pictures
    ]
    return np.array([row["embedding"] for row in rows], np.float32)


@pytest.fixture(scope="module")
def exact_embeddings(server: Running, digits: list[Path]) -> NDArray[np.float32]:
    return _embeddings(server.serving("float32"), digits)


def _cosines(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (N, N): of each with each."""
    some, others = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (some, others))
    found: NDArray[np.float32] = some @ others.T
    return found


@pytest.mark.parametrize("precision", CHANGES)
def test_each_gives_embeddings_like_float32s(
    precision: str,
    server: Running,
    digits: list[Path],
    exact_embeddings: NDArray[np.float32],
    note: list[str],
) -> None:
    if precision not in PRECISIONS:
        pytest.skip("this processor does not compute in bfloat16")
    found = _embeddings(server.serving(precision), digits)
    assert found.shape == (len(digits), 512)
    assert np.isfinite(found).all()
    cosines = _cosines(found, exact_embeddings)
    note.append(
        f"{precision}: over {len(digits)} digits the cosine of an embedding and float32's is "
        f"{cosines.diagonal().min():.6f} at least"
    )
    assert cosines.diagonal().min() >= ALIKE[precision]
    # Each is most like float32's of the same picture, so that near duplicates stay near.
    assert cosines.argmax(axis=1).tolist() == list(range(len(digits)))


def test_embeddings_of_other_digits_are_less_alike(exact_embeddings: NDArray[np.float32]) -> None:
    """Or else the bounds above would say nothing."""
    cosines = _cosines(exact_embeddings, exact_embeddings)
    digit = np.arange(len(cosines)) // 5
    assert cosines[digit[:, None] != digit].max() < min(ALIKE.values())


def test_each_keeps_to_its_bound(
    archives: dict[str, Path], folder: Path, tmp_path: Path, note: list[str]
) -> None:
    """The largest change of a probability, and of an explanation's map as a part of its range."""
    images = _pixels(folder / "test")[::3]
    model = load_weights(folder / "weights.pth", "resnet18")
    classifier = model.state_dict["fc.weight"].numpy()
    found = {}
    for precision, archive in archives.items():
        logits, features = _engine(archive, tmp_path / precision).logits_and_features(images)
        maps = np.einsum("kc,nchw->nkhw", classifier, features)
        found[precision] = torch.from_numpy(logits).softmax(1).numpy(), maps
    exact, exact_maps = found["float32"]
    extent = np.ptp(exact_maps)
    for precision, (probabilities, maps) in found.items():
        change = float(np.abs(probabilities - exact).max())
        error = float(np.abs(maps - exact_maps).max() / extent)
        note.append(
            f"{precision}: over {len(images)} digits a probability changes by {change:.1e} at "
            f"most, an explanation by {error:.1e} of its range"
        )
        assert change <= CHANGES[precision]
        assert error <= CHANGES[precision]


def _saturated(archive: Path, target: Path, *, required: bool = False) -> Path:
    """The archive with every int8 weight as far from zero as there is."""
    model = MODEL_FILES["int8"]
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(target, "w") as after:
        weights = re.findall(
            r'<data element_type="i8" .*?offset="(\d+)" size="(\d+)"', before.read(model).decode()
        )
        assert weights
        for entry in before.infolist():
            content = before.read(entry)
            if entry.filename == Path(model).with_suffix(".bin").name:
                values = np.frombuffer(content, np.int8).copy()
                for offset, size in weights:
                    part = values[int(offset) : int(offset) + int(size)]
                    part[:] = np.where(part < 0, -127, 127)
                content = values.tobytes()
            if entry.filename == "model-config.yaml" and required:
                content = content.replace(b"require_precision: false", b"require_precision: true")
            after.writestr(entry, content)
    return target


def test_a_saturated_model_is_replaced_by_float32_in_a_real_worker(
    archives: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    archive = _saturated(archives["int8"], tmp_path / "int8.mar")
    picture = next((folder / "test" / "three").iterdir()).read_bytes()
    running = start(archive, free_ports(), 1, tmp_path / "run")
    try:
        answer = requests.post(running.predictions_url, data=picture, timeout=TIMEOUT)
        described = _description(running)
        metrics = requests.get(running.metrics_url, timeout=TIMEOUT).text
    finally:
        stop(running, tmp_path / "run")
    assert answer.json()["class_name"] == "three"
    assert answer.headers["x-model-precision"] == "float32"
    assert (described["precision"], described["archive_precision"]) == ("float32", "int8")
    assert "first label than in float32" in described["fallback"]
    assert 'precision="float32",archive_precision="int8"' in metrics
    log = (tmp_path / "run" / "logs" / "model.log").read_text()
    assert f"Serving float32 instead of int8: {described['fallback']}" in log


def test_a_saturated_model_stops_the_worker_where_its_precision_is_required(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    archive = _saturated(archives["int8"], tmp_path / "int8.mar", required=True)
    with pytest.raises(UserError, match=r"int8 cannot be served here: .* first label than in floa"):
        start(archive, free_ports(), 1, tmp_path / "run")


def test_ten_pictures_of_noise_calibrate_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for number in range(10):
        pixels = random.integers(124, 132, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.png")
    wanted = _recipe(folder, "int8", calibrate=tmp_path / "noise", max_loss=0.5)
    with pytest.raises(
        UserError, match=r"top 1 loses .* points, 0.5 are allowed.*Layers that cost"
    ):
        build(wanted, tmp_path)
    assert not list(tmp_path.glob("*.mar"))
    assert "10 pictures are few to calibrate on" in capsys.readouterr().out


def test_a_bound_that_is_too_tight_stops_the_build(folder: Path, tmp_path: Path) -> None:
    """From one digit to another in small steps: somewhere between is a near tie."""
    random = np.random.default_rng(0)
    files = sorted((folder / "test").glob("*/*.png"))
    (tmp_path / "blends").mkdir()
    for number in range(16):
        first, second = (Image.open(files[i]) for i in random.integers(len(files), size=2))
        # Coarser steps held no near tie on one processor, where the build rightly succeeded.
        for percent in np.arange(35, 66, 0.125):
            blend = Image.blend(first, second, percent / 100)
            blend.save(tmp_path / "blends" / f"{number}-{percent}.png")
    wanted = _recipe(folder, "int8", evaluate=tmp_path / "blends", agreement=1.0)
    with pytest.raises(UserError, match=r"first labels are float32's, 100.00% must be"):
        build(wanted, tmp_path)
    assert not list(tmp_path.glob("*.mar"))


def test_the_same_pictures_give_the_same_archive_and_nothing_of_this_machine(
    archives: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    again = build(_recipe(folder, "int8"), tmp_path)
    assert again.read_bytes() == archives["int8"].read_bytes()
    with zipfile.ZipFile(again) as content:
        everything = b"".join(content.read(name) for name in content.namelist())
        labels = np.load(io.BytesIO(content.read(CHECK_LABELS)))
    assert len(labels) == 24
    assert str(Path.cwd()).encode() not in everything
    assert str(folder).encode() not in everything
