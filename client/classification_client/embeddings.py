"""Write embeddings to a .npy file with NumPy or to a .parquet file with pyarrow."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from classification_client.errors import UserError

# Suffix to the package that writes the format; each is an optional dependency.
PACKAGES = {".npy": "numpy", ".parquet": "pyarrow"}


def check_writable(path: Path) -> None:
    """Raise `UserError` if the suffix's package or the file's folder is missing."""
    package = PACKAGES[path.suffix.lower()]
    if find_spec(package) is None:
        raise UserError(f"{path} needs the package {package}: pip install {package}.")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: its folder does not exist.")


def write(path: Path, names: Sequence[str], vectors: Sequence[Sequence[float]]) -> None:
    """Write images' names and embeddings, float32 (channels,) each, atomically.

    The columns (.parquet) or the fields of a structured array (.npy) are `picture` and `embedding`.

    Raises:
        UserError: the file cannot be written, or the embeddings have different lengths.
    """
    if len({*map(len, vectors)}) > 1:
        raise UserError("The embeddings have different lengths: another model answered meanwhile.")
    # File names may contain bytes that are not valid UTF-8.
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save = _save_npy if path.suffix.lower() == ".npy" else _save_parquet
    try:
        with unfinished.open("wb") as file:
            save(file, names, vectors)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _save_npy(file: Any, names: Sequence[str], vectors: Sequence[Sequence[float]]) -> None:
    import numpy as np

    name = f"U{max(map(len, names), default=1)}"
    fields = [("picture", name), ("embedding", "<f4", (len(vectors[0]) if vectors else 0,))]
    np.save(file, np.array([*zip(names, vectors, strict=True)], np.dtype(fields)))


def _save_parquet(file: Any, names: Sequence[str], vectors: Sequence[Sequence[float]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    embeddings = pa.array([[*vector] for vector in vectors], pa.list_(pa.float32()))
    parquet.write_table(pa.table({"picture": names, "embedding": embeddings}), file)
