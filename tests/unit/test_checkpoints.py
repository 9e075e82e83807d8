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
from torch import nn

from scripts.build import checkpoints
from scripts.build.checkpoints import DigestError, read_checkpoint
from scripts.terminal import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Duplicate name")

torch.manual_seed(3)
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
WEIGHTS = MODEL.state_dict()
IMAGE = torch.zeros(1, 3, 8, 8)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(MODEL, (IMAGE,)), path)


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.trace(MODEL, IMAGE), path)  # type: ignore[no-untyped-call]


FORMATS: dict[str, Callable[[Path], object]] = {
    "weights.pth": lambda path: torch.save(WEIGHTS, path),
    "old.pth": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "model.safetensors": lambda path: save_file(WEIGHTS, path),
    "scripted.pt": scripted,
    "exported.pt2": exported,
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_weights_and_is_rejected_when_cut_off(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    FORMATS[name](file)
    checkpoint = read_checkpoint(file)
    assert (checkpoint.file, list(checkpoint.states)) == (name, [""])
    assert checkpoint.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint.states[""].keys() == WEIGHTS.keys()
    assert all(checkpoint.states[""][key].equal(WEIGHTS[key]) for key in WEIGHTS)
    os.truncate(file, file.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match="cut off"):
        read_checkpoint(file)


MOMENTS = {"exp_avg": dict(WEIGHTS), "param_groups": [{"lr": 0.1}]}


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
        ({"optimizer": {"exp_avg": dict(WEIGHTS)}, "optimal": WEIGHTS}, ["optimal"]),
        ({"g_optim": dict(WEIGHTS), "sgd": MOMENTS, "optimal": WEIGHTS}, ["optimal"]),
    ],
)
def test_state_dicts_but_optimizers_are_found_under_any_key_beside_harmless_objects(
    beside: dict[str, object], keys: list[str], tmp_path: Path
) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(beside, tmp_path / "checkpoint.pth")
    states = read_checkpoint(tmp_path / "checkpoint.pth").states
    assert list(states) == keys
    assert states[keys[0]].keys() == WEIGHTS.keys()
    assert set(torch.serialization.get_safe_globals()) == allowed


class Bomb:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


class Foreign:
    """As a training script's class."""


def rejected(path: Path, reason: str) -> str:
    """Check that a file is rejected for a reason, and return the message."""
    with pytest.raises(UserError, match=reason) as error:
        read_checkpoint(path)
    assert not Path("bomb-went-off").exists()
    return str(error.value)


def repack(
    path: Path,
    change: Callable[[str, bytes], tuple[str, bytes]] = lambda *entry: entry,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Change the files in a zip file."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry in entries:
            archive.writestr(*change(*entry))
    return path


def test_no_pickle_runs_code_and_the_class_that_it_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "bomb.pth")
    rejected(Path("bomb.pth"), r"would run posix\.system")
    torch.save({"state_dict": WEIGHTS, "config": Foreign()}, "x.ckpt")
    message = rejected(Path("x.ckpt"), r"needs tests\.unit\.test_checkpoints\.Foreign\.")
    # The command in the message does what it should.
    exec(message.split('python -c "')[1].split('"')[0], {})
    assert read_checkpoint(Path("x-weights.pth")).states[""].keys() == WEIGHTS.keys()
    torch.save(MODEL, "$(reboot).pth")
    rejected(Path("$(reboot).pth"), r"container\.Sequential.*\('x\.ckpt'.*whole model")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"use_pickle": false', b'"use_pickle": true', "its tensors are pickled, and could run"),
        (b'"as_int": 4}', b'"as_int": 400000000}', "claims more weights than it holds"),
        (b'"as_int": 4}', b'"as_int": -4}', "it is damaged"),
    ],
)
def test_an_exported_program_with_pickled_or_impossible_tensors_is_rejected(
    old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    def changed(name: str, content: bytes) -> tuple[str, bytes]:
        if name.endswith("/weight_0") and b"pickle" in old:
            content = pickle.dumps(Bomb())
        return name, content.replace(old, new)

    exported(tmp_path / "bad.pt2")
    rejected(repack(tmp_path / "bad.pt2", changed), message)


@pytest.mark.parametrize("folder", ["/code/", "/CODE/"])
def test_torchscript_that_runs_code_on_loading_is_rejected(folder: str, tmp_path: Path) -> None:
    """PyTorch ignores the case of the names of its files."""

    def running(name: str, content: bytes) -> tuple[str, bytes]:
        return name.replace("/code/", folder), content.replace(b"def forward", b"def __setstate__")

    scripted(tmp_path / "running.pt")
    rejected(repack(tmp_path / "running.pt", running), "runs code of its own when it is loaded")


def test_a_zip_file_with_compressed_weights_or_two_files_of_one_name_is_not_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch compresses nothing, but would decompress 40 MB of zeros from 40 kB."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was decompressed"))
    path = tmp_path / "bomb.pth"
    torch.save({"classifier.1.weight": torch.zeros(10_000_000)}, path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    rejected(path, "expands to far more than its size")
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), b"")
    rejected(path, "two files of one name")


CIRCULAR: dict[str, object] = {}
CIRCULAR["model"] = CIRCULAR
DEEP: dict[str, object] = {"a.weight": torch.zeros(2, 2)}
for _ in range(50):
    DEEP = {"x": DEEP}
HOSTILE = OrderedDict(WEIGHTS)
HOSTILE._metadata = {"": {"version": 1}, "0": 3}  # type: ignore[attr-defined]
NO_STATE_DICT = "it holds no state dict"
DAMAGED = "it is damaged, cut off, or no file of weights"


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
        ({"model": {"state_dict": 3}, "epoch": 4}, rf"{NO_STATE_DICT}.*, but model, epoch\."),
        (CIRCULAR, NO_STATE_DICT),
        (DEEP, NO_STATE_DICT),
        (HOSTILE, DAMAGED),
        (b"", DAMAGED),
        (b"not weights", DAMAGED),
        (b"PK\x03\x04 cut off", DAMAGED),
    ],
)
def test_a_file_without_plain_weights_is_rejected(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_TENSORS", 10)
    path = tmp_path / "saved.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    rejected(path, message)


def test_a_missing_file_is_named_and_one_with_another_hash_is_not_even_parsed(
    tmp_path: Path,
) -> None:
    rejected(tmp_path / "nowhere.pth", "nowhere.pth cannot be read: No such file")
    hostile = tmp_path / "weights.pth"
    hostile.write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(DigestError, match="It was not loaded"):
        read_checkpoint(hostile, hashlib.sha256(b"another file").hexdigest())
