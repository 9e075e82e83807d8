"""List the images of a job once, so that a resumed job classifies the same images."""

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import fs, parquet

from batch import storage
from batch.parts import MAX_FILE_BYTES, Entry
from batch.storage import Place
from classification_client.images import SUFFIXES

_PARQUET = ".parquet"


class PlanError(Exception):
    """An address contains no images, or its column or text cannot be read."""


def entries(images: str, column: str | None, left_out: Counter[str]) -> Iterator[Entry]:
    """Yield all images of an address.

    Args:
        images: the address of a folder of images or Parquet files, a text file with one address per
            line, a Parquet file, or a single image.
        column: the column of the Parquet files, with addresses or with the images' bytes.
        left_out: counts the files in folders that are not images, by reason.

    Raises:
        PlanError: there are no images, or the column has neither addresses nor images.
        AddressError: see `storage.place`.
        OSError: the address cannot be read.
    """
    source = storage.place(images)
    address = images if source.is_local else images.partition("?")[0]
    (info,) = source.system.get_file_info([source.path])
    if info.type == fs.FileType.NotFound:
        raise PlanError(f"{images}: there is no such file or folder.")
    if info.type == fs.FileType.Directory:
        found = _in_folder(source, address, column, left_out)
    elif source.name.lower().endswith(_PARQUET):
        found = _in_parquet(source, address, _required(column, source))
    elif source.name.lower().endswith(tuple(SUFFIXES)):
        found = iter([Entry(address)])
    else:
        found = _in_list(source)
    first = next(found, None)
    if first is None:
        counts = ", ".join(f"{count} {what}" for what, count in left_out.most_common(5))
        raise PlanError(f"{images}: there is no image here{f' ({counts})' if counts else ''}.")
    yield first
    yield from found


def _in_folder(
    folder: Place, address: str, column: str | None, left_out: Counter[str]
) -> Iterator[Entry]:
    for file, reason in storage.files(folder):
        name = address.rstrip("/") + file.path.removeprefix(folder.path.rstrip("/"))
        suffix = "." + file.name.rpartition(".")[2].lower()
        if reason is not None:
            left_out[reason] += 1
        elif column is not None and suffix == _PARQUET:
            yield from _in_parquet(file, name, column)
        elif column is None and suffix in SUFFIXES:
            yield Entry(name)
        else:
            left_out[f"{suffix} file(s)"] += 1


def _in_list(file: Place) -> Iterator[Entry]:
    try:
        text = storage.read(file, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{file.path} is no image, no Parquet file (.parquet) and no text in UTF-8."
        ) from error
    for line in io.StringIO(text):
        if line.strip():
            yield Entry(line.rstrip("\r\n"))


def _required(column: str | None, file: Place) -> str:
    if column is not None:
        return column
    with _opened(file) as opened:
        has = ", ".join(opened.schema_arrow.names)
    raise PlanError(f"Which column of {file.name} has the images? It has {has}.")


def _in_parquet(file: Place, address: str, column: str) -> Iterator[Entry]:
    with _opened(file) as opened:
        schema = opened.schema_arrow
        if column not in schema.names:
            has = ", ".join(schema.names)
            raise PlanError(f"{address} has no column {column!r}; it has {has}.")
        kind = schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            for value in _values(opened, column):
                yield Entry(value or "")
            return
        if not _has_bytes(kind):
            raise PlanError(
                f"The column {column!r} of {address} holds {kind}, neither addresses (string) nor "
                "images' bytes (binary, or a struct of bytes and path)."
            )
        names = _names(opened, column, kind)
        for row in range(opened.metadata.num_rows):
            name = next(names, None)
            yield Entry(f"{address}#{row}" if name is None else name, address, row)


def _has_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _names(opened: Any, column: str, kind: Any) -> Iterator[str | None]:
    """Yield the images' names from the struct's field `path` or the column `path`, if any."""
    if pa.types.is_struct(kind):
        if kind.get_field_index("path") >= 0:
            yield from _values(opened, f"{column}.path")
    elif "path" in opened.schema_arrow.names:
        yield from _values(opened, "path")


def _values(opened: Any, column: str) -> Iterator[Any]:
    for batch in opened.iter_batches(columns=[column]):
        (values,) = batch.columns
        if pa.types.is_struct(values.type):
            (values,) = values.flatten()
        for value in values:
            yield value.as_py()


def _opened(file: Place) -> Any:
    try:
        return parquet.ParquetFile(storage.opened(file))
    except pa.ArrowInvalid as error:
        raise PlanError(f"{file.path} is no Parquet file: {error}") from error
