"""What the archive holds, when it is built again, and that it answers as the tutorial's model."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import densenet121

from handler.cores import Cores
from handler.engines import load_engine
from handler.errors import ArchiveError
from handler.images import PixelBudget, decode
from handler.labels import CLASS_INDEX
from handler.settings import ModelCard, Preprocessing
from scripts.build import export
from scripts.build.archive import Recipe, build, recipe
from scripts.build.commands import main as make_archive
from scripts.build.differences import MAX_DIFFERENCE
from scripts.build.weights import Weights, untrained
from scripts.samples import sample_batch
from scripts.serve.commands import start_command
from scripts.store import read_card
from scripts.terminal import UserError
from tests.pictures import encode, photographs
from tests.unit.test_images import TUTORIAL

SMALL = Preprocessing(resize=64, crop=64)


@pytest.fixture(scope="module")
def small() -> Recipe:
    return recipe(untrained("resnet18"), preprocessing=SMALL)


@pytest.fixture(scope="module")
def small_archive(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(small, tmp_path_factory.mktemp("small"))


class Tiny(nn.Module):
    """A classifier of two layers, whose logits are linear in the means of its features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, kernel_size=3, stride=8)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 20)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.bn(self.conv(images)))
        return self.fc(features.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def tiny() -> Tiny:
    return Tiny().eval()


@pytest.fixture
def subject(tiny: Tiny) -> export.Exportable:
    """The tiny classifier, with the node of its last features."""
    node = export.features_node(tiny, tiny.fc, SMALL, sample_batch(SMALL))
    assert node
    return export.Exportable(tiny, SMALL, node)


def test_densenet121_answers_as_the_tutorials_model_and_transform_with_both_engines(
    archive: Path, weights: Weights, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive) as content:
        card = ModelCard.from_json(content.read("model-card.json"))
        content.extract("model.onnx", tmp_path)
    torch.save(weights.state_dict, tmp_path / "model.pth")
    model = densenet121()
    model.load_state_dict(weights.state_dict)
    images = [image.convert("RGB") for _, image in list(photographs())[::6]]
    with torch.inference_mode():
        expected = model.eval()(torch.stack([TUTORIAL(image) for image in images])).numpy()
    assert len(set(expected.argmax(1))) > 2
    pixels = [decode(encode(image), card.preprocessing, PixelBudget(10**8)) for image in images]
    for name in ("model.onnx", "model.pth"):
        engine = load_engine(tmp_path / name, card, Cores(1, 2, tmp_path / "busy"))
        logits = engine.logits(np.stack(pixels))
        assert logits.shape == (len(images), 1000)
        assert logits.dtype == np.float32
        assert np.abs(logits - expected).max() < MAX_DIFFERENCE


def test_the_archive_holds_the_handler_and_nothing_of_this_machine(small_archive: Path) -> None:
    with zipfile.ZipFile(small_archive) as content:
        names = set(content.namelist())
        everything = b"".join(content.read(name) for name in names)
        manifest = json.loads(content.read("MAR-INF/MANIFEST.json"))
        classes = json.loads(content.read(CLASS_INDEX))
    assert {
        "classifier.npy",
        "densenet_handler.py",
        "handler/images.py",
        "handler/page.html",
        "model-card.json",
        "model-config.yaml",
        "model.onnx",
    } <= names
    assert not [name for name in names if "pycache" in name]
    assert str(Path.cwd()).encode() not in everything
    assert str(Path.home()).encode() + b"/" not in everything
    assert manifest["model"]["modelVersion"] == "1.0-untrained"
    assert classes == json.loads(Path("handler/index_to_name.json").read_text())


def test_two_builds_and_two_exports_are_byte_identical(
    small: Recipe, small_archive: Path, subject: export.Exportable, tmp_path: Path
) -> None:
    assert build(small, tmp_path).read_bytes() == small_archive.read_bytes()
    files = [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    for file in files:
        export.export(subject, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_archive_that_is_up_to_date_is_kept_and_its_content_printed(
    small: Recipe, small_archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = small_archive.stat().st_mtime_ns
    assert build(small, small_archive.parent) == small_archive
    assert small_archive.stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "resnet18 on ONNX Runtime (CPU), weights seeded random numbers in float32" in printed
    assert (
        "shorter side to 64 pixels (bilinear), 64 x 64 from the centre, "
        "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in printed
    )
    assert "1000 classes: tench, goldfish, ..., toilet_tissue" in printed


def test_other_weights_replace_the_archive(small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "resnet18.mar").write_bytes(b"half an archive")
    weights = small.weights
    other = Weights(weights.state_dict, "mine.pth", weights.sha256, True, "resnet18")  # noqa: FBT003
    card = read_card(build(recipe(other, preprocessing=SMALL), tmp_path))
    assert card is not None
    assert (card.trained, card.weights_file) == (True, "mine.pth")


def test_an_export_whose_logits_differ_stops_the_build(
    tiny: Tiny, subject: export.Exportable, tmp_path: Path
) -> None:
    exported, reports = tmp_path / "model.onnx", list[str]()
    export.export(subject, exported)
    with torch.no_grad():
        tiny.fc.bias[7] += 0.001
    with pytest.raises(UserError, match=r"differs from PyTorch by 1.0e-03"):
        export.check(subject, exported, sample_batch(SMALL), reports.append)
    assert "over 18 images" in reports[0]


def test_an_export_whose_features_differ_stops_the_build(
    tiny: Tiny, subject: export.Exportable, tmp_path: Path
) -> None:
    """Features that the logits do not show: a channel without weight in the last layer."""
    exported, reports = tmp_path / "model.onnx", list[str]()
    with torch.no_grad():
        tiny.fc.weight[:, 7] = 0
    export.export(subject, exported)
    with torch.no_grad():
        tiny.bn.bias[7] += 100
    with pytest.raises(UserError, match=r"differs from PyTorch by \d.\de\+0"):
        export.check(subject, exported, sample_batch(SMALL)[:4], reports.append)
    assert re.search(r"e-0\d in logits, \d.\de\+0\d in features", reports[0])


def test_a_model_too_large_for_onnx_is_rejected_before_its_export(tmp_path: Path) -> None:
    model = torch.nn.Linear(30_000, 20_000, device="meta")
    with pytest.raises(UserError, match=r"weights are 2.4 GB, and .* holds 2.1 GB.* ENGINE=torch"):
        export.export_plain(model, 224, tmp_path / "model.onnx")


def test_untrained_weights_are_neither_packed_nor_served_by_default(
    small_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host is reachable at this address, and the archive in the store is untrained."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="WEIGHTS=path"):
        make_archive(weights_url="http://127.0.0.1:9/densenet121-a639ec97.pth")
    with pytest.raises(UserError, match=r"holds untrained random weights.*WEIGHTS=path"):
        start_command("resnet18", model_store=small_archive.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", None, "model.onnx: the archive does not hold"),
        ("model.onnx", b"not a model", "model.onnx: cannot be loaded"),
        ("model.pth", b"not weights", "model.pth: cannot be loaded"),
        ("model.bin", b"", "no engine for files that end in '.bin'"),
    ],
)
def test_a_model_file_that_cannot_be_loaded_is_named(
    small_archive: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    card = read_card(small_archive)
    assert card is not None
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        load_engine(tmp_path / name, card, Cores(1, 1, tmp_path / "busy"))
