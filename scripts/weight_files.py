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


def read_state_dict(path: Path) -> tuple["OrderedDict[str, Tensor]", str]:
    """The weights of a file.

    Args:
        path: a state dict, or a checkpoint that holds one under `state_dict` or `model`, as
            `torch.save` writes them; safetensors; TorchScript; or an exported program (.pt2).

    Returns:
        parameter names to tensors, without the prefixes that wrappers add, and the file's SHA-256.

    Raises:
        UserError: the file is missing, cut off, holds no weights, or would have to run code.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The weights {path} cannot be read: {error.strerror}.") from error
    names = _zip_names(content)
    if path.suffix == ".safetensors":
        loaded = _from_safetensors(content, path)
    elif any(name.endswith("/constants.pkl") for name in names):
        loaded = _from_torchscript(content, names, path)
    elif any(name.endswith(_EXPORTED_INDEX) for name in names):
        loaded = _from_exported_program(content, path)
    else:
        loaded = _from_pickle(content, path)
    return _without_prefixes(loaded), hashlib.sha256(content).hexdigest()


def _zip_names(content: bytes) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


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
    if not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        return None
    return loaded


def _from_torchscript(content: bytes, names: list[str], path: Path) -> Mapping[str, Tensor]:
    """Its code is TorchScript's, not Python's, and only `__setstate__` of it runs on loading."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        code = [archive.read(name) for name in names if "/code/" in name]
    if len(set(names)) < len(names) or any(b"__setstate__" in text for text in code):
        raise UserError(f"{path} runs code of its own when it is loaded. Save its state dict.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; its files are not gone
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript that can be loaded, or is cut off.") from error
    return OrderedDict(module.state_dict())


def _from_exported_program(content: bytes, path: Path) -> Mapping[str, Tensor]:
    """Not by `torch.export.load`, which unpickles whatever the file holds."""
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        index = next(name for name in archive.namelist() if name.endswith(_EXPORTED_INDEX))
        folder = index.rpartition("/")[0]
        try:
            for name, entry in json.loads(archive.read(index))["config"].items():
                raw = archive.read(f"{folder}/{entry['path_name']}")
                tensors[name] = _exported_tensor(raw, entry)
        except (ValueError, TypeError, KeyError, zipfile.BadZipFile, RuntimeError) as error:
            raise UserError(
                f"{path} is no exported program whose weights can be read without running code: "
                f"{error}. Save its state dict."
            ) from error
    return tensors


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
