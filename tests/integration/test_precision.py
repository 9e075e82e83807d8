"""Archives of each precision in a real TorchServe, with a model trained here."""

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

from benchmarks.archives import repack
from examples.digits.train import NAMES, Split
from examples.digits.train import load as load_digits
from handler.inference.cores import Cores
from handler.inference.engines import Engine, Extra, load_engine
from handler.inference.openvino_engine import OpenVinoEngine
from handler.inference.precision import MODEL_FILES
from scripts.build.model_file import ModelFile, from_options
from scripts.build.pipeline import build
from scripts.serve.management import management_session
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from scripts.store import read_card
from scripts.terminal import UserError

# The first test trains and calibrates.
pytestmark = pytest.mark.timeout(600)

TIMEOUT = 60
EPOCHS = 3
# A ResNet-18 has features of 2 x 2 at this size, enough for activation maps.
SIDE = 64
# Percentage points of accuracy that a precision may lose.
MAX_LOSS = 3.0
# The largest allowed change of a probability from float32's.
CHANGES = {"float32": 1e-5, "bf16": 0.25, "int8": 0.5}
# The least cosine similarity of an embedding and float32's. Rounding to bfloat16's 8 bits changes a
# number by 0.4 % at most, to int8 by half a step of 255; much of it cancels.
MIN_COSINE = {"float32": 1 - 1e-6, "bf16": 0.999, "int8": 0.98}

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = tuple(name for name in CHANGES if name != "bf16" or HAS_BF16)


def _write(split: Split, folder: Path) -> None:
    for number, (image, digit) in enumerate(zip(split.images, split.digits, strict=True)):
        path = folder / NAMES[digit] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB").save(path)


def _pixels(files: list[Path]) -> NDArray[np.uint8]:
    """uint8 (N, 3, SIDE, SIDE)."""
    return np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])


