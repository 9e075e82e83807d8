"""Reads weights, and nothing but weights, from the files in which PyTorch's users keep them.

No program in a file is ever run: pickles are read with `weights_only`, of a TorchScript or an
exported program only the tensors are taken.
"""

import argparse
import hashlib
import io
import json
import math
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.serialization import safe_globals

from scripts.terminal import UserError

# Where training scripts put the weights beside the optimizer's state.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "module")
# What wrappers put before every name: DataParallel, torch.compile, Lightning's usual attribute.
_PREFIXES = ("module.", "_orig_mod.", "model.")

# TorchScript's code is the only part of these files that is packed.
_PACKED_CODE_BYTES = 10_000_000

# An exported program's list of tensors, and their types by the numbers that it uses.
_EXPORTED_INDEX = "data/weights/model_weights_config.json"
_EXPORTED_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


class DigestError(UserError):
    """A file of weights is not the one that is known by its SHA-256."""


def read_state_dict(
    path: Path, expected_sha256: str | None = None
) -> tuple["OrderedDict[str, Tensor]", str]:
    """The weights of a file.

    Args:
        path: a state dict, or a checkpoint that holds one under `state_dict` or `model`, as
            `torch.save` writes them; safetensors; TorchScript; or an exported program (.pt2).
        expected_sha256: of the file, if known; checked before anything in it is parsed.

    Returns:
        parameter names to tensors, without the prefixes that wrappers add, and the file's SHA-256.

    Raises:
        UserError: the file is missing, cut off, holds no weights, or would have to run code;
            `DigestError` if its SHA-256 is not the expected one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The weights {path} cannot be read: {error.strerror}.") from error
    digest = hashlib.sha256(content).hexdigest()
    if expected_sha256 is not None and digest != expected_sha256:
        raise DigestError(
            f"{path} is damaged or not the expected file: its SHA-256 begins with {digest[:8]}, "
            f"not {expected_sha256[:8]}. It was not loaded."
        )
    try:
        loaded = _without_prefixes(_loaded(content, path))
        claimed = sum(tensor.numel() * tensor.element_size() for tensor in loaded.values())
    except UserError:
        raise
    except Exception as error:  # a foreign or hostile file makes the readers raise nearly anything
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, cut off, or something else "
            f"({type(error).__name__}: {str(error)[:200]})."
        ) from error
    if claimed > len(content):
        # A few bytes can stand for a tensor of any size.
        raise UserError(f"{path} claims more weights than it holds. Save its state dict.")
    return loaded, digest


def _loaded(content: bytes, path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return _from_safetensors(content, path)
    names: list[str] = []
    if zipfile.is_zipfile(io.BytesIO(content)):
        names = [entry.filename for entry in _zip_entries(content, path)]
    if any(name.endswith("/constants.pkl") for name in names):
        return _from_torchscript(_zip_members(content, path), path)
    if any(name.endswith(_EXPORTED_INDEX) for name in names):
        return _from_exported_program(_zip_members(content, path), path)
    return _from_pickle(content, path)


def _zip_entries(content: bytes, path: Path) -> list[zipfile.ZipInfo]:
    """The files in a zip file, before any of them is unpacked.

    Raises:
        UserError: two of them have the same name but for case, or they are far larger than they
            look.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise UserError(f"{path} holds two files of one name. Save its state dict.")
    if sum(entry.file_size for entry in entries) > 2 * len(content) + _PACKED_CODE_BYTES:
        raise UserError(f"{path} is far larger than it looks. Save its state dict.")
    return entries


def _zip_members(content: bytes, path: Path) -> dict[str, bytes]:
    """What the files in a zip file hold, by name; raises as `_zip_entries` does."""
    entries = _zip_entries(content, path)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in entries}


def _from_safetensors(content: bytes, path: Path) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # its own errors, and torch's for types it does not know
        raise UserError(f"{path} is no safetensors file, or is cut off: {error}.") from error


