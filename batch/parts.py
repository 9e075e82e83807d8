"""Read a part of the job: its rows of the plan and the bytes of its images.

The plan is a folder of Parquet files, the shards; each row group is a part.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from batch import storage

# Images per part. A task decodes one part; if its node fails, the part is repeated.
MAX_PART_SIZE = 256
_MIN_PART_SIZE = 8
# A small job is split into about this many parts, if it has enough images, so that all cores are
# busy until the end.
_MIN_PARTS = 128
# Images per shard. Each task reads a whole shard, about 1 MB, for its part.
SHARD = 256 * MAX_PART_SIZE

# Maximum size of files that are read whole: shards, lists of addresses, `_job.json`.
MAX_FILE_BYTES = 1 << 30

SCHEMA = pa.schema(
    [
        # The image's name in the results.
        pa.field("path", pa.string(), nullable=False),
        # For an image stored in a Parquet file: that file, and the row.
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
    ]
)

# Number of files to read ahead while one is decoded.
_READ_AHEAD = 8


def size_for(images: int) -> int:
    """Return the number of images per part for a job of `images` images.

    A job of more than one shard gets `MAX_PART_SIZE`.
    """
    return max(_MIN_PART_SIZE, min(MAX_PART_SIZE, -(-images // _MIN_PARTS)))


def part(folder: str, number: int, size: int) -> Any:
    """Read the rows of one part.

    Args:
        folder: the address of the folder of the plan.
        number: the part's number, from 0.
        size: images per part.

    Returns:
        a table with the columns of `SCHEMA`.
    """
    shard, group = divmod(number, SHARD // size)
    return _shard(folder, shard).read_row_group(group)


@lru_cache(maxsize=2)
def _shard(folder: str, shard: int) -> Any:
    content = storage.read(storage.place(folder) / shard_name(shard), MAX_FILE_BYTES)
    return parquet.ParquetFile(pa.BufferReader(content))


def shard_name(shard: int) -> str:
    """Return the file name of a shard of the plan."""
    return f"plan-{shard:05}.parquet"


def contents(
    rows: Any, column: str | None, base: str, query: str, max_bytes: int
) -> Iterator[bytes | OSError]:
    """Yield each image's encoded bytes, or the error if they cannot be read.

    Args:
        rows: the table that `part` returns.
        column: the column of Parquet files; None if each image is a file.
        base: see `storage.within`.
        query: see `storage.within`.
        max_bytes: limit per file; one byte more than the limit is read of a longer file.
    """
    # A folder may mix Parquet files of addresses with Parquet files of bytes.
    for file, some in groupby(rows.to_pylist(), itemgetter("file")):
        if file is None:
            yield from _from_files([row["path"] for row in some], base, query, max_bytes)
        else:
            assert column is not None
            wanted = [row["row"] for row in some]
            yield from _from_parquet(file, wanted, column, base, query)


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
    file: str, wanted: list[int], column: str, base: str, query: str
) -> Iterator[bytes | OSError]:
    """Yield the images of consecutive rows; an error for each row of a damaged row group."""
    try:
        content = storage.opened(storage.within(file, base, query))
    except OSError as error:
        yield from [error] * len(wanted)
        return
    try:
        opened = parquet.ParquetFile(content)
    except (OSError, pa.ArrowException) as error:
        yield from [_read_error(error, "its Parquet file")] * len(wanted)
        return
    start = 0
    for group in range(opened.num_row_groups):
        end = start + opened.metadata.row_group(group).num_rows
        first, last = max(start, wanted[0]), min(end, wanted[-1] + 1)
        if first < last:
            yield from _from_row_group(opened, group, column, first - start, last - start)
        start = end


def _from_row_group(
    opened: Any, group: int, column: str, first: int, last: int
) -> Iterator[bytes | OSError]:
    """Yield the images of the rows `first` to `last`, exclusive, of a row group."""
    is_struct = pa.types.is_struct(opened.schema_arrow.field(column).type)
    source = f"{column}.bytes" if is_struct else column
    position, left = 0, last - first
    try:
        for batch in opened.iter_batches(MAX_PART_SIZE, [group], [source]):
            (values,) = batch.columns
            if is_struct:
                (values,) = values.flatten()
            for value in values[max(first - position, 0) : last - position]:
                yield value.as_py() or b""
                left -= 1
            position += len(values)
            if position >= last:
                return
    except (OSError, pa.ArrowException) as error:
        yield from [_read_error(error, f"row group {group} of its Parquet file")] * left


def _read_error(error: Exception, what: str) -> OSError:
    """Return the rows' error: a transient one unchanged, else one that reports damage."""
    if isinstance(error, storage.TransientStorageError):
        return error
    return OSError(f"{what} is damaged: {' '.join(str(error).split())}")
