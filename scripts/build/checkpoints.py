"""Reads every state dict in a file of weights, in the forms in which PyTorch's users keep them.

No code in a file is ever run: pickles are read with `weights_only`, and of a TorchScript or an
exported program only the tensors are read.
"""

import hashlib
import io
import json
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import safe_globals

from scripts.terminal import UserError

StateDict = Mapping[str, Tensor]

# Limits for hostile files; timm's largest models have 3,000 tensors with names of 100 characters.
MAX_TENSORS = 20_000
MAX_NAME_LENGTH = 300
# Dictionaries in dictionaries, as in {"models": {"student": {"state_dict": ...}}}.
MAX_DEPTH = 5
# TorchScript's code is the only part of these files that is compressed.
MAX_COMPRESSED_CODE_BYTES = 10_000_000

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
_DTYPES = set(_EXPORTED_DTYPES.values())


class _Inert:
    """Stands in for an object beside the weights: nothing of the real one is made or called."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _inert_dict(*_: object) -> dict[Any, Any]:
    """Stand in for a defaultdict: torch fills only plain dictionaries."""
    return {}


# What training scripts save beside the weights. numpy's own `scalar` and `dtype` are not called,
# since a crafted state can make them read memory out of bounds.
_PATHS = ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_HARMLESS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "builtins": ("dict", "float", "int", "list"),
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
_STAND_INS = [
    (_inert_dict, "collections.defaultdict"),
    *((_Inert, f"{module}.{name}") for module, names in _HARMLESS.items() for name in names),
]
_OPTIMIZER = re.compile("optimi[sz]er|optim(?![a-z])", re.IGNORECASE)


class DigestError(UserError):
    """A file of weights does not have the expected SHA-256."""


@dataclass(frozen=True)
class Checkpoint:
    """The state dicts in a file.

    Attributes:
        file: its name, for messages.
        sha256: of its bytes.
        states: every state dict by its keys with dots between, as in "model_ema"; "" for the file
            itself. Optimizers' states are left out. Layers' versions are kept in `_metadata`.
        keys: at the top of the file, for messages.
    """

    file: str
    sha256: str
    states: dict[str, "OrderedDict[str, Tensor]"]
    keys: tuple[str, ...]


def read_checkpoint(path: Path, expected_sha256: str | None = None) -> Checkpoint:
    """Return the state dicts in a file.

    Args:
        path: a pickle, as `torch.save` writes it; safetensors; TorchScript; or an exported program
            (.pt2).
        expected_sha256: of the file, if known; checked before anything in it is parsed.

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
        loaded = _load(content, path)
        keys = tuple(str(key)[:MAX_NAME_LENGTH] for key in loaded)
        states = dict(_states(loaded, path))
    except UserError:
        raise
    except Exception as error:  # a foreign or hostile file makes the readers raise nearly anything
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, cut off, or something else "
            f"({type(error).__name__}: {str(error)[:200]})."
        ) from error
    if not states:
        found = f"It holds {', '.join(keys[:10])[:300]}. " if keys else ""
        raise UserError(
            f"{path} does not hold a state dict, a mapping of names to tensors. {found}"
            "Save the weights with torch.save(model.state_dict(), path)."
        )
    for state in states.values():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state.values()}
        # A few bytes can stand for a tensor of any size.
        if sum(storage.nbytes() for storage in storages.values()) > len(content) or any(
            tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in state.values()
        ):
            raise UserError(f"{path} claims more weights than it holds. Save its state dict.")
    return Checkpoint(path.name, digest, states, keys)


def _states(
    loaded: Mapping[Any, Any], path: Path
) -> Iterator[tuple[str, "OrderedDict[str, Tensor]"]]:
    """Find the state dicts: mappings with a name with a dot, or a matrix, among their tensors."""
    todo: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), loaded)]
    seen: set[int] = set()
    count = 0
    for keys, mapping in todo:
        if id(mapping) in seen or "param_groups" in mapping or len(keys) > MAX_DEPTH:
            continue
        seen.add(id(mapping))
        items = [(key, value) for key, value in mapping.items() if isinstance(key, str)]
        tensors = OrderedDict((k, v.detach()) for k, v in items if isinstance(v, Tensor))
        todo += [
            ((*keys, key), value)
            for key, value in items
            if isinstance(value, Mapping) and not _OPTIMIZER.search(key)
        ]
        if not any("." in name or tensor.dim() > 1 for name, tensor in tensors.items()):
            continue
        _check_plain(items, path)
        count += len(tensors)
        if count > MAX_TENSORS or any(len(key) > MAX_NAME_LENGTH for key in (*keys, *tensors)):
            raise UserError(f"{path} has too many tensors, or too long names. Save its state dict.")
        versions = {
            str(module): {"version": entry["version"]}
            for module, entry in getattr(mapping, "_metadata", {}).items()
            if isinstance(entry.get("version"), int)
        }
        tensors._metadata = versions  # type: ignore[attr-defined]  # noqa: SLF001
        yield ".".join(keys), tensors