def _from_pickle(content: bytes, path: Path) -> Mapping[str, Tensor]:
    try:
        # torchvision's own training scripts put their arguments into a checkpoint.
        with safe_globals([argparse.Namespace]):
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds for a foreign file
        raise UserError(
            f"{path} is not a file of PyTorch weights, is cut off, or holds more than weights "
            "(a whole model saved by torch.save(model), say). Save its state dict: "
            "torch.save(model.state_dict(), path)"
        ) from error
    found = _state_dict_in(loaded)
    if found is None:
        raise UserError(f"{path} does not hold a state dict, a mapping of names to tensors.")
    return found


def _state_dict_in(loaded: object) -> Mapping[str, Tensor] | None:
    if not isinstance(loaded, Mapping):
        return None
    for key in _CHECKPOINT_KEYS:
        inner = loaded.get(key)
        if isinstance(inner, Mapping):
            return _state_dict_in(inner)
    if not loaded or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        return None
    return loaded


def _from_torchscript(members: Mapping[str, bytes], path: Path) -> Mapping[str, Tensor]:
    """Its code is TorchScript's, not Python's, and only `__setstate__` of it runs on loading."""
    if any(
        b"__setstate__" in content
        for name, content in members.items()
        if not name.endswith(".debug_pkl")
    ):
        raise UserError(f"{path} runs code of its own when it is loaded. Save its state dict.")
    # Packed anew: PyTorch reads zip files in its own way, and must see what was looked at here.
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; its files are not gone
            module = torch.jit.load(io.BytesIO(packed.getvalue()), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript that can be loaded, or is cut off.") from error
    return OrderedDict(module.state_dict())


def _from_exported_program(members: Mapping[str, bytes], path: Path) -> Mapping[str, Tensor]:
    """Not by `torch.export.load`, which unpickles whatever the file holds."""
    index = next(name for name in members if name.endswith(_EXPORTED_INDEX))
    folder = index.rpartition("/")[0]
    try:
        return OrderedDict(
            (name, _exported_tensor(members[f"{folder}/{entry['path_name']}"], entry))
            for name, entry in json.loads(members[index])["config"].items()
        )
    except Exception as error:
        raise UserError(
            f"{path} is no exported program whose weights can be read without running code: "
            f"{error}. Save its state dict."
        ) from error


def _exported_tensor(raw: bytes, entry: Mapping[str, object]) -> Tensor:
    if entry["use_pickle"]:
        raise ValueError("its tensors are pickled")
    match entry["tensor_meta"]:
        case {
            "dtype": int() as dtype,
            "sizes": list() as sizes,
            "strides": list() as strides,
            "storage_offset": {"as_int": 0},
        }:
            shape = [size["as_int"] for size in sizes]
            steps = [step["as_int"] for step in strides]
        case _:
            raise ValueError("it describes its tensors in another way")
    flat = torch.frombuffer(bytearray(raw), dtype=_EXPORTED_DTYPES[dtype])
    if flat.numel() < math.prod(shape):
        raise ValueError("it is cut off")
    return flat.as_strided(shape, steps).clone()


def _without_prefixes(loaded: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    state_dict = OrderedDict(loaded)
    metadata = layer_versions(loaded)
    if metadata is not None:
        set_layer_versions(state_dict, metadata)
    while prefix := next(
        (p for p in _PREFIXES if state_dict and all(key.startswith(p) for key in state_dict)), None
    ):
        consume_prefix_in_state_dict_if_present(state_dict, prefix)
    return state_dict


def layer_versions(state_dict: object) -> Mapping[str, Any] | None:
    """By which layers know old names of their parameters; only torch's own files have them."""
    versions: Mapping[str, Any] | None = getattr(state_dict, "_metadata", None)
    return versions


def set_layer_versions(state_dict: "OrderedDict[str, Tensor]", versions: Mapping[str, Any]) -> None:
    """Gives them to a state dict."""
    state_dict._metadata = OrderedDict(versions)  # type: ignore[attr-defined]  # noqa: SLF001
