"""Options of reduced precision, and which images are used for what."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from handler.errors import ArchiveError
from handler.inference.cores import Cores
from handler.inference.precision import CHECK_IMAGES, CHECK_LABELS, load_with_fallback
from handler.labels import Label
from scripts.build import reduced_precision
from scripts.build.guard import compare
from scripts.build.model_file import Precision
from scripts.build.reduced_precision import add_reduced_precision, digest, split
from scripts.terminal import UserError
from tests.unit.parts import archive

LABELS = [Label("n1", "tabby_cat"), Label("n2", "dog"), Label("n3", "container ship")]
HERE = Path(__file__).parent
CARD = archive(LABELS).card


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return ten images of each of three classes; of one class, the last is a copy."""
    random = np.random.default_rng(0)
    for name in ("tabby cat", "n2", "Container-Ship"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{number}.png")
    first = tmp_path / "classes" / "n2" / "0.png"
    (tmp_path / "classes" / "n2" / "9.png").write_bytes(first.read_bytes())
    return tmp_path / "classes"


def test_untrained_weights_are_rejected(tmp_path: Path, images: Path) -> None:
    card = dataclasses.replace(CARD, trained=False)
    wanted = Precision(type="int8", calibration=images)
    with pytest.raises(UserError, match="needs trained weights"):
        add_reduced_precision(wanted, tmp_path / "none", card, LABELS, tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_a_rejection_of_bf16_does_not_advise_to_calibrate(known: bool) -> None:
    exact = np.tile(np.array([0.9, 0.1], np.float32), (150, 1))
    reduced = exact.copy()
    reduced[:2] = exact[:2, ::-1]
    truth = np.tile([True, False], (150, 1)) if known else None
    wanted = Precision(type="bf16", evaluation=HERE)
    with pytest.raises(UserError, match=r"bf16 costs too much, .*2 of 150|148 of 150") as error:
        reduced_precision._judge(wanted, compare(exact, reduced, truth))
    key = "max_loss" if known else "agreement"
    assert str(error.value).endswith(f" Change {key} under precision in the model file.")
    assert "alibrat" not in str(error.value)


def test_half_is_held_back_and_no_image_is_in_both(images: Path) -> None:
    calibration, evaluation, classes = split(Precision(type="int8", calibration=images), LABELS)
    assert len(calibration) == 14
    assert len(evaluation) == 15
    assert not {path.read_bytes() for path in calibration} & {p.read_bytes() for p in evaluation}
    assert classes is not None
    expected = {"tabby cat": 0, "n2": 1, "Container-Ship": 2}
    assert all(classes[path] == (expected[path.parent.name],) for path in evaluation)


def test_an_image_in_both_folders_is_not_evaluated_on(images: Path) -> None:
    wanted = Precision(type="int8", calibration=images / "n2", evaluation=images)
    calibration, evaluation, _ = split(wanted, LABELS)
    assert len(calibration) == 9
    assert {path.parent.name for path in evaluation} == {"tabby cat", "Container-Ship"}
    with pytest.raises(UserError, match="too few images"):
        split(Precision(type="int8", calibration=images, evaluation=images), LABELS)


def test_folders_with_other_names_are_not_classes_and_a_mixture_is_rejected(
    images: Path,
) -> None:
    others = [Label("a", "b"), Label("c", "d")]
    assert split(Precision(type="bf16", evaluation=images), others)[2] is None
    with pytest.raises(UserError, match=r"but not Container-Ship, tabby cat"):
        split(Precision(type="bf16", evaluation=images), LABELS[1:2])


def test_a_folder_that_could_be_several_classes_is_rejected_unless_named_by_id(
    images: Path,
) -> None:
    """ImageNet has two classes called crane, a bird and a machine."""
    labels = [*LABELS, Label("n4", "Tabby cat")]
    wanted = Precision(type="bf16", evaluation=images)
    with pytest.raises(UserError, match=r"called 'tabby cat'. Call the folder by id: n1, n4."):
        split(wanted, labels)
    (images / "tabby cat").rename(images / "n4")
    classes = split(wanted, labels)[2]
    assert classes is not None
    assert {c for path, c in classes.items() if path.parent.name == "n4"} == {(3,)}


def test_another_image_or_limit_makes_another_archive(images: Path) -> None:
    wanted = Precision(type="int8", calibration=images)
    before = digest(wanted)
    assert digest(Precision(type="int8", calibration=images, max_loss=1)) != before
    (images / "n2" / "3.png").unlink()
    assert digest(wanted) != before


def test_a_precision_with_other_labels_on_this_processor_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is a stub, since `make test` has no OpenVINO; see `test_precision.py`."""
    engine = SimpleNamespace(run=lambda _: SimpleNamespace(logits=np.eye(3)[[0, 1, 2, 0]]))
    stub = SimpleNamespace(OpenVinoEngine=lambda *_: engine)
    monkeypatch.setitem(sys.modules, "handler.inference.openvino_engine", stub)
    card = dataclasses.replace(CARD, precision="int8")
    arguments = (tmp_path / "model.onnx", card, Cores(1, 1, tmp_path / "busy"))
    np.save(tmp_path / CHECK_IMAGES, np.zeros((4, 3, 8, 8), np.uint8))
    np.save(tmp_path / CHECK_LABELS, np.array([0, 1, 2, 1]))
    assert load_with_fallback(*arguments, gpu=None, required=True) == (engine, "")
    np.save(tmp_path / CHECK_LABELS, np.array([0, 1, 1, 1]))
    with pytest.raises(ArchiveError, match="2 of 4 images get another top-1 label"):
        load_with_fallback(*arguments, gpu=None, required=True)
