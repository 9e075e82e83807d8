"""What `PRECISION=...` asks for, and which pictures it takes for what."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handler.labels import Label
from handler.settings import ModelCard
from scripts.build.lower_precision import LowerPrecision, chosen, make, split
from scripts.build.packing import check_choices
from scripts.terminal import UserError

LABELS = [Label("n1", "tabby_cat"), Label("n2", "dog"), Label("n3", "container ship")]
CARD = ModelCard(
    "densenet121", 3, trained=True, weights_file="", weights_sha256="", inputs_sha256=""
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten of each of three classes, the last one the same as the first."""
    random = np.random.default_rng(0)
    for name in ("tabby cat", "n2", "Container-Ship"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{number}.png")
    first = tmp_path / "classes" / "n2" / "0.png"
    (tmp_path / "classes" / "n2" / "9.png").write_bytes(first.read_bytes())
    return tmp_path / "classes"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"precision": "int4"}, "PRECISION must be float32, bf16, int8, got 'int4'"),
        ({"precision": "int8"}, "CALIBRATE=folder"),
        ({"precision": "bf16"}, "EVALUATE=folder"),
        ({"precision": "bf16", "calibrate": Path()}, "needs no calibration"),
        ({"precision": "float32", "evaluate": Path()}, "are for PRECISION=bf16 or PRECISION=int8"),
        ({"precision": "int8", "calibrate": Path("nowhere")}, "nowhere must be a folder"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(choice: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(**choice)  # type: ignore[arg-type]


def test_float32_asks_for_nothing_and_the_engine_must_be_openvino_s(pictures: Path) -> None:
    assert chosen("float32") is None
    with pytest.raises(UserError, match="PRECISION=int8 is OpenVINO's"):
        check_choices(None, "torch", chosen("int8", pictures))


def test_untrained_weights_are_refused_with_the_reason(tmp_path: Path, pictures: Path) -> None:
    card = dataclasses.replace(CARD, trained=False)
    with pytest.raises(UserError, match=r"needs trained weights. Random ones answer with near tie"):
        make(LowerPrecision("int8", pictures), tmp_path / "none", card, LABELS, tmp_path)


def test_half_is_held_back_and_no_picture_is_in_both(pictures: Path) -> None:
    calibration, evaluation, classes = split(LowerPrecision("int8", pictures), LABELS)
    assert len(calibration) == 14
    assert len(evaluation) == 15
    assert not {path.read_bytes() for path in calibration} & {p.read_bytes() for p in evaluation}
    assert classes is not None
    expected = {"tabby cat": 0, "n2": 1, "Container-Ship": 2}
    assert all(classes[path] == (expected[path.parent.name],) for path in evaluation)


def test_what_is_in_both_folders_is_not_measured_on(pictures: Path) -> None:
    wanted = LowerPrecision("int8", pictures / "n2", pictures)
    calibration, evaluation, _ = split(wanted, LABELS)
    assert len(calibration) == 9
    assert {path.parent.name for path in evaluation} == {"tabby cat", "Container-Ship"}
    with pytest.raises(UserError, match="too few pictures"):
        split(LowerPrecision("int8", pictures, pictures), LABELS)


def test_folders_that_are_no_classes_are_just_pictures_and_some_are_a_mistake(
    pictures: Path,
) -> None:
    others = [Label("a", "b"), Label("c", "d")]
    assert split(LowerPrecision("bf16", None, pictures), others)[2] is None
    with pytest.raises(UserError, match=r"but not Container-Ship, tabby cat"):
        split(LowerPrecision("bf16", None, pictures), LABELS[1:2])


def test_a_folder_that_could_be_several_classes_is_refused_unless_called_by_id(
    pictures: Path,
) -> None:
    """ImageNet has two classes called crane, a bird and a machine."""
    labels = [*LABELS, Label("n4", "Tabby cat")]
    wanted = LowerPrecision("bf16", None, pictures)
    with pytest.raises(UserError, match=r"called 'tabby cat'. Call the folder by id: n1, n4."):
        split(wanted, labels)
    (pictures / "tabby cat").rename(pictures / "n4")
    classes = split(wanted, labels)[2]
    assert classes is not None
    assert {c for path, c in classes.items() if path.parent.name == "n4"} == {(3,)}


def test_another_picture_or_bound_makes_another_archive(pictures: Path) -> None:
    before = chosen("int8", pictures)
    assert before is not None
    digest = before.digest()
    looser = chosen("int8", pictures, max_loss=1)
    assert looser is not None
    assert looser.digest() != digest
    (pictures / "n2" / "3.png").unlink()
    assert before.digest() != digest
