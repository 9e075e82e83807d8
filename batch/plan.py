"""Which pictures there are, written down once, so that a job that goes on has the same ones."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import fs, parquet

from batch import storage
from batch.parts import MOST_BYTES, SCHEMA, SHARD, shard_name, size_for
from batch.storage import Place
from classification_client.images import SUFFIXES

_PARQUET = ".parquet"


class PlanError(Exception):
    """There is nothing to classify under an address, or it cannot be told what."""


@dataclass(frozen=True)
class Entry:
    """A picture; see the columns of the plan."""

    path: str
    file: str | None = None
    row: int | None = None


def entries(images: str, column: str | None, left_out: Counter[str]) -> Iterator[Entry]:
    """All pictures that an address means.

    Args:
        images: a folder, a text file with an address a line, a Parquet file or a folder of such, or
            a single picture.
        column: of the Parquet files, with addresses or with pictures' bytes.
        left_out: counts what is in a folder and no picture, by what it is.

    Raises:
        PlanError: nothing is there, or the column is none of pictures.
        AddressError: see `storage.place`.
        OSError: it cannot be read.
    """
    where = storage.place(images)
    named = images.partition("?")[0] if not where.is_local else images
    (info,) = where.system.get_file_info([where.path])
    if info.type == fs.FileType.NotFound:
        raise PlanError(f"{images}: there is no such file or folder.")
    if info.type == fs.FileType.Directory:
        found = _in_folder(where, named, column, left_out)
    elif where.name.lower().endswith(_PARQUET):
        found = _in_parquet(where, named, _required(column, where))
    elif where.name.lower().endswith(tuple(SUFFIXES)):
        found = iter([Entry(named)])
    else:
        found = _in_list(where)
    first = next(found, None)
    if first is None:
        told = ", ".join(f"{count} {what}" for what, count in left_out.most_common(5))
        raise PlanError(f"{images}: there is no picture here{f' ({told})' if told else ''}.")
    yield first
    yield from found


def _in_folder(
    folder: Place, named: str, column: str | None, left_out: Counter[str]
) -> Iterator[Entry]:
    for at, what in storage.files(folder):
        name = named.rstrip("/") + at.path.removeprefix(folder.path.rstrip("/"))
        suffix = "." + at.name.rpartition(".")[2].lower()
        if what is not None:
            left_out[what] += 1
        elif column is not None and suffix == _PARQUET:
            yield from _in_parquet(at, name, column)
        elif column is None and suffix in SUFFIXES:
            yield Entry(name)
        else:
            left_out[f"{suffix} file(s)"] += 1


def _in_list(file: Place) -> Iterator[Entry]:
    try:
        text = storage.read(file, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{file.path} is no picture, no Parquet file (.parquet) and no text in UTF-8."
        ) from error
    for line in io.StringIO(text):
        if line.strip():
            yield Entry(line.rstrip("\r\n"))


def _required(column: str | None, file: Place) -> str:
    if column is not None:
        return column
    with _opened(file) as opened:
        has = ", ".join(opened.schema_arrow.names)
    raise PlanError(f"Which column of {file.name} has the pictures? It has {has}.")


def _in_parquet(file: Place, named: str, column: str) -> Iterator[Entry]:
    with _opened(file) as opened:
        schema = opened.schema_arrow
        if column not in schema.names:
            raise PlanError(f"{named} has no column {column!r}; it has {', '.join(schema.names)}.")
        kind = schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            for value in _values(opened, column):
                yield Entry(value or "")
            return
        if not _has_bytes(kind):
            raise PlanError(
                f"The column {column!r} of {named} holds {kind}, neither addresses (string) nor "
                "pictures' bytes (binary, or a struct of bytes and path)."
            )
        names = _names(opened, column, kind)
        for row in range(opened.metadata.num_rows):
            name = next(names, None)
            yield Entry(f"{named}#{row}" if name is None else name, named, row)


def _has_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _names(opened: Any, column: str, kind: Any) -> Iterator[str | None]:
    """The pictures' own names, where the file has such: beside their bytes, or as `path`."""
    if pa.types.is_struct(kind):
        if kind.get_field_index("path") >= 0:
            yield from _values(opened, f"{column}.path", nested=True)
    elif "path" in opened.schema_arrow.names:
        yield from _values(opened, "path")


def _values(opened: Any, column: str, *, nested: bool = False) -> Iterator[Any]:
    for batch in opened.iter_batches(columns=[column]):
        (values,) = batch.columns
        if nested:
            (values,) = values.flatten()
        for value in values:
            yield value.as_py()


def _opened(file: Place) -> Any:
    try:
        return parquet.ParquetFile(storage.opened(file))
    except pa.ArrowInvalid as error:
        raise PlanError(f"{file.path} is no Parquet file: {error}") from error


def write(pictures: Iterable[Entry], folder: Place) -> tuple[int, int]:
    """Writes the plan's files.

    Returns:
        how many pictures there are, and how many a part has.
    """
    rest, count, shard = iter(pictures), 0, 0
    size = 0
    while some := list(islice(rest, SHARD)):
        size = size or size_for(len(some))
        columns = {name: [getattr(entry, name) for entry in some] for name in SCHEMA.names}
        buffer = pa.BufferOutputStream()
        parquet.write_table(pa.table(columns, schema=SCHEMA), buffer, row_group_size=size)
        storage.write(folder / shard_name(shard), buffer.getvalue())
        count += len(some)
        shard += 1
    return count, size
