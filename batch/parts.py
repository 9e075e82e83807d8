"""Write the plan of a job; read a part of it and the bytes of its images.

The plan is a folder of Parquet files, the shards; each row group is a part.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from batch import storage
from batch.storage import Place
from classification_client.errors import TransientError

# Images per part. A task decodes one part; if its node fails, the part is repeated.
MAX_PART_SIZE = 256
_MIN_PART_SIZE = 8
# A small job is split into about this many parts, if it has enough images, so that all cores are
# busy until the end.
_MIN_PARTS = 128
# Images per shard. Each task reads a whole shard, about 1 MB, for its part.
_SHARD = 256 * MAX_PART_SIZE

# Maximum size of files that are read whole: shards, lists of addresses, `_job.json`.
MAX_FILE_BYTES = 1 << 30

# Number of files to read ahead while one is decoded.
_READ_AHEAD = 8


class Entry(NamedTuple):
    """An image of the plan.

    Attributes:
        path: its name in the results.
        file: for an image stored in a Parquet file, that file.
        row: its row in that file.
    """

    path: str
    file: str | None = None
    row: int | None = None


_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
    ]
)


def write(images: Iterable[Entry], folder: str) -> tuple[int, int]:
    """Write the plan to the address `folder`; return the counts of all images and per part."""
    remaining = iter(images)
    count = shard = size = 0
    while chunk := list(islice(remaining, _SHARD)):
        # A job of more than one shard has parts of the maximum size.
        size = size or max(_MIN_PART_SIZE, min(MAX_PART_SIZE, -(-len(chunk) // _MIN_PARTS)))
        table = pa.Table.from_pylist([entry._asdict() for entry in chunk], _SCHEMA)
        storage.write_table(_shard_file(folder, shard), table, row_group_size=size)
        count += len(chunk)
        shard += 1
    return count, size


def part(folder: str, number: int, size: int) -> list[Entry]:
    """Read one part of the plan at the address `folder`; `size` is the number of its images."""
    shard, group = divmod(number, _SHARD // size)
    return [Entry(**row) for row in _shard(folder, shard).read_row_group(group).to_pylist()]


@lru_cache(maxsize=2)
def _shard(folder: str, shard: int) -> Any:
    content = storage.read(_shard_file(folder, shard), MAX_FILE_BYTES)
    return parquet.ParquetFile(pa.BufferReader(content))


def _shard_file(folder: str, shard: int) -> Place:
    return storage.place(folder) / f"plan-{shard:05}.parquet"


def contents(
    images: Iterable[Entry], column: str | None, base: str, query: str, max_bytes: int
) -> Iterator[bytes | OSError]:
    """Yield each image's encoded bytes, or the error if they cannot be read.

    Args:
        images: the images of a part.
        column: the column of Parquet files; None if each image is a file.
        base: see `storage.within`.
        query: see `storage.within`.
        max_bytes: limit per file; one byte more than the limit is read of a longer file.
    """
    # A folder may mix Parquet files of addresses with Parquet files of bytes.
    for file, some in groupby(images, attrgetter("file")):
        if file is None:
            yield from _from_files([image.path for image in some], base, query, max_bytes)
        else:
            assert column is not None
            rows = [image.row or 0 for image in some]
            yield from _from_parquet(file, rows[0], rows[-1] + 1, column, base, query)


def _from_files(
    paths: list[str], base: str, query: str, max_bytes: int
) -> Iterator[bytes | OSError]:
    def read(path: str) -> bytes | OSError:
        try:
            return storage.read(storage.within(path, base, query), max_bytes)
        except OSError as error:
            return error
        except storage.AddressError as error:
            return OSError(str(error))

    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        # A generator, so that a read is submitted only when an item is taken.
        submitted = (pool.submit(read, path) for path in paths)
        waiting = deque(islice(submitted, _READ_AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(submitted, 1))


def _from_parquet(
    file: str, first: int, end: int, column: str, base: str, query: str
) -> Iterator[bytes | OSError]:
    """Yield the images of the rows `first` to `end`, exclusive; an error for each damaged one."""
    try:
        opened = parquet.ParquetFile(storage.opened(storage.within(file, base, query)))
    except (OSError, pa.ArrowException) as error:
        yield from [_read_error(error, "its Parquet file")] * (end - first)
        return
    start = 0
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        rows = range(max(first - start, 0), min(end - start, count))
        if rows:
            yield from _from_row_group(opened, group, rows, column)
        start += count


def _from_row_group(opened: Any, group: int, rows: range, column: str) -> Iterator[bytes | OSError]:
    is_struct = pa.types.is_struct(opened.schema_arrow.field(column).type)
    source = f"{column}.bytes" if is_struct else column
    position, left = 0, len(rows)
    try:
        # In batches: a row group may be larger than the memory.
        for batch in opened.iter_batches(MAX_PART_SIZE, [group], [source]):
            (values,) = batch.columns
            if is_struct:
                (values,) = values.flatten()
            for value in values[max(rows.start - position, 0) : max(rows.stop - position, 0)]:
                yield value.as_py() or b""
                left -= 1
            position += len(values)
            if not left:
                return
    except (OSError, pa.ArrowException) as error:
        yield from [_read_error(error, f"row group {group} of its Parquet file")] * left


def _read_error(error: Exception, what: str) -> OSError:
    """Return the rows' error: one of the storage unchanged, else one that reports damage."""
    if isinstance(error, (TransientError, FileNotFoundError, PermissionError)):
        return error
    return OSError(f"{what} is damaged: {' '.join(str(error).split())}")
