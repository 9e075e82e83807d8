"""What an archive holds, when it is rebuilt, and that it answers as the tutorial's model."""

import copy
import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision.models import densenet121

from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.errors import ArchiveError
from handler.inference.cores import Cores
from handler.inference.engines import load_engine
from handler.labels import CLASS_INDEX
from handler.settings import ModelCard, Preprocessing, Settings
from scripts.build.commands import main as make_archive
from scripts.build.convert import convert
from scripts.build.differences import MAX_DIFFERENCE
from scripts.build.export import Normalized, write_onnx
from scripts.build.model_file import from_options
from scripts.build.packing import BUILD
from scripts.build.pipeline import build
from scripts.build.sources.source import Source, TorchSource
from scripts.build.sources.torchvision import TorchvisionSource, random_source
from scripts.samples import sample_batch
from scripts.serve.commands import start_command
from scripts.store import read_card
from scripts.terminal import UserError
from tests.images import encode, photographs
from tests.unit.test_images import TUTORIAL

SMALL = Preprocessing(resize=64, crop=64)
SPEC = from_options(
    arch="tiny", weights="random", preprocessing={"resize": SMALL.resize, "crop": SMALL.crop}
)


@pytest.fixture(scope="module")
def small() -> TorchSource:
    return tiny_source(1000)


@pytest.fixture(scope="module")
def small_archive(small: TorchSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SPEC, tmp_path_factory.mktemp("small"), small)


