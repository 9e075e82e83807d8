"""A worker chooses between an archive's reduced precision and float32, with tiny models."""

import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest

from handler.errors import ArchiveError
from handler.inference.cores import Cores
from handler.inference.engines import Extra, load_engine
from handler.inference.openvino_engine import OpenVinoEngine
from handler.inference.precision import (
    CHECK_IMAGES,
    CHECK_LABELS,
    MAX_MISMATCHES,
    MODEL_FILES,
    load_with_fallback,
)
from handler.settings import MODEL_CARD, ModelCard
from tests.unit.test_handler import SIDE, write_model

IMAGES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An int8 archive's files; OpenVINO's model is float32's, so that the two agree."""
    write_model(tmp_path)
    exact = openvino.Core().read_model(tmp_path / "model.onnx")
    openvino.save_model(exact, tmp_path / MODEL_FILES["int8"], compress_to_fp16=False)
    card = dataclasses.replace(ModelCard.load(tmp_path / MODEL_CARD), precision="int8")
    (tmp_path / MODEL_CARD).write_text(card.to_json())
    images = np.random.default_rng(1).integers(0, 256, (IMAGES, 3, SIDE, SIDE), np.uint8)
    engine = load_engine(tmp_path / "model.onnx", card, Cores(1, 1, tmp_path / "busy"))
    np.save(tmp_path / CHECK_IMAGES, images)
    np.save(tmp_path / CHECK_LABELS, engine.run(images).logits.argmax(axis=1))
    return tmp_path


def load(folder: Path, *, required: bool = False) -> tuple[str, str]:
    """Return the precision that serves, and why it is not the archive's."""
    card = ModelCard.load(folder / MODEL_CARD)
    cores = Cores(1, 2, folder / "busy")
    engine, reason = load_with_fallback(
        folder / "model.onnx", card, cores, gpu=None, required=required
    )
    return engine.precision, reason


def mislabel(folder: Path, count: int) -> None:
    labels = np.load(folder / CHECK_LABELS)
    labels[:count] += 1
    np.save(folder / CHECK_LABELS, labels)


def test_int8_serves_if_its_labels_are_those_of_float32(folder: Path) -> None:
    mislabel(folder, MAX_MISMATCHES)
    assert load(folder, required=True) == ("int8", "")


def test_float32_serves_if_too_many_labels_differ_unless_int8_is_required(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mislabel(folder, MAX_MISMATCHES + 1)
    with caplog.at_level(logging.WARNING):
        precision, reason = load(folder)
    assert precision == "float32"
    assert reason == "2 of 12 images get another top-1 label than in float32; at most 1 may"
    assert f"Serving float32 instead of int8: {reason}" in caplog.text
    with pytest.raises(ArchiveError, match=r"int8 cannot be served here: 2 of 12 images"):
        load(folder, required=True)


def test_float32_serves_without_openvino_or_on_another_processor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        capability = "handler.inference.openvino_engine._CAPABILITY"
        patch.setattr(capability, {"int8": "none has this"})
        assert load(folder) == ("float32", "this processor does not compute in int8")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "handler.inference.openvino_engine", raising=False)
    precision, reason = load(folder)
    assert precision == "float32"
    assert "openvino" in reason


def test_a_damaged_model_is_replaced_but_a_missing_check_is_an_error(folder: Path) -> None:
    (folder / MODEL_FILES["int8"]).write_text("<net>")
    assert load(folder)[0] == "float32"
    (folder / CHECK_LABELS).unlink()
    with pytest.raises(ArchiveError, match=r"check-labels.npy: cannot be read"):
        load(folder)


def test_openvino_equals_onnx_runtime(folder: Path) -> None:
    """A batch in any number of threads, logits and features."""
    card, images = ModelCard.load(folder / MODEL_CARD), np.load(folder / CHECK_IMAGES)
    cores = Cores(1, 2, folder / "busy")
    exact = load_engine(folder / "model.onnx", card, cores)
    other = OpenVinoEngine(folder / MODEL_FILES["int8"], "int8", cores)
    found = other.run(images, Extra.FEATURES)
    for wanted, got in zip(exact.run(images, Extra.FEATURES), found, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(other.run(images).logits, found[0])
    with cores.busy(queue_not_empty=True):
        np.testing.assert_allclose(other.run(images).logits, exact.run(images).logits, atol=1e-4)
