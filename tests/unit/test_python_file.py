"""The user's own PyTorch code: one class, made without arguments, and its weights."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.build.model_file import ModelFile, from_options
from scripts.build.pipeline import build
from scripts.build.sources.python_file import open_source
from scripts.store import read_card
from scripts.terminal import UserError

PARTS = """
from torch import nn

class Block(nn.Sequential):
    def __init__(self, out):
        super().__init__(nn.Conv2d(3, out, 3, stride=4), nn.ReLU())
"""
MODEL = """
from torch import nn
from parts_of_mine import Block

class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.body = Block(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, classes))

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "parts_of_mine.py").write_text(PARTS)
    (tmp_path / "model.py").write_text(MODEL)
    torch.manual_seed(2)
    last = nn.Linear(6, 4)
    head = nn.Sequential(nn.Linear(8, 6), nn.GELU(), last)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 8, 3, stride=4)), "head": head})
    with torch.no_grad():
        last.weight.mul_(20)
    torch.save({"net": model.state_dict()}, tmp_path / "mine.pth")
    yield tmp_path
    sys.modules.pop("parts_of_mine", None)


def spec_in(folder: Path) -> ModelFile:
    return from_options(
        name="mine",
        model=folder / "model.py",
        weights=folder / "mine.pth",
        classes=["a", "b", "c", "d"],
        preprocessing={"preset": "torch", "resize": 72, "crop": 64},
    )


def test_it_is_packed_as_onnx_and_none_of_its_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = build(spec_in(folder), folder)
    card = read_card(archive)
    assert card is not None
    assert (card.architecture, card.classes) == ("Net", 4)
    assert "largest difference to PyTorch over 26 images" in capsys.readouterr().out
    assert b"parts_of_mine" not in archive.read_bytes()


def test_other_code_in_a_file_that_it_imports_builds_the_archive_again(folder: Path) -> None:
    before = hashlib.sha256(build(spec_in(folder), folder).read_bytes()).digest()
    (folder / "parts_of_mine.py").write_text(PARTS.replace("ReLU", "Tanh"))
    sys.modules.pop("parts_of_mine")
    assert hashlib.sha256(build(spec_in(folder), folder).read_bytes()).digest() != before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "exactly one nn.Module class, the model. It has none"),
        (MODEL + "\nclass Other(nn.Module): ...", "It has Net, Other"),
        ("import no_such_module_at_all", "cannot be run: ModuleNotFoundError"),
        ("def", "cannot be run: SyntaxError"),
        (MODEL.replace("classes=4", "classes"), r"Net\(\) cannot be made without arguments"),
        (MODEL.replace("classes=4", "classes=5"), "mine.pth does not fit Net"),
    ],
)
def test_what_is_wrong_with_the_code_is_named(code: str, message: str, folder: Path) -> None:
    (folder / "model.py").write_text(code)
    with pytest.raises(UserError, match=message):
        open_source(folder / "model.py", folder / "mine.pth", None)
