"""Weights in all the files in which people keep them, and files that must not be read."""

import argparse
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from scripts.build.archive import recipe
from scripts.build.weights import load
from scripts.terminal import UserError

# The smallest of torchvision's classifiers: 3 MB.
ARCHITECTURE = "squeezenet1_1"
CLASSES = 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    trained: nn.Module = get_model(ARCHITECTURE, num_classes=CLASSES).eval()
    return trained


def save_plain(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """As torchvision's training scripts write it, their arguments in it."""
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 7,
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(checkpoint, path)


def save_wrapped(model: nn.Module, path: Path) -> None:
    """As a training loop writes it that wraps a compiled model into DataParallel."""
    renamed = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": renamed}, path)


def save_safetensors(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_file(model.state_dict(), path)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def save_torchscript(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 64, 64)), path)  # type: ignore[no-untyped-call]


def save_exported(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 64, 64),)), path)


Save = Callable[[nn.Module, Path], None]
FORMS: dict[str, tuple[Save, str]] = {
    "state dict": (save_plain, "weights.pth"),
    "checkpoint": (save_checkpoint, "checkpoint.pth"),
    "wrapped": (save_wrapped, "wrapped.pt"),
    "safetensors": (save_safetensors, "model.safetensors"),
    "TorchScript": (save_torchscript, "scripted.pt"),
    "exported program": (save_exported, "exported.pt2"),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(form: str, model: nn.Module, tmp_path: Path) -> None:
    save, name = FORMS[form]
    save(model, tmp_path / name)
    weights = load(tmp_path / name, ARCHITECTURE)
    expected: dict[str, Tensor] = model.state_dict()
    assert (weights.classes, weights.trained, weights.file) == (CLASSES, True, name)
    assert weights.state_dict.keys() == expected.keys()
    assert all(torch.equal(weights.state_dict[key], expected[key]) for key in expected)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_refused(form: str, model: nn.Module, tmp_path: Path) -> None:
    save, name = FORMS[form]
    save(model, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match="cut off"):
        load(tmp_path / name, ARCHITECTURE)


def test_a_whole_pickled_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"holds more than weights.*torch.save\(model.state_dict"):
        load(tmp_path / "model.pt", ARCHITECTURE)


class Bomb:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


def test_a_pickle_inside_an_exported_program_is_not_opened(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_exported(model, Path("good.pt2"))
    torch.save(Bomb(), "bomb")
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for entry in good.infolist():
            content = good.read(entry)
            if entry.filename.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            if entry.filename.endswith("/weight_0"):
                content = Path("bomb").read_bytes()
            bad.writestr(entry, content)
    with pytest.raises(UserError, match="without running code: its tensors are pickled"):
        load(Path("bad.pt2"), ARCHITECTURE)
    assert not Path("bomb-went-off").exists()


class RunsOnLoading(nn.Module):
    """TorchScript runs `__setstate__` as soon as a file is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.value, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.value = state[0]
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("folder", ["code", "CODE"])
def test_torchscript_that_runs_code_on_loading_is_refused(folder: str, tmp_path: Path) -> None:
    """PyTorch finds files in it whatever the case of their names."""
    torch.jit.save(torch.jit.script(RunsOnLoading()), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "running.pt", "w") as running,
    ):
        for entry in whole.infolist():
            name = entry.filename.replace("/code/", f"/{folder}/")
            running.writestr(name, whole.read(entry))
    with pytest.raises(UserError, match="runs code of its own when it is loaded"):
        load(tmp_path / "running.pt", ARCHITECTURE)


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    state_dict = {"classifier.1.weight": torch.zeros(1).expand(10**8, 512, 1, 1)}
    torch.save(state_dict, tmp_path / "huge.pth")
    with pytest.raises(UserError, match="claims more weights than it holds"):
        load(tmp_path / "huge.pth", ARCHITECTURE)


def test_a_packed_file_that_unpacks_to_far_more_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch packs nothing, but unpacks what others packed: 40 MB of zeros from 40 kB."""
    torch.save({"classifier.1.weight": torch.zeros(10_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="far larger than it looks"):
        load(tmp_path / "bomb.pth", ARCHITECTURE)


@pytest.mark.parametrize(
    "content",
    [
        {"classifier.1.weight": torch.tensor(1.0)},
        {1: torch.zeros(3)},
        {},
        {"model": {"state_dict": 3}},
    ],
)
def test_odd_contents_are_refused_with_a_sentence(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError):
        load(tmp_path / "odd.pth", ARCHITECTURE)


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    circle: dict[str, object] = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "circle.pth")
    with pytest.raises(UserError):
        load(tmp_path / "circle.pth", ARCHITECTURE)


def test_a_layer_of_another_size_is_named_with_both_sizes(model: nn.Module, tmp_path: Path) -> None:
    state_dict = {**model.state_dict(), "features.3.squeeze.weight": torch.zeros(8, 64, 1, 1)}
    torch.save(state_dict, tmp_path / "other.pth")
    expected = r"features.3.squeeze.weight: .*\[8, 64, 1, 1\].*\[16, 64, 1, 1\]"
    with pytest.raises(UserError, match=expected):
        load(tmp_path / "other.pth", ARCHITECTURE)


def test_the_right_architecture_is_suggested(model: nn.Module, tmp_path: Path) -> None:
    save_plain(model, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=r"no classifier.weight.* ARCH=squeezenet1_1"):
        load(tmp_path / "mine.pth", "densenet121")


def test_values_that_are_not_finite_are_refused(model: nn.Module, tmp_path: Path) -> None:
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    state_dict["classifier.1.bias"][1] = float("nan")
    torch.save(state_dict, tmp_path / "diverged.pth")
    with pytest.raises(UserError, match=r"classifier.1.bias holds values that are not finite"):
        load(tmp_path / "diverged.pth", ARCHITECTURE)


def test_the_classes_must_be_named_and_be_as_many(model: nn.Module, tmp_path: Path) -> None:
    save_plain(model, tmp_path / "mine.pth")
    weights = load(tmp_path / "mine.pth", ARCHITECTURE)
    with pytest.raises(UserError, match=r"mine.pth tells 3 classes apart, and nothing names them"):
        recipe(weights)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"names 2 classes, but mine.pth tells 3 apart"):
        recipe(weights, classes=tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    mine = recipe(weights, "pets", tmp_path / "classes.txt")
    assert [label.class_name for label in mine.labels] == ["cat", "dog", "bird"]
    with pytest.raises(UserError, match="NAME must be 1 to 64 letters"):
        recipe(weights, "../pets", tmp_path / "classes.txt")