def _train(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    files = sorted(folder.glob("*/*.png"))
    images = torch.from_numpy(_pixels(files)).float() / 127.5 - 1
    classes = torch.tensor([NAMES.index(file.parent.name) for file in files])
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
    """Trained weights, and images in `train` (for calibration) and `test` (held out)."""
    folder = tmp_path_factory.mktemp("precision")
    seen, held_out = load_digits()
    _write(seen, folder / "train")
    _write(held_out, folder / "test")
    torch.save(_train(folder / "train").state_dict(), folder / "weights.pth")
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture(scope="module")
def archives(folder: Path) -> dict[str, Path]:
    return {name: build(_spec(folder, name, name), folder / "store") for name in PRECISIONS}


def _spec(folder: Path, name: str, precision: str, max_loss: float = MAX_LOSS) -> ModelFile:
    wanted: dict[str, Any] = {"type": precision, "max_loss": max_loss}
    if precision != "float32":
        wanted["evaluation"] = folder / "test"
    if precision == "int8":
        wanted["calibration"] = folder / "train"
    return from_options(
        name=name,
        arch="resnet18",
        weights=folder / "weights.pth",
        classes=folder / "classes.txt",
        preprocessing={"resize": SIDE, "crop": SIDE, "mean": 0.5, "std": 0.5},
        precision=wanted,
    )


@pytest.fixture(scope="module")
def server(archives: dict[str, Path], folder: Path) -> Iterator[ServerState]:
    first, *others = archives.values()
    running = start(first, free_ports(), 1, folder / "run", extra_archives=others)
    yield running
    stop(running, folder / "run")


def _description(running: ServerState) -> dict[str, Any]:
    (model,) = (
        management_session()
        .get(running.model_url, params={"customized": "true"}, timeout=TIMEOUT)
        .json()
    )
    found: dict[str, Any] = model["customizedMetadata"]
    return found


@pytest.mark.parametrize("precision", CHANGES)
def test_each_response_names_its_precision(
    precision: str, server: ServerState, folder: Path
) -> None:
    if precision not in PRECISIONS:
        pytest.skip("this processor does not compute in bfloat16")
    image = next((folder / "test" / "three").iterdir()).read_bytes()
    running = server.serving(precision)
    url = running.predictions_url
    explanations = url.replace("predictions", "explanations")
    wants_json = {"Accept": "application/json"}
    answer = requests.post(url, data=image, timeout=TIMEOUT)
    explained = requests.post(explanations, data=image, headers=wants_json, timeout=TIMEOUT)
    drawn = requests.post(explanations, data=image, timeout=TIMEOUT)
    page = requests.get(url, headers={"Accept": "text/html"}, timeout=TIMEOUT)
    assert answer.json()["class_name"] == "three"
    assert explained.json()["probability"] == pytest.approx(answer.json()["probability"], abs=1e-6)
    assert drawn.content.startswith(b"\x89PNG")
    for response in (answer, explained, drawn, page):
        assert response.status_code == 200
        assert response.headers["x-model-precision"] == precision
    described = _description(running)
    assert described["precision"] == described["archive_precision"] == precision
    assert "fallback" not in described
    metrics = requests.get(server.metrics_url, timeout=TIMEOUT).text
    assert f'precision="{precision}",archive_precision="{precision}"' in metrics


def _engine(archive: Path, folder: Path) -> Engine:
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    card = read_card(archive)
    assert card is not None
    cores = Cores(1, 2, folder / "busy")
    if card.precision == "float32":
        return load_engine(folder / "model.onnx", card, cores)
    return OpenVinoEngine(folder / MODEL_FILES[card.precision], card.precision, cores)


def _cosines(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return all cosine similarities, float32 (N, N)."""
    some, others = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (some, others))
    found: NDArray[np.float32] = some @ others.T
    return found


def test_probabilities_maps_and_embeddings_of_each_precision_are_close_to_float32(
    archives: dict[str, Path], folder: Path, tmp_path: Path, note: list[str]
) -> None:
    files = [path for name in NAMES for path in sorted((folder / "test" / name).iterdir())[:5]]
    images = _pixels(files)
    classifier = torch.load(folder / "weights.pth", weights_only=True)["fc.weight"].numpy()
    found = {}
    for precision, archive in archives.items():
        engine = _engine(archive, tmp_path / precision)
        logits, features = engine.run(images, Extra.FEATURES)
        maps = np.einsum("kc,nchw->nkhw", classifier, features)
        probabilities = torch.from_numpy(logits).softmax(1).numpy()
        found[precision] = probabilities, maps, engine.run(images, Extra.EMBEDDING)[1]
    exact, exact_maps, exact_embeddings = found["float32"]
    for precision, (probabilities, maps, embeddings) in found.items():
        change = float(np.abs(probabilities - exact).max())
        error = float(np.abs(maps - exact_maps).max() / np.ptp(exact_maps))
        cosines = _cosines(embeddings, exact_embeddings)
        note.append(
            f"{precision}: over {len(images)} digits a probability changes by {change:.1e} at "
            f"most, an explanation by {error:.1e} of its range, and the cosine of an embedding and "
            f"float32's is {cosines.diagonal().min():.6f} at least"
        )
        assert max(change, error) <= CHANGES[precision]
        assert embeddings.shape == (len(images), 512)
        assert cosines.diagonal().min() >= MIN_COSINE[precision]
        assert cosines.argmax(axis=1).tolist() == list(range(len(images)))
    # Embeddings of different digits are below the limits, so the limits mean something.
    digit = np.arange(len(images)) // 5
    others = _cosines(exact_embeddings, exact_embeddings)[digit[:, None] != digit]
    assert others.max() < min(MIN_COSINE.values())


def _saturated(archive: Path, target: Path, *, required: bool = False) -> Path:
    """Write a copy of the archive with every int8 weight at its maximum or minimum."""
    model = MODEL_FILES["int8"]
    with zipfile.ZipFile(archive) as content:
        graph = content.read(model).decode()
    weights = re.findall(r'<data element_type="i8" .*?offset="(\d+)" size="(\d+)"', graph)
    assert weights

    def change(name: str, content: bytes) -> bytes:
        if name == Path(model).with_suffix(".bin").name:
            values = np.frombuffer(content, np.int8).copy()
            for offset, size in weights:
                part = values[int(offset) : int(offset) + int(size)]
                part[:] = np.where(part < 0, -127, 127)
            return values.tobytes()
        if name == "model-config.yaml" and required:
            return content.replace(b"require_precision: false", b"require_precision: true")
        return content

    return repack(archive, target, change)


def test_a_worker_falls_back_to_float32_if_int8_predicts_other_labels_and_reports_it(
    archives: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    archive = _saturated(archives["int8"], tmp_path / "int8.mar")
    image = next((folder / "test" / "three").iterdir()).read_bytes()
    running = start(archive, free_ports(), 1, tmp_path / "run")
    try:
        answer = requests.post(running.predictions_url, data=image, timeout=TIMEOUT)
        described = _description(running)
        metrics = requests.get(running.metrics_url, timeout=TIMEOUT).text
    finally:
        stop(running, tmp_path / "run")
    assert answer.json()["class_name"] == "three"
    assert answer.headers["x-model-precision"] == "float32"
    assert (described["precision"], described["archive_precision"]) == ("float32", "int8")
    assert "top-1 label than in float32" in described["fallback"]
    assert 'precision="float32",archive_precision="int8"' in metrics
    log = (tmp_path / "run" / "logs" / "model.log").read_text()
    assert f"Serving float32 instead of int8: {described['fallback']}" in log


def test_a_worker_exits_if_required_int8_predicts_other_labels(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    archive = _saturated(archives["int8"], tmp_path / "int8.mar", required=True)
    with pytest.raises(UserError, match=r"int8 cannot be served here: .* top-1 label than in floa"):
        start(archive, free_ports(), 1, tmp_path / "run")