def _check_plain(items: list[tuple[str, Any]], path: Path) -> None:
    """Raise `UserError` for anything with the name of a parameter but a plain tensor."""
    for name, value in items:
        if isinstance(value, Tensor):
            is_own = type(value) in {Tensor, torch.nn.Parameter} and value.is_cpu
            plain = is_own and value.dtype in _DTYPES and value.layout is torch.strided
        else:
            plain = "." not in name or value is None or isinstance(value, Mapping)
        if not plain:
            raise UserError(
                f"{path}: {name} is not a plain tensor, as in quantized or sparse models. Save the "
                "state dict of the model as it was trained."
            )


def _load(content: bytes, path: Path) -> Mapping[Any, Any]:
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
    """Return the entries of a zip file, before any of them is decompressed.

    Raises:
        UserError: two of them have the same name but for case, or they are far larger than they
            look.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise UserError(f"{path} holds two files of one name. Save its state dict.")
    if sum(entry.file_size for entry in entries) > 2 * len(content) + MAX_COMPRESSED_CODE_BYTES:
        raise UserError(f"{path} is far larger than it looks. Save its state dict.")
    return entries


def _zip_members(content: bytes, path: Path) -> dict[str, bytes]:
    """Return the contents of a zip file by name; raise as `_zip_entries` does."""
    entries = _zip_entries(content, path)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in entries}


def _from_safetensors(content: bytes, path: Path) -> StateDict:
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # its own errors, and torch's for types it does not know
        raise UserError(f"{path} is no safetensors file, or is cut off: {error}.") from error


def _from_pickle(content: bytes, path: Path) -> Mapping[Any, Any]:
    try:
        with safe_globals(list(_STAND_INS)):
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds for a foreign file
        raise UserError(_pickle_problem(str(error), path)) from error
    return loaded if isinstance(loaded, Mapping) else {}


def _pickle_problem(message: str, path: Path) -> str:
    needed = re.search(r"GLOBAL ([\w.<>]{1,200})", message)
    if needed is None:
        return (
            f"{path} is not a file of PyTorch weights, is cut off, or holds more than weights. "
            "Save its state dict: torch.save(model.state_dict(), path)"
        )
    if "is blocked" in message:
        return f"{path} would run {needed[1]} if it were loaded. It was rejected: do not trust it."
    # A name is quoted in a command only if a shell changes nothing in it.
    file = Path(path.name if re.fullmatch(r"[\w.-]+", path.name) else "x.ckpt")
    return (
        f"{path} holds more than weights: loading it needs {needed[1]}. Save the state dict: "
        "torch.save(model.state_dict(), path). If you have only this file, and only where you "
        'trust it, since this runs code in it: python -c "import torch; '
        f"torch.save(torch.load('{file}', weights_only=False)['state_dict'], "
        f"'{file.stem}-weights.pth')\" with the key of the weights for 'state_dict', or with "
        ".state_dict() instead of ['state_dict'] if it is a whole model."
    )


def _from_torchscript(members: Mapping[str, bytes], path: Path) -> StateDict:
    """Return the tensors; of TorchScript's code, only `__setstate__` runs on loading."""
    if any(
        b"__setstate__" in content
        for name, content in members.items()
        if not name.endswith(".debug_pkl")
    ):
        raise UserError(f"{path} runs code of its own when it is loaded. Save its state dict.")
    # Packed again: PyTorch parses zip files in its own way, and must see what was checked here.
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    packed.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; its files are not gone
            module = torch.jit.load(packed, map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript that can be loaded, or is cut off.") from error
    return OrderedDict(module.state_dict())


def _from_exported_program(members: Mapping[str, bytes], path: Path) -> StateDict:
    """Return the tensors; not by `torch.export.load`, which unpickles whatever the file holds."""
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
