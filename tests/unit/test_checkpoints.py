"""Weights in all forms in which people keep them, and files that must not be loaded."""

import argparse
import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.build import checkpoints
from scripts.build.checkpoints import DigestError, read_checkpoint
from scripts.terminal import UserError


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


MODEL = small_model().eval()
WEIGHTS = MODEL.state_dict()


def state_dict(path: Path) -> None:
    torch.save(WEIGHTS, path)


def before_pytorch_1_6(path: Path) -> None:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path) -> None:
    save_file(WEIGHTS, path)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(MODEL, torch.zeros(1, 3, 8, 8)), path)  # type: ignore[no-untyped-call]


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(MODEL, (torch.zeros(1, 3, 8, 8),)), path)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("save", "name"),
    [
        (state_dict, "weights.pth"),
        (before_pytorch_1_6, "old.pth"),
        (safetensors, "model.safetensors"),
        (torchscript, "scripted.pt"),
        (exported, "exported.pt2"),
    ],
)
def test_each_format_gives_the_same_weights_and_is_rejected_when_cut_off(
    save: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    save(file)
    checkpoint = read_checkpoint(file)
    assert (checkpoint.file, list(checkpoint.states)) == (name, [""])
    assert checkpoint.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint.states[""].keys() == WEIGHTS.keys()
    assert all(checkpoint.states[""][key].equal(WEIGHTS[key]) for key in WEIGHTS)
    os.truncate(file, file.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match="cut off"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("beside", "keys"),
    [
        ({"net": WEIGHTS, "best_acc": np.float64(0.9), "matrix": np.eye(3)}, ["net"]),
        ({"weights": dict(WEIGHTS), "args": argparse.Namespace(lr=0.1, out=Path())}, ["weights"]),
        ({"run": {"model": {"module": WEIGHTS}}, "epoch": 7}, ["run.model.module"]),
        ({"hyper_parameters": {"data": Path("/data")}, "state_dict": WEIGHTS}, ["state_dict"]),
        ({"model": WEIGHTS, "args": SimpleNamespace(), "log": defaultdict(list, a=[1])}, ["model"]),
        ({"model": WEIGHTS, "model_ema": OrderedDict(WEIGHTS)}, ["model", "model_ema"]),
        ({"last": WEIGHTS, "best": WEIGHTS}, ["last"]),
        (WEIGHTS | {"epoch": 3, "options": {"lr": 0.1}}, [""]),
    ],
)
def test_state_dicts_are_found_under_any_key_beside_harmless_objects(
    beside: dict[str, object], keys: list[str], tmp_path: Path
) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(beside, tmp_path / "checkpoint.pth")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert list(checkpoint.states) == keys
    assert checkpoint.keys == tuple(beside)
    assert checkpoint.states[keys[0]].keys() == WEIGHTS.keys()
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_the_state_of_an_optimizer_is_not_taken_for_weights(tmp_path: Path) -> None:
    moments = {"exp_avg": dict(WEIGHTS), "param_groups": [{"lr": 0.1}]}
    states = {"optimizer": {"exp_avg": dict(WEIGHTS)}, "g_optim": dict(WEIGHTS), "sgd": moments}
    torch.save(states | {"optimal": WEIGHTS}, tmp_path / "checkpoint.pth")
    assert list(read_checkpoint(tmp_path / "checkpoint.pth").states) == ["optimal"]


class Bomb:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


class Foreign:
    """As a training script's class."""


def test_no_pickle_runs_code_and_the_class_that_it_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match=r"would run posix\.system"):
        read_checkpoint(Path("bomb.pth"))
    torch.save({"state_dict": WEIGHTS, "config": Foreign()}, "x.ckpt")
    with pytest.raises(UserError, match=r"needs tests\.unit\.test_checkpoints\.Foreign\.") as error:
        read_checkpoint(Path("x.ckpt"))
    # The command in the message does what it should.
    command = str(error.value).split('python -c "')[1].split('"')[0]
    exec(command, {})  # noqa: S102
    assert read_checkpoint(Path("x-weights.pth")).states[""].keys() == WEIGHTS.keys()
    torch.save(MODEL, "$(reboot).pth")
    with pytest.raises(UserError, match=r"container\.Sequential.*\('x\.ckpt'.*whole model"):
        read_checkpoint(Path("$(reboot).pth"))
    exported(Path("good.pt2"))
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for entry in good.infolist():
            content = good.read(entry)
            if entry.filename.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            if entry.filename.endswith("/weight_0"):
                content = Path("bomb.pth").read_bytes()
            bad.writestr(entry, content)
    with pytest.raises(UserError, match="without running code: its tensors are pickled"):
        read_checkpoint(Path("bad.pt2"))
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
def test_torchscript_that_runs_code_on_loading_is_rejected(folder: str, tmp_path: Path) -> None:
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
        read_checkpoint(tmp_path / "running.pt")


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
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_in_a_zip_file_are_rejected(tmp_path: Path) -> None:
    state_dict(tmp_path / "twice.pth")
    with zipfile.ZipFile(tmp_path / "twice.pth", "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), b"")
    with pytest.raises(UserError, match="two files of one name"):
        read_checkpoint(tmp_path / "twice.pth")


CIRCULAR: dict[str, object] = {}
CIRCULAR["model"] = CIRCULAR
DEEP: dict[str, object] = {"a.weight": torch.zeros(2, 2)}
for _ in range(50):
    DEEP = {"x": DEEP}
HOSTILE = OrderedDict(WEIGHTS)
HOSTILE._metadata = {"": {"version": 1}, "0": 3}  # type: ignore[attr-defined]
NO_STATE_DICT = "does not hold a state dict"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(1).expand(10**8, 512)}, "more weights than it holds"),
        ({"fc.weight": torch.zeros(10**4, 10**4, device="meta")}, r"fc\.weight is not a plain"),
        ({"fc.weight": torch.eye(3), "fc._packed_params": (1, 2)}, "_packed_params is not a plain"),
        ({"a" * 301: torch.eye(3)}, "too long names"),
        ({f"{i}.weight": torch.zeros(1) for i in range(11)}, "too many tensors"),
        ({1: torch.zeros(3, 3)}, NO_STATE_DICT),
        ({}, NO_STATE_DICT),
        ([WEIGHTS], NO_STATE_DICT),
        ({"model": {"state_dict": 3}, "epoch": 4}, rf"{NO_STATE_DICT}.*It holds model, epoch\."),
        (HOSTILE, "cannot be read as weights: it is damaged"),
        (CIRCULAR, NO_STATE_DICT),
        (DEEP, NO_STATE_DICT),
    ],
)
def test_a_file_without_plain_weights_is_rejected(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_TENSORS", 10)
    torch.save(content, tmp_path / "saved.pth")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "saved.pth")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_a_file_of_something_else_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match="is not a file of PyTorch weights"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere.pth cannot be read: No such file"):
        read_checkpoint(Path("nowhere.pth"))


def test_a_file_with_another_hash_is_not_even_parsed(tmp_path: Path) -> None:
    hostile = tmp_path / "weights.pth"
    hostile.write_bytes(pickle.dumps({"weight": torch.ones(1)}))
    with pytest.raises(DigestError, match="It was not loaded"):
        read_checkpoint(hostile, hashlib.sha256(b"another file").hexdigest())