class Tiny(nn.Module):
    """A classifier of two layers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, kernel_size=3, stride=8)
        self.fc = nn.Linear(8, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.conv(images))
        return self.fc(features.mean((2, 3)))  # type: ignore[no-any-return]


def tiny_source(outputs: int) -> TorchSource:
    module = Tiny(outputs).eval()
    return TorchSource(
        architecture="tiny",
        file="",
        sha256="0",
        outputs=outputs,
        trained=False,
        preprocessing=dataclasses.asdict(SMALL),
        module=module,
    )


def test_densenet121_answers_as_the_tutorials_model_and_transform_with_both_engines(
    archive: Path, densenet: TorchvisionSource, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive) as content:
        card = ModelCard.from_json(content.read("model-card.json"))
        content.extract("model.onnx", tmp_path)
    torch.save(densenet.module.state_dict(), tmp_path / "model.pth")
    model = densenet121()
    model.load_state_dict(densenet.module.state_dict())
    images = [image.convert("RGB") for _, image in list(photographs())[::10]]
    with torch.inference_mode():
        expected = model.eval()(torch.stack([TUTORIAL(image) for image in images])).numpy()
    assert len(set(expected.argmax(1))) > 2
    pixels = [
        decode(encode(image), card.preprocessing, PixelBudget(10**8)).pixels for image in images
    ]
    for name in ("model.onnx", "model.pth"):
        engine = load_engine(tmp_path / name, card, Cores(1, 2, tmp_path / "busy"))
        logits = engine.run(np.stack(pixels)).logits
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
        "handler/decoding/decode.py",
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


def test_a_models_own_threshold_is_packed(
    small: TorchSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = build(SPEC.replace(threshold=0.3), tmp_path, small)
    assert "; threshold 0.3" in capsys.readouterr().out
    with zipfile.ZipFile(archive) as content:
        packed = Settings.from_model_config(yaml.safe_load(content.read("model-config.yaml")))
    usual = Settings.from_model_config(
        yaml.safe_load(Path("handler/model-config.yaml").read_text())
    )
    assert packed == dataclasses.replace(usual, threshold=0.3)


def test_two_builds_and_two_exports_are_byte_identical(
    small: TorchSource, small_archive: Path, tmp_path: Path
) -> None:
    for kept in BUILD.glob("converted-tiny-*"):
        shutil.rmtree(kept)
    assert build(SPEC, tmp_path, small).read_bytes() == small_archive.read_bytes()


def test_an_archive_that_is_up_to_date_is_kept(
    small: TorchSource, small_archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = small_archive.stat().st_mtime_ns
    assert build(SPEC, small_archive.parent, small) == small_archive
    assert small_archive.stat().st_mtime_ns == before
    assert "is up to date" in capsys.readouterr().out


def test_an_archive_of_other_weights_is_rebuilt_and_its_content_printed(
    small: TorchSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.mar").write_bytes(b"half an archive")
    other = dataclasses.replace(small, file="mine.pth", trained=True)
    card = read_card(build(SPEC, tmp_path, other))
    assert card is not None
    assert (card.trained, card.weights_file) == (True, "mine.pth")
    printed = capsys.readouterr().out
    assert "tiny on ONNX Runtime (CPU), from mine.pth" in printed
    assert (
        "shorter side to 64 pixels (bilinear), center 64 x 64, RGB, "
        "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in printed
    )
    assert "1000 classes, in the order of the model's outputs: tench, goldfish, ..., t" in printed


def test_an_export_whose_logits_differ_stops_the_build(tmp_path: Path) -> None:
    source = tiny_source(20)
    model = source.to_onnx(SMALL, tmp_path)
    for channels in ("rgb", "bgr"):
        preprocessing = dataclasses.replace(SMALL, channels=channels)
        card = ModelCard("tiny", 20, True, "", "", "", preprocessing)
        packed = convert(copy.deepcopy(model), card, tmp_path / f"{channels}.onnx").file
        source.check(packed, preprocessing)
        other = copy.deepcopy(source)
        with torch.no_grad():
            other.module.fc.bias[7] += 0.001  # type: ignore[index, operator, union-attr]
        with pytest.raises(UserError, match=r"differs from PyTorch by 1.0e-03"):
            other.check(packed, preprocessing)


def test_a_wrong_number_of_classes_is_rejected_before_the_export(tmp_path: Path) -> None:
    for outputs, classes, message in (
        (5, None, "has 5 classes, and nothing names them"),
        (5, ["a", "b"], "names 2 classes, but tiny.pth has 5"),
        (1, ["a"], "one output, for two classes, so classes must name two"),
        (1001, ["a"], "names 1 classes, but tiny.pth has 1001"),
    ):
        source = Source(architecture="tiny", file="tiny.pth", sha256="0", outputs=outputs)
        with pytest.raises(UserError, match=message):
            build(from_options(arch="tiny", classes=classes), tmp_path, source)


@pytest.mark.parametrize(
    ("engine", "source_of"), [("onnx", tiny_source), ("torch", partial(random_source, "resnet18"))]
)
def test_one_output_of_pytorch_becomes_two_classes(
    engine: str, source_of: Callable[[int], TorchSource], tmp_path: Path
) -> None:
    source, images = source_of(1), sample_batch(SMALL, 6)
    with torch.inference_mode():
        raw = Normalized(source.module, SMALL)(torch.from_numpy(images)).numpy()
    spec = SPEC.replace(name="one", engine=engine, classes=["no", "yes"])
    archive = build(spec, tmp_path, source)
    with zipfile.ZipFile(archive) as content:
        content.extractall(tmp_path)
    card = read_card(archive)
    assert card is not None
    (file,) = tmp_path.glob("model.[op][nt]*")
    logits = load_engine(file, card, Cores(1, 1, tmp_path / "busy")).run(images).logits
    assert np.abs(logits - np.hstack([np.zeros_like(raw), raw])).max() < MAX_DIFFERENCE


def test_a_model_too_large_for_onnx_is_rejected_before_its_export(tmp_path: Path) -> None:
    model = torch.nn.Linear(30_000, 20_000, device="meta")
    with pytest.raises(UserError, match=r"weights are 2.4 GB, and .* holds 2.1 GB.* engine: torch"):
        write_onnx(model, 224, tmp_path / "model.onnx", "large")


def test_untrained_weights_are_neither_packed_nor_served_by_default(
    small_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host is reachable at this address, and the archive in the store is untrained."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="WEIGHTS=path"):
        make_archive(weights="http://127.0.0.1:9/densenet121-a639ec97.pth", model_store=tmp_path)
    with pytest.raises(UserError, match="needs trained weights"):
        make_archive(weights="random")
    # If the check is broken, the test fails and leaves no server running.
    monkeypatch.setattr("scripts.serve.commands.start", None)
    with pytest.raises(UserError, match=r"holds untrained random weights.*WEIGHTS=path"):
        start_command("tiny", model_store=small_archive.parent)


def test_a_model_file_that_cannot_be_loaded_is_named(small_archive: Path, tmp_path: Path) -> None:
    card = read_card(small_archive)
    assert card is not None
    for name, content, message in (
        ("model.onnx", None, "model.onnx: the archive does not hold"),
        ("model.onnx", b"not a model", "model.onnx: cannot be loaded"),
        ("model.pth", b"not weights", "model.pth: cannot be loaded"),
        ("model.bin", b"", "no engine for files that end in '.bin'"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ArchiveError, match=message):
            load_engine(tmp_path / name, card, Cores(1, 1, tmp_path / "busy"))
