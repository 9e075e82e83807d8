"""Read the state dicts in a file of weights, in all forms that PyTorch's users keep them in.

No code in a file is ever run: pickles are read with `weights_only`, and of a TorchScript or an
exported program only the tensors are read.
"""

import hashlib
import io
import json
import math
import pickle
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

from scripts.build.messages import read_bytes
from scripts.terminal import UserError

StateDict = Mapping[str, Tensor]

# Limits for hostile files; timm's largest models have 3,000 tensors with names of 100 characters.
MAX_TENSORS = 20_000
MAX_NAME_LENGTH = 300
# Levels of nested dictionaries, as in {"models": {"student": {"state_dict": ...}}}.
MAX_DEPTH = 5
# TorchScript's code is the only part of these files that is compressed.
MAX_COMPRESSED_CODE_BYTES = 10_000_000

# An exported program's list of tensors, and their types by the numbers that it uses.
_EXPORTED_INDEX = "data/weights/model_weights_config.json"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.float32, torch.float64)
_EXPORTED_DTYPES = dict(enumerate(_INTEGERS + _FLOATS, 1)) | {12: torch.bool, 13: torch.bfloat16}
_DTYPES = set(_EXPORTED_DTYPES.values())


class _Inert:
    """A placeholder for an object saved with the weights, which is neither made nor called."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _inert_dict(*_: object) -> dict[Any, Any]:
    """Return a placeholder for a defaultdict: torch fills only plain dictionaries."""
    return {}


# Types that training scripts save with the weights. numpy's own `scalar` and `dtype` are not
# called, since a crafted state can make them read memory out of bounds.
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


class _RejectedError(Exception):
    """A file cannot be used; the text is a clause that begins with "it"."""


@dataclass(frozen=True)
class Checkpoint:
    """The state dicts in a file.

    Attributes:
        file: its name, for messages.
        sha256: of its bytes.
        states: every state dict by its keys with dots between, as in "model_ema"; "" for the file
            itself. Optimizers' states are left out. Layers' versions are kept in `_metadata`.
    """

    file: str
    sha256: str
    states: dict[str, "OrderedDict[str, Tensor]"]


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
    content = read_bytes(path, "weights")
    digest = hashlib.sha256(content).hexdigest()
    if expected_sha256 is not None and digest != expected_sha256:
        raise DigestError(
            f"{path} is damaged or not the expected file: its SHA-256 begins with {digest[:8]}, "
            f"not {expected_sha256[:8]}. It was not loaded."
        )
    try:
        states = dict(_states(_load(content, path), len(content)))
    except Exception as error:  # a foreign or hostile file makes the readers raise nearly anything
        raise UserError(
            f"{path} cannot be used as weights: {_reason(error, path)}. Save the state dict of the "
            "model as it was trained: torch.save(model.state_dict(), path)"
        ) from error
    return Checkpoint(path.name, digest, states)


def _reason(error: Exception, path: Path) -> str:
    """Return why a file was rejected, and what to do if it is a pickle of more than weights."""
    if isinstance(error, _RejectedError):
        return str(error)
    # PyTorch's own text is not shown, since it recommends loading the file with its code.
    needed = re.search(r"GLOBAL ([\w.<>]{1,200})", str(error))
    if needed is None or not isinstance(error, pickle.UnpicklingError):
        return f"it is damaged, cut off, or no file of weights ({type(error).__name__})"
    if "is blocked" in str(error):
        return f"it would run {needed[1]} if it were loaded, so do not trust it"
    # The name is quoted in the command only if it has no special characters of a shell.
    file = Path(path.name if re.fullmatch(r"[\w.-]+", path.name) else "x.ckpt")
    return (
        f"it holds more than weights, and loading it needs {needed[1]}. If you have only this "
        'file, and only if you trust it, since this runs code in it: python -c "import torch; '
        f"torch.save(torch.load('{file}', weights_only=False)['state_dict'], "
        f"'{file.stem}-weights.pth')\" with the key of the weights for 'state_dict', or with "
        ".state_dict() instead of ['state_dict'] if it is a whole model"
    )


def _states(loaded: object, size: int) -> Iterator[tuple[str, "OrderedDict[str, Tensor]"]]:
    """Find the state dicts: mappings with a name with a dot, or a matrix, among their tensors.

    Raises:
        _RejectedError: there is none, one is not plain, or they claim more than `size` bytes.
    """
    top = loaded if isinstance(loaded, Mapping) else {}
    todo: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), top)]
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
        count += len(tensors)
        if count > MAX_TENSORS or any(len(key) > MAX_NAME_LENGTH for key in (*keys, *tensors)):
            raise _RejectedError("it has too many tensors, or too long names")
        _check_plain(items)
        _check_size(tensors, size)
        tensors._metadata = {  # type: ignore[attr-defined]
            str(module): {"version": entry["version"]}
            for module, entry in getattr(mapping, "_metadata", {}).items()
            if isinstance(entry.get("version"), int)
        }
        yield ".".join(keys), tensors
    if not count:
        found = ", ".join(str(key) for key in list(top)[:10])[:300]
        but = f", but {found}" if found else ""
        raise _RejectedError(f"it holds no state dict, a mapping of names to tensors{but}")


def _check_plain(items: list[tuple[str, Any]]) -> None:
    """Raise `_RejectedError` for anything with the name of a parameter but a plain tensor."""
    for name, value in items:
        if isinstance(value, Tensor):
            is_own = type(value) in {Tensor, torch.nn.Parameter} and value.is_cpu
            plain = is_own and value.dtype in _DTYPES and value.layout is torch.strided
        else:
            plain = "." not in name or value is None or isinstance(value, Mapping)
        if not plain:
            raise _RejectedError(f"{name} is not a plain tensor, as in quantized or sparse models")


def _check_size(tensors: StateDict, size: int) -> None:
    """Raise `_RejectedError` for tensors larger than the file, which strides of 0 can make."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors.values())}
    if sum(storages.values()) > size or any(
        tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in tensors.values()
    ):
        raise _RejectedError("it claims more weights than it holds")


