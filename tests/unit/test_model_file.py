"""Model files: what they say, what is wrong with them by line and key, and what variables mean."""

from pathlib import Path
from typing import Any

import pytest

from handler.settings import Preprocessing
from scripts.build.commands import ModelOptions
from scripts.build.model_file import ModelFile, from_options, read
from scripts.build.pipeline import resolved
from scripts.build.preprocessing import PreprocessingOptions, resolve
from scripts.terminal import UserError

PETS = """\
name: pets
model: pets.onnx          # an ONNX file, a folder in Hugging Face's form, or a Python file
classes: pets.txt
preprocessing:
  fit: squash             # crop, squash or pad
  resize: 256
  crop: 224
  interpolation: bilinear
  channels: bgr           # or rgb
  range: 255              # the scale of mean and std: 1 or 255
  mean: [104, 117, 123]   # in the model's order of channels
  std: [1, 1, 1]
activation: softmax       # or sigmoid, with thresholds
"""
RESNET = {"resize": 256, "crop": 224, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files for model files to name."""
    for name in ("pets.onnx", "pets.txt", "mine.pth", "model.py"):
        (tmp_path / name).write_text("cat\ndog\n")
    (tmp_path / "images").mkdir()
    return tmp_path


def parsed(folder: Path, text: str) -> ModelFile:
    (folder / "pets.yaml").write_text(text)
    return read(folder / "pets.yaml")


def test_the_documented_file_is_understood_and_its_paths_are_relative_to_it(folder: Path) -> None:
    spec = parsed(folder, PETS)
    assert (spec.model, spec.classes) == (folder / "pets.onnx", folder / "pets.txt")
    used = resolve(spec.preprocessing, {}, {}, "pets.onnx")
    mean, std = (104 / 255, 117 / 255, 123 / 255), (1 / 255,) * 3
    assert used == Preprocessing(256, 224, mean, std, "bilinear", "squash", "bgr")


def test_a_file_that_is_printed_means_the_same(folder: Path) -> None:
    spec = parsed(folder, PETS)
    assert parsed(folder, spec.to_yaml()) == spec
    shortcuts = ModelOptions(
        arch="resnet50", weights=str(folder / "mine.pth"), channels="bgr"
    ).spec()
    used = Preprocessing(300, 256, channels="bgr", fit="squash")
    kept = parsed(folder, resolved(shortcuts, used).to_yaml())
    assert resolve(kept.preprocessing, {}, {}, "") == used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch: resnet50\nwieghts: x", r"line 2: 'wieghts' is no key here. Did you mean weights\?"),
        (
            "arch: r\npreprocessing:\n  fit: fill",
            "line 3: preprocessing: fit: must be 'crop', 'squ",
        ),
        ("arch: r\npreprocessing:\n  men: 1", r"line 3: 'men' is no key here. Did you mean mean\?"),
        ("arch: r\npreprocessing:\n  mean: [104, 117, 123]", r"line 2.* say so: range: 255"),
        ("arch: r\npreprocessing:\n  mean: 0.5\n  range: 255", r"scale 0 to 1. Say so: range: 1"),
        ("arch: r\npreprocessing:\n  mean: [1, 2]", "line 3: preprocessing: mean"),
        ("arch: r\npreprocessing: kaffe", "line 2.*preset: must be 'caffe', 'tf' or 'torch', got"),
        ("arch: r\npreprocessing:\n  crop: 0", "line 3.*greater than or equal to 1, got 0"),
        ("arch: r\nmodel: pets.onnx", "set one of model and arch"),
        ("name: pets", "set one of model and arch"),
        ("arch: r\nclasses: nowhere.txt", "line 2: classes: there is no .*nowhere.txt"),
        (
            "arch: r\nprecision: int9",
            "line 2: precision: type: must be 'float32', 'bf16' or 'int8'",
        ),
        ("arch: r\nprecision: int8", "calibration: folder"),
        ("arch: r\nprecision: bf16", "evaluation: folder"),
        ("arch: r\nprecision: {type: bf16, calibration: images}", "bf16 needs no calibration"),
        ("arch: r\nprecision: {type: int8, calibration: pets.txt}", "must be a folder of images"),
        ("arch: r\nprecision: {calibration: images}", "are for bf16 and int8"),
        ("arch: r\nengine: tensorflow", "line 2: engine: must be 'onnx' or 'torch', got 'tensor"),
        ("arch: timm/r\nengine: torch", "engine: torch is for torchvision's architectures"),
        ("model: pets.onnx\nengine: torch", "engine: torch is for torchvision's architectures"),
        ("model: pets.onnx\nweights: mine.pth", "model is a whole model: leave weights out"),
        ("model: model.py", "a Python file needs weights"),
        ("arch: r\nweights_key: ema", "weights_key is for weights"),
        ("arch: r\nrevision: abc", "revision is for arch: timm/NAME without weights"),
        ("arch: r\nactivation: tanh", "line 2: activation: must be 'softmax' or 'sigmoid', got"),
        ("arch: r\nthresholds: 0.5", "line 2: thresholds does not fit activation: soft"),
        (
            "activation: sigmoid\narch: r\nthreshold: 0",
            "line 3: threshold does not fit activation: s",
        ),
        ("arch: r\nthreshold: 1.5", "line 2: threshold: must be less than or equal to 1, got 1.5"),
        (
            "arch: r\nactivation: sigmoid\nthresholds: 1.5",
            "line 3: thresholds: must be from 0 to 1",
        ),
        ("arch: r\nname: a/b", "must be 1 to 64 letters"),
        ("arch: r\narch: s", "line 2: arch occurs twice"),
        ("arch: [r]", "line 1: arch: must be a valid string, got"),
        ("- arch: r", "must hold keys and values"),
        ("arch: [", "is not valid YAML"),
        ("", "must hold keys and values"),
        ("a: &a [1]\nb: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_line_key_and_allowed_values(
    text: str, message: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        parsed(folder, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "nowhere.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    with pytest.raises(UserError, match="larger than 1 MB"):
        read(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"resize": 256, "crop": 224}),
        ({"fit": "squash"}, {"resize": 224, "crop": 224}),
        ({"crop": 96, "fit": "pad"}, {"resize": 96, "crop": 96}),
        ({"resize": 64, "crop": 64, "std": 1}, {"resize": 64, "std": (1, 1, 1)}),
        ({"preset": "caffe"}, {"channels": "bgr", "std": (1 / 255,) * 3, "resize": 256}),
        ({"preset": "tf", "std": 1}, {"mean": (0.5,) * 3, "std": (1, 1, 1)}),
        ({"channels": "bgr"}, {"channels": "bgr", "mean": (0.4, 0.5, 0.6)}),
    ],
)
def test_what_the_user_says_comes_before_what_the_model_says(
    said: dict[str, Any], expected: dict[str, Any]
) -> None:
    used = resolve(PreprocessingOptions(**said), RESNET, {}, "resnet50")
    assert {key: getattr(used, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"crop": 300}, "preprocessing of resnet50: crop 300 is larger than resize 256"),
        ({"std": (0, 1, 1)}, "std must be above 0"),
        ({"interpolation": "nearest", "crop": 64}, "crop of resnet50 is 224 and cannot be changed"),
    ],
)
def test_what_does_not_fit_is_rejected(said: dict[str, Any], message: str) -> None:
    fixed = {"crop": 224} if "cannot be changed" in message else {}
    with pytest.raises(UserError, match=message):
        resolve(PreprocessingOptions(**said), RESNET, fixed, "resnet50")


def test_variables_are_short_for_a_model_file(folder: Path) -> None:
    images = folder / "images"
    assert ModelOptions().spec() == from_options(arch="densenet121")
    assert ModelOptions(arch="timm/resnet50.a1_in1k").spec().name == "resnet50-a1_in1k"
    assert ModelOptions(precision="int8", images=images).spec().precision.calibration == images
    assert ModelOptions(precision="bf16", images=images).spec().precision.evaluation == images
    assert ModelOptions(model_file=folder / "pets.onnx", channels="bgr").spec().name == "pets"
    with pytest.raises(UserError, match="IMAGES is for PRECISION=int8"):
        ModelOptions(images=images).spec()
    with pytest.raises(UserError, match=r"channels: must be 'rgb' or 'bgr'"):
        ModelOptions(channels="gbr").spec()


def test_variables_replace_single_keys_of_a_model_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed(folder, PETS)
    monkeypatch.chdir(folder / "images")
    (folder / "images" / "other.txt").write_text("cat\ndog")
    spec = ModelOptions(
        model_file=Path("../pets.yaml"), name="dogs", channels="rgb", classes=Path("other.txt")
    ).spec()
    assert spec.model is not None
    assert (spec.name, spec.model.name, spec.classes) == ("dogs", "pets.onnx", Path("other.txt"))
    assert (spec.preprocessing.channels, spec.preprocessing.fit) == ("rgb", "squash")
