"""Writes embeddings to a file: NumPy's format, or Parquet where pyarrow is installed."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classification_client.terminal import UserError, spelt

SUFFIXES = (".npy", ".parquet")

# NumPy's format 1.0: the header and what is before it fill whole multiples of this.
_ALIGNMENT = 64
_MAGIC = b"\x93NUMPY\x01\x00"


def check_writable(path: Path) -> None:
    """Raises `UserError` where a file of this kind cannot be written at all."""
    if path.suffix.lower() == ".parquet":
        _pyarrow(path)
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: its folder is not there.")


def write(path: Path, rows: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Writes pictures' names and embeddings, whole or not at all.

    Args:
        path: ends in .npy or .parquet.
        rows: names, each with as many float32 numbers as the others. In NumPy they are fields
            `picture` and `embedding` of one array, in Parquet columns of these names.

    Raises:
        UserError: it cannot be written, or the embeddings have different lengths.
    """
    if len({len(vector) for _, vector in rows}) > 1:
        raise UserError("The embeddings have different lengths: another model answered meanwhile.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix.lower() == ".parquet":
            _write_parquet(unfinished, rows)
        else:
            _write_npy(unfinished, rows)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write_npy(path: Path, rows: Sequence[tuple[str, Sequence[float]]]) -> None:
    """A structured array, without NumPy (numpy.lib.format has the specification)."""
    # Names of files need not be text in any encoding.
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name, _ in rows]
    longest = max((len(name) for name in names), default=1) or 1
    channels = len(rows[0][1]) if rows else 0
    described = [("picture", f"<U{longest}"), ("embedding", "<f4", (channels,))]
    header = str({"descr": described, "fortran_order": False, "shape": (len(rows),)})
    room = -(len(_MAGIC) + 2 + len(header) + 1) % _ALIGNMENT
    text = (header + " " * room + "\n").encode("ascii")
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<H", len(text)) + text)
        for name, (_, vector) in zip(names, rows, strict=True):
            file.write(name.encode("utf-32-le").ljust(4 * longest, b"\0"))
            file.write(struct.pack(f"<{channels}f", *vector))


def _write_parquet(path: Path, rows: Sequence[tuple[str, Sequence[float]]]) -> None:
    arrow, parquet = _pyarrow(path)
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name, _ in rows]
    vectors = arrow.array([list(vector) for _, vector in rows], arrow.list_(arrow.float32()))
    parquet.write_table(arrow.table({"picture": names, "embedding": vectors}), path)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415  # only where asked for
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"{path.suffix} needs the package pyarrow (pip install "
            f"'classification-client[parquet]'). Without it name a .npy for {spelt('output')}."
        ) from error
    return pa, parquet
