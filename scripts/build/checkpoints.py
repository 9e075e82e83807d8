"""Read the state dicts in a file of weights, in all forms that PyTorch's users keep them in.

Neither PyTorch nor `pickle` is used, so no code in a file can run: of pickles, TorchScript and
exported programs only the tensors are read, as NumPy arrays.
"""

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from numpy.typing import NDArray

from scripts.build import pickles
from scripts.build.messages import read_bytes
from scripts.build.pickles import DTYPES, Name, RejectedError, Storage, Tensor, state_of
from scripts.terminal import UserError

# Limits for hostile files; timm's largest models have 3,000 tensors with names of 100 characters.
MAX_TENSORS = 20_000
MAX_NAME_LENGTH = 300
# Levels of nested dictionaries, as in {"models": {"student": {"state_dict": ...}}}.
MAX_DEPTH = 5

# What PyTorch's files before version 1.6 begin with.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# An exported program's list of tensors, and their types by the numbers that it uses.
_EXPORTED_INDEX = "data/weights/model_weights_config.json"
_EXPORTED_DTYPES = dict(enumerate(["u1", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"], 1))
_EXPORTED_DTYPES |= {12: "?", 13: "bfloat16"}
_SAFETENSORS_DTYPES = {
    **{f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "ui" for size in (1, 2, 4, 8)},
    **{"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "BF16": "bfloat16"},
}
_OPTIMIZER = re.compile("optimi[sz]er|optim(?![a-z])", re.IGNORECASE)


class StateDict(dict[str, NDArray[Any]]):
    """Tensors by their names, with the versions of layers by which PyTorch converts old ones."""

    versions: dict[str, int]

    def __init__(self, *tensors: Any) -> None:
        super().__init__(*tensors)
        self.versions = {}


class DigestError(UserError):
    """A file of weights does not have the expected SHA-256."""


@dataclass(frozen=True)
class Checkpoint:
    """The name of a file, its SHA-256, and its state dicts without those of optimizers.

    A state dict's key is its path, as in "run.model_ema"; "" if it is the file itself.
    """

    file: str
    sha256: str
    states: dict[str, StateDict]


def read_checkpoint(path: Path, expected_sha256: str | None = None) -> Checkpoint:
    """Read what `torch.save` writes, safetensors, TorchScript or an exported program (.pt2).

    Raises:
        DigestError: the SHA-256 is not the expected one; nothing was parsed.
        UserError: the file is missing, cut off, or holds no weights.
    """
    content = read_bytes(path, "weights")
    digest = hashlib.sha256(content).hexdigest()
    if expected_sha256 is not None and digest != expected_sha256:
        raise DigestError(
            f"{path} is damaged or not the expected file: its SHA-256 begins with {digest[:8]}, "
            f"not {expected_sha256[:8]}. It was not loaded."
        )
    try:
        states = dict(_states(_load(content, path)))
    except Exception as error:  # a foreign or hostile file makes the readers raise nearly anything
        rejected = isinstance(error, RejectedError)
        kind = f"it is damaged, cut off, or no file of weights ({type(error).__name__})"
        raise UserError(
            f"{path} cannot be used as weights: {error if rejected else kind}. Save the state dict "
            "of the model as it was trained: torch.save(model.state_dict(), path)"
        ) from error
    return Checkpoint(path.name, digest, states)


def _states(loaded: object) -> Iterator[tuple[str, StateDict]]:
    """Find the state dicts: mappings with a name with a dot, or a matrix, among their tensors."""
    top = state_of(loaded) or {}
    todo: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), top)]
    seen: set[int] = set()
    count = 0
    for keys, mapping in todo:
        if id(mapping) in seen or "param_groups" in mapping or len(keys) > MAX_DEPTH:
            continue
        seen.add(id(mapping))
        items = [(key, value) for key, value in mapping.items() if isinstance(key, str)]
        tensors = {key: value for key, value in items if isinstance(value, Tensor)}
        for key, value in items:
            nested = None if _OPTIMIZER.search(key) else state_of(value)
            if nested is not None:
                todo.append(((*keys, key), nested))
        if not any("." in name or len(tensor.sizes) > 1 for name, tensor in tensors.items()):
            continue
        count += len(tensors)
        if count > MAX_TENSORS or any(len(key) > MAX_NAME_LENGTH for key in (*keys, *tensors)):
            raise RejectedError("it has too many tensors, or too long names")
        _check_plain(items)
        found = StateDict((name, tensor.array()) for name, tensor in tensors.items())
        found.versions = {
            str(module): entry["version"]
            for module, entry in (getattr(mapping, "metadata", None) or {}).items()
            if isinstance(entry.get("version"), int)
        }
        yield ".".join(keys), found
    if not count:
        names = ", ".join(str(key) for key in list(top)[:10] if isinstance(key, (str, int)))[:300]
        but = f", but {names}" if names else ""
        raise RejectedError(f"it holds no state dict, a mapping of names to tensors{but}")


def _check_plain(items: list[tuple[str, Any]]) -> None:
    """Raise `RejectedError` for anything with the name of a parameter but a plain tensor."""
    for name, value in items:
        if isinstance(value, Tensor):
            plain = value.storage.dtype is not None
        else:
            plain = "." not in name or value is None or state_of(value) is not None
        if not plain:
            raise RejectedError(f"{name} is not a plain tensor, as in quantized or sparse models")


def _load(content: bytes, path: Path) -> object:
    file = io.BytesIO(content)
    if path.suffix == ".safetensors":
        return _from_safetensors(content)
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return _from_legacy(file)
    with zipfile.ZipFile(file) as archive:
        _check_zip(archive, len(content))
        for name in archive.namelist():
            if name.endswith(_EXPORTED_INDEX):
                return _from_exported_program(archive, name)
        return _from_zip(archive)


def _from_safetensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors; the library checks sizes and offsets."""
    tensors = {}
    for name, entry in safetensors.deserialize(content):  # type: ignore[no-untyped-call]
        shape = tuple(entry["shape"])
        storage = Storage(_SAFETENSORS_DTYPES.get(str(entry["dtype"])), math.prod(shape))
        storage.fill(entry["data"])
        steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors[name] = Tensor(storage, 0, shape, steps)
    return tensors


class _Storages(dict[str, Storage]):
    """The storages that a pickle refers to, by their keys."""

    def __call__(self, identity: tuple[Any, ...]) -> Storage:
        """Return the storage of a persistent id: "storage", type, key, device, size."""
        kind, name, key, _, count = identity[:5]
        if kind != "storage" or not isinstance(name, Name) or not isinstance(key, str):
            raise ValueError("a persistent id of another kind")
        if any(view is not None for view in identity[5:]):
            raise RejectedError("it holds views of storages, as only the first PyTorch saved them")
        dtype = DTYPES.get(name.removeprefix("torch.").removesuffix("Storage"))
        return self.setdefault(key, Storage(dtype, count))


def _from_legacy(file: io.BytesIO) -> object:
    """Return the object in a file of PyTorch before 1.6: five pickles, then the storages."""
    storages = _Storages()
    magic, protocol, system = (pickles.read(file) for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not system["little_endian"]:
        raise ValueError("not a file of PyTorch")
    loaded, keys = pickles.read(file, storages), pickles.read(file)
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        storage = storages.pop(key)
        if storage.dtype is None or count != storage.count:
            raise RejectedError("it holds tensors of a type that is not read, or is damaged")
        storage.fill(file.read(storage.count * storage.width))
    if storages:
        raise ValueError("a storage is missing")
    return loaded


def _from_zip(archive: zipfile.ZipFile) -> object:
    """Return the object in a file of PyTorch since 1.6, or the module of TorchScript."""
    storages = _Storages()
    (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    loaded = pickles.read(io.BytesIO(_member(archive, main)), storages)
    folder = main.removesuffix(".pkl")
    order = f"{folder.removesuffix('data')}byteorder"
    if order in archive.namelist() and _member(archive, order) != b"little":
        raise RejectedError("it was written on a big-endian machine")
    for key, storage in storages.items():
        storage.fill(_member(archive, f"{folder}/{key}"))
    return loaded


def _check_zip(archive: zipfile.ZipFile, size: int) -> None:
    """Raise `RejectedError` for two files of one name, and for files that share their bytes."""
    entries = archive.infolist()
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise RejectedError("it holds two files of one name")
    stored = (e.file_size for e in entries if e.compress_type == zipfile.ZIP_STORED)
    if sum(stored) > size:
        raise RejectedError("it claims more weights than it holds")


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a file in a zip file; of those that are read, PyTorch compresses none."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise RejectedError("it is compressed, and may expand to far more than its size")
    return archive.read(name)


def _from_exported_program(archive: zipfile.ZipFile, index: str) -> dict[str, Tensor]:
    """Return the tensors; those of a pickle are not read."""
    tensors = {}
    storages: dict[tuple[str, int], Storage] = {}
    for name, entry in json.loads(_member(archive, index))["config"].items():
        if entry["use_pickle"]:
            raise RejectedError("its tensors are pickled")
        meta = entry["tensor_meta"]
        key = entry["path_name"], meta["dtype"]
        if key not in storages:
            raw = _member(archive, f"{index.rpartition('/')[0]}/{key[0]}")
            storages[key] = Storage(_EXPORTED_DTYPES.get(key[1]), 0)
            storages[key].count = len(raw) // storages[key].width
            storages[key].fill(raw)
        # Values of other kinds are symbols, in tensors without a fixed size.
        sizes, steps = (tuple(v["as_int"] for v in meta[key]) for key in ("sizes", "strides"))
        tensors[name] = Tensor(storages[key], meta["storage_offset"]["as_int"], sizes, steps)
    return tensors
