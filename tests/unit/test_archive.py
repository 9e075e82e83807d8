"""What the archive holds, and when it is made again."""

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from handler.cores import Cores
from handler.engines import load_engine
from handler.errors import ArchiveError
from handler.labels import CLASS_INDEX
from handler.settings import ModelCard, Preprocessing
from scripts.build import export
from scripts.build.archive import build, recipe
from scripts.build.differences import MAX_DIFFERENCE
from scripts.build.weights import Weights, build_model, untrained
from scripts.samples import sample_batch
from scripts.store import read_card
from scripts.terminal import UserError

SMALL = Preprocessing(resize=64, crop=64)


@pytest.fixture
def subject() -> export.Exportable:
    """A small network, with the node of its last features."""
    model = build_model(untrained("resnet18"))
    node = export.features_node(model, model.fc, SMALL, sample_batch(SMALL))  # type: ignore[arg-type]
    return export.Exportable(model, SMALL, node)


def test_the_archive_holds_the_handler_and_nothing_of_this_machine(archive: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        names = set(content.namelist())
        everything = b"".join(content.read(name) for name in names)
    assert {
        "MAR-INF/MANIFEST.json",
        "classifier.npy",
        "densenet_handler.py",
        "handler/images.py",
        "handler/page.html",
        "index_to_name.json",
        "model-card.json",
        "model-config.yaml",
        "model.onnx",
    } <= names
    assert not [name for name in names if "pycache" in name]
    assert str(Path.cwd()).encode() not in everything
    assert str(Path.home()).encode() + b"/" not in everything


def test_two_builds_are_byte_identical(archive: Path, weights: Weights, tmp_path: Path) -> None:
    again = build(recipe(weights), tmp_path)
    assert hashlib.sha256(again.read_bytes()).digest() == (
        hashlib.sha256(archive.read_bytes()).digest()
    )


def test_two_exports_are_byte_identical(subject: export.Exportable, tmp_path: Path) -> None:
    files = [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    for file in files:
        export.export(subject, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_archive_that_is_up_to_date_is_kept(archive: Path, weights: Weights) -> None:
    before = archive.stat().st_mtime_ns
    assert build(recipe(weights), archive.parent) == archive
    assert archive.stat().st_mtime_ns == before


def test_other_weights_make_another_archive(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "densenet121.mar").write_bytes(b"half an archive")
    other = Weights(weights.state_dict, "mine.pth", weights.sha256, trained=True)
    card = read_card(build(recipe(other), tmp_path))
    assert card is not None
    assert (card.trained, card.weights_file) == (True, "mine.pth")


def test_untrained_weights_show_in_the_version(archive: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        manifest = json.loads(content.read("MAR-INF/MANIFEST.json"))
    assert manifest["model"]["modelVersion"] == "1.0-untrained"


def test_an_export_that_differs_stops_the_build(subject: export.Exportable, tmp_path: Path) -> None:
    exported = tmp_path / "model.onnx"
    export.export(subject, exported)
    said: list[str] = []
    with torch.no_grad():
        subject.model.fc.bias[7] += 0.001  # type: ignore[union-attr,index,operator]
    with pytest.raises(UserError, match=r"differs from PyTorch by 1.0e-03"):
        export.check(subject, exported, sample_batch(SMALL), said.append)
    assert "over 18 images" in said[0]


def test_an_export_whose_features_differ_stops_the_build(
    subject: export.Exportable, tmp_path: Path
) -> None:
    """Features that the logits do not show: a channel without weight in the last layer."""
    exported = tmp_path / "model.onnx"
    with torch.no_grad():
        subject.model.fc.weight[:, 7] = 0  # type: ignore[union-attr,operator]
    export.export(subject, exported)
    with torch.no_grad():
        subject.model.layer4[1].bn2.bias[7] += 100  # type: ignore[union-attr,index]
    said: list[str] = []
    with pytest.raises(UserError, match=r"differs from PyTorch by \d.\de\+0"):
        export.check(subject, exported, sample_batch(SMALL)[:4], said.append)
    assert re.search(r"e-0\d in logits, \d.\de\+0\d in features", said[0])


def test_a_model_too_large_for_onnx_is_refused_before_its_export(tmp_path: Path) -> None:
    model = torch.nn.Linear(30_000, 20_000, device="meta")
    with pytest.raises(UserError, match=r"weights are 2.4 GB, and .* holds 2.1 GB.* ENGINE=torch"):
        export.export_plain(model, 224, tmp_path / "model.onnx")


@pytest.mark.parametrize("command", ["scripts.build.commands", "scripts.serve.commands start"])
def test_production_refuses_untrained_weights(command: str, archive: Path, tmp_path: Path) -> None:
    """No host is reachable at this address, and the archive in the store is untrained."""
    unreachable = "http://127.0.0.1:9/densenet121-a639ec97.pth"
    options = ["--url", unreachable] if command == "scripts.build.commands" else []
    result = subprocess.run(
        [sys.executable, "-m", *command.split(), *options, "--model-store", str(archive.parent)],
        capture_output=True,
        text=True,
        check=False,
        env={"TORCH_HOME": str(tmp_path), "PATH": ""},
    )
    assert result.returncode == 1
    assert "WEIGHTS=path" in result.stderr
    assert "Traceback" not in result.stderr


def test_both_engines_give_the_same_logits(archive: Path, weights: Weights, tmp_path: Path) -> None:
    images = sample_batch(Preprocessing())[:6]
    with zipfile.ZipFile(archive) as content:
        card = ModelCard.from_json(content.read("model-card.json"))
        (tmp_path / "model.onnx").write_bytes(content.read("model.onnx"))
    torch.save(weights.state_dict, tmp_path / "model.pth")
    logits = [
        load_engine(tmp_path / name, card, Cores(1, 2, tmp_path / "busy")).logits(images)
        for name in ("model.onnx", "model.pth")
    ]
    assert logits[0].shape == (6, 1000)
    assert logits[0].dtype == logits[1].dtype == np.float32
    assert np.abs(logits[0] - logits[1]).max() < MAX_DIFFERENCE


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
    archive: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    card = read_card(archive)
    assert card is not None
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        load_engine(tmp_path / name, card, Cores(1, 1, tmp_path / "busy"))


def test_the_class_index_in_the_archive_is_the_committed_one(archive: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        assert json.load(io.BytesIO(content.read(CLASS_INDEX))) == json.loads(
            Path("handler/index_to_name.json").read_text()
        )


def test_what_is_packed_is_said(
    weights: Weights, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To be compared with what the model was trained with."""
    assert build(recipe(weights), archive.parent) == archive
    said = capsys.readouterr().out
    assert "densenet121 on ONNX Runtime (CPU), weights seeded random numbers in float32" in said
    assert (
        "shorter side to 255 pixels (bilinear), 224 x 224 from the centre, "
        "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in said
    )
    assert "1000 classes: tench, goldfish, ..., toilet_tissue" in said
