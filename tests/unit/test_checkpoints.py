"""Weights in all forms in which people keep them, and files that must not be loaded."""

import argparse
import hashlib
import os
import pickle
import resource
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
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


def same(found: NDArray[Any], expected: torch.Tensor) -> bool:
    return bool(np.array_equal(found, expected.numpy()) and found.dtype == expected.numpy().dtype)


FORMATS: dict[str, Callable[[Path], object]] = {
    "weights.pth": lambda path: torch.save(WEIGHTS, path),
    "old.pth": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "model.safetensors": lambda path: save_file(WEIGHTS, path),
    "scripted.pt": scripted,
    "exported.pt2": exported,
    "whole.pth": lambda path: torch.save(MODEL, path),
    "protocol4.pth": lambda path: torch.save(WEIGHTS, path, pickle_protocol=4),
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
    assert all(same(checkpoint.states[""][key], WEIGHTS[key]) for key in WEIGHTS)
    os.truncate(file, file.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match="cut off"):
        read_checkpoint(file)


class Foreign:
    """As a training script's class."""


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
        (
            {"state_dict": WEIGHTS, "config": Foreign(), "seen": {1, 2}, 3: (4.5, b"6")},
            ["state_dict"],
        ),
        ({"optimizer": {"exp_avg": dict(WEIGHTS)}, "optimal": WEIGHTS}, ["optimal"]),
        ({"g_optim": dict(WEIGHTS), "sgd": MOMENTS, "optimal": WEIGHTS}, ["optimal"]),
    ],
)
def test_state_dicts_but_optimizers_are_found_under_any_key_beside_harmless_objects(
    beside: dict[str, object], keys: list[str], tmp_path: Path
) -> None:
    torch.save(beside, tmp_path / "checkpoint.pth")
    states = read_checkpoint(tmp_path / "checkpoint.pth").states
    assert list(states) == keys
    assert states[keys[0]].keys() == WEIGHTS.keys()


class Bomb:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


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


def test_no_pickle_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Bomb()}, "bomb.pth")
    rejected(Path("bomb.pth"), NO_STATE_DICT)
    torch.save({"model": WEIGHTS, "args": Bomb()}, "beside.pth")
    assert list(read_checkpoint(Path("beside.pth")).states) == ["model"]
    assert not Path("bomb-went-off").exists()


def test_types_without_a_counterpart_in_numpy_are_read_as_float32_or_rejected(
    tmp_path: Path,
) -> None:
    path = tmp_path / "weights.pth"
    values = torch.tensor([[1.0, -2.5], [float("inf"), 3e38]])
    for save in (torch.save, save_file):
        file = path if save is torch.save else path.with_suffix(".safetensors")
        save({"fc.weight": values.bfloat16(), "fc.bias": values.half()}, file)
        (state,) = read_checkpoint(file).states.values()
        assert same(state["fc.weight"], values.bfloat16().float())
        assert same(state["fc.bias"], values.half())
    torch.save({"fc.weight": torch.eye(2, dtype=torch.complex64)}, path)
    rejected(path, r"fc\.weight is not a plain tensor")


def test_views_of_one_storage_are_read_as_they_are(tmp_path: Path) -> None:
    values = torch.arange(24.0)
    views = {"a.weight": values.view(4, 6).T, "b.weight": values[3:9:2], "c.weight": values[5:5]}
    torch.save(views, tmp_path / "views.pth")
    (state,) = read_checkpoint(tmp_path / "views.pth").states.values()
    assert all(same(state[name], tensor) for name, tensor in views.items())


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_corrupted_file_gives_weights_or_an_error_message(count: int, tmp_path: Path) -> None:
    """Bytes changed, cut out and repeated, most of them where the structure is."""
    random = np.random.default_rng(count)
    files = []
    for name, save in FORMATS.items():
        save(tmp_path / name)
        files.append((name, (tmp_path / name).read_bytes()))
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = Counter[str]()
    for number in range(count):
        name, content = files[number % len(files)]
        path = tmp_path / f"corrupted-{name}"
        path.write_bytes(corrupted(content, random))
        try:
            read_checkpoint(path)
            outcomes["read"] += 1
        except UserError as error:
            outcomes[str(error).rpartition(": it is damaged")[1] or "rejected"] += 1
    assert outcomes.total() == count
    assert len(outcomes) > 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 200_000  # kB


def corrupted(content: bytes, random: np.random.Generator) -> bytes:
    """Return a file with one to four mutations."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        start = int(random.integers(0, len(data)))
        length = int(random.integers(1, 9))
        match random.integers(0, 4):
            case 0:
                data[start : start + length] = random.bytes(length)
            case 1:
                data[start] ^= 1 << int(random.integers(0, 8))
            case 2:
                del data[start : start + length]
            case _:
                data[start:start] = data[start : start + length]
    return bytes(data)


def pickled(*instructions: bytes) -> bytes:
    """Return a legacy file whose state dict is made by these instructions of pickle."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001)]
    system = pickle.dumps({"little_endian": True}, 2)
    return b"".join([*parts, system, b"\x80\x02", *instructions, b".", pickle.dumps([], 2)])


@pytest.mark.parametrize(
    "instructions",
    [
        [b"r\xff\xff\xff\x7f"],  # the number of an object in the memo
        [b"\x96" + b"\xff" * 7 + b"\x7f"],  # the length of a bytearray
        [b"X\xff\xff\xff\xff"],  # the length of a text
        [b")" + b"\x85" * 500_000, b"}", b"h\x00" * 3],  # nested tuples, never hashed
        [b"}", b")" + b"\x85" * 500_000, b"Ns"],  # the same as a key
        [b"(" * 500_000 + b"t" * 500_000],
        [b"cos\nsystem\n", b"X\x02\x00\x00\x00ls", b"\x85R"],
        [b"N" * 2_100_000],
    ],
)
def test_instructions_that_would_exhaust_memory_or_the_stack_are_rejected(
    instructions: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "hostile.pth").write_bytes(pickled(*instructions))
    rejected(tmp_path / "hostile.pth", f"{DAMAGED}|{NO_STATE_DICT}|too many objects")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"use_pickle": false', b'"use_pickle": true', "its tensors are pickled"),
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


def test_a_zip_file_with_compressed_weights_or_two_files_of_one_name_is_not_decompressed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"classifier.1.weight": torch.zeros(10_000_000)}, path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    rejected(path, "expand to far more than its size")
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
        ({"fc.weight": torch.zeros(10**4, 10**4, device="meta")}, NO_STATE_DICT),
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
