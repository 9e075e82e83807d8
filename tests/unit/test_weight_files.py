"""Weights in all formats in which people keep them, and files that must not be loaded."""

import argparse
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from scripts.build import architectures, heads
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


@pytest.fixture(autouse=True)
def _few_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that do not fit are compared with two architectures, since with all it takes long."""
    for module in (architectures, heads):
        monkeypatch.setattr(module, "architectures", lambda: ("densenet121", ARCHITECTURE))


def state_dict(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def checkpoint(model: nn.Module, path: Path) -> None:
    """As torchvision's training scripts write it, with their arguments."""
    state = {"model": model.state_dict(), "epoch": 7, "args": argparse.Namespace(lr=0.1)}
    torch.save({**state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, path)


def wrapped(model: nn.Module, path: Path) -> None:
    """As a training loop writes it that wraps a compiled model into DataParallel."""
    renamed = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": renamed}, path)


def torchscript(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 64, 64)), path)  # type: ignore[no-untyped-call]


def exported(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 64, 64),)), path)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("save", "name"),
    [
        (state_dict, "weights.pth"),
        (checkpoint, "checkpoint.pth"),
        (wrapped, "wrapped.pt"),
        (lambda model, path: save_file(model.state_dict(), path), "model.safetensors"),
        (torchscript, "scripted.pt"),
        (exported, "exported.pt2"),
    ],
)
def test_each_format_gives_the_same_weights_and_is_rejected_when_cut_off(
    save: Callable[[nn.Module, Path], None], name: str, model: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / name
    save(model, file)
    weights, expected = load(file, ARCHITECTURE), model.state_dict()
    assert (weights.classes, weights.trained, weights.file) == (CLASSES, True, name)
    assert weights.state_dict.keys() == expected.keys()
    assert all(torch.equal(weights.state_dict[key], expected[key]) for key in expected)
    os.truncate(file, file.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match="cut off"):
        load(file, ARCHITECTURE)


class Bomb:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


def test_a_pickle_that_would_run_code_is_not_opened_in_an_exported_program_either(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match="holds more than weights"):
        load(Path("bomb.pth"))
    exported(model, Path("good.pt2"))
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for entry in good.infolist():
            content = good.read(entry)
            if entry.filename.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            if entry.filename.endswith("/weight_0"):
                content = Path("bomb.pth").read_bytes()
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
    """PyTorch ignores the case of the names of its files."""
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


def test_a_compressed_file_of_far_more_is_not_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch compresses nothing, but would decompress 40 MB of zeros from 40 kB."""
    torch.save({"classifier.1.weight": torch.zeros(10_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was decompressed"))
    with pytest.raises(UserError, match="far larger than it looks"):
        load(tmp_path / "bomb.pth", ARCHITECTURE)


CIRCULAR: dict[str, object] = {}
CIRCULAR["model"] = CIRCULAR
LAST = "classifier.1"
NO_STATE_DICT = "does not hold a state dict"
WHOLE_MODEL = r"holds more than weights.*torch.save\(model.state_dict"
NOT_FINITE = f"{LAST}.bias holds values that are not finite"
SQUEEZE = "features.3.squeeze.weight"
OTHER_SIZE = rf"{SQUEEZE}: .*\[8, 64, 1, 1\].*\[16, 64, 1, 1\]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(3, 3), WHOLE_MODEL),
        ({f"{LAST}.weight": torch.zeros(1).expand(10**8, 512, 1, 1)}, "more weights than it holds"),
        ({f"{LAST}.weight": torch.tensor(1.0)}, f"has no {LAST}.weight"),
        ({"fc.weight": torch.zeros(3)}, f"saved.pth does not fit .*: it has no {LAST}.weight"),
        ({1: torch.zeros(3)}, NO_STATE_DICT),
        ({}, NO_STATE_DICT),
        ({"model": {"state_dict": 3}}, NO_STATE_DICT),
        (CIRCULAR, "cannot be read as weights"),
    ],
)
def test_a_file_that_holds_no_weights_of_the_architecture_is_rejected(
    content: object, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "saved.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "saved.pth", ARCHITECTURE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (SQUEEZE, torch.zeros(8, 64, 1, 1), OTHER_SIZE),
        (f"{LAST}.bias", torch.tensor([0, torch.nan, 0]), NOT_FINITE),
    ],
)
def test_a_layer_of_another_size_or_with_infinite_values_is_named(
    name: str, value: Tensor, message: str, model: nn.Module, tmp_path: Path
) -> None:
    torch.save({**model.state_dict(), name: value}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "mine.pth", ARCHITECTURE)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_a_file_of_something_else_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match="is not a file of PyTorch weights"):
        load(tmp_path / "weights.pth")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere.pth cannot be read: No such file"):
        load(Path("nowhere.pth"))


def test_the_right_architecture_is_suggested(model: nn.Module, tmp_path: Path) -> None:
    state_dict(model, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=r"no classifier.weight.* ARCH=squeezenet1_1"):
        load(tmp_path / "mine.pth", "densenet121")


def test_each_class_of_the_weights_must_have_a_name(model: nn.Module, tmp_path: Path) -> None:
    state_dict(model, tmp_path / "mine.pth")
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