def _load(content: bytes, path: Path) -> object:
    """Parse a file of any of the forms; raise what its reader raises."""
    file = io.BytesIO(content)
    if path.suffix == ".safetensors":
        return safetensors.torch.load(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            _check_zip(archive, len(content))
            if any(name.endswith("/constants.pkl") for name in names):
                return _from_torchscript(archive)
            for name in names:
                if name.endswith(_EXPORTED_INDEX):
                    return _from_exported_program(archive, name)
    file.seek(0)
    with safe_globals(list(_STAND_INS)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_zip(archive: zipfile.ZipFile, size: int) -> None:
    """Raise `_RejectedError` before anything is decompressed that PyTorch could read otherwise."""
    entries = archive.infolist()
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise _RejectedError("it holds two files of one name")
    if sum(entry.file_size for entry in entries) > 2 * size + MAX_COMPRESSED_CODE_BYTES:
        raise _RejectedError("it expands to far more than its size")


def _from_torchscript(archive: zipfile.ZipFile) -> StateDict:
    """Return the tensors; of TorchScript's code, only `__setstate__` runs on loading."""
    # Repacked, so that PyTorch's own zip parser reads exactly what was checked here.
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.namelist():
            member = archive.read(name)
            if b"__setstate__" in member and not name.endswith(".debug_pkl"):
                raise _RejectedError("it runs code of its own when it is loaded")
            copy.writestr(name, member)
    packed.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        module = torch.jit.load(packed, map_location="cpu")  # type: ignore[no-untyped-call]
    return OrderedDict(module.state_dict())


def _from_exported_program(archive: zipfile.ZipFile, index: str) -> StateDict:
    """Return the tensors; not by `torch.export.load`, which unpickles whatever the file holds."""
    tensors = {}
    for name, entry in json.loads(archive.read(index))["config"].items():
        if entry["use_pickle"]:
            raise _RejectedError("its tensors are pickled, and could run code if they were loaded")
        raw = bytearray(archive.read(f"{index.rpartition('/')[0]}/{entry['path_name']}"))
        meta = entry["tensor_meta"]
        flat = torch.frombuffer(raw, dtype=_EXPORTED_DTYPES[meta["dtype"]])
        # Values of other kinds are symbols, in tensors without a fixed size.
        sizes, steps = ([v["as_int"] for v in meta[key]] for key in ("sizes", "strides"))
        if math.prod(sizes) > flat.numel():
            raise _RejectedError("it is cut off, or claims more weights than it holds")
        # Cloned, since PyTorch checks for negative sizes only then.
        tensors[name] = flat.as_strided(sizes, steps, meta["storage_offset"]["as_int"]).clone()
    return tensors
