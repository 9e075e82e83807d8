"""A part of the job as the nodes read it: its rows of the plan, and the bytes of its pictures.

The plan is Parquet files of rows; a row group is a part.
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

# Pictures of a part, at most: what one task decodes, and what is made again where a node dies.
LARGEST = 256
# A job of few pictures has so many parts all the same, so that all cores have work to the end.
_FEWEST_PARTS = 128
_SMALLEST = 8
# Pictures of one file of the plan, which is read whole for each of its parts: about 1 MB.
SHARD = 256 * LARGEST

MOST_BYTES = 1 << 30

SCHEMA = pa.schema(
    [
        # As the results name the picture.
        pa.field("path", pa.string(), nullable=False),
        # Of a picture whose bytes are in a Parquet file: which one, and where in it.
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
    ]
)

# Files that are read ahead while one is being decoded.
_AHEAD = 8


def size_for(pictures: int) -> int:
    """Pictures of a part, for a job of so many; `LARGEST` for more than a file of the plan has."""
    return max(_SMALLEST, min(LARGEST, -(-pictures // _FEWEST_PARTS)))


def part(folder: str, number: int, size: int) -> Any:
    """The rows of one part.

    Args:
        folder: the address of the plan's.
        number: of the part, from 0.
        size: pictures of a part.

    Returns:
        a table of the plan's columns.
    """
    shard, group = divmod(number, SHARD // size)
    return _shard(folder, shard).read_row_group(group)


@lru_cache(maxsize=2)
def _shard(folder: str, shard: int) -> Any:
    content = storage.read(storage.place(folder) / shard_name(shard), MOST_BYTES)
    return parquet.ParquetFile(pa.BufferReader(content))


def shard_name(shard: int) -> str:
    """Of a file of the plan."""
    return f"plan-{shard:05}.parquet"


def contents(
    rows: Any, column: str | None, base: str, query: str, most: int
) -> Iterator[bytes | OSError]:
    """What each picture's file holds, or why it cannot be read; a few are read ahead.

    Args:
        rows: as `part` gives them.
        column: of Parquet files; None where each picture has a file.
        base: see `storage.within`; so is `query`.
        query: see there.
        most: bytes; of a longer file so many and one more.
    """
    # A folder may have Parquet files with addresses beside such with bytes.
    for file, some in groupby(rows.to_pylist(), itemgetter("file")):
        if file is None:
            yield from _in_files([row["path"] for row in some], base, query, most)
        else:
            assert column is not None
            wanted = [row["row"] for row in some]
            yield from _in_parquet(file, wanted, column, base, query)


def _in_files(paths: list[str], base: str, query: str, most: int) -> Iterator[bytes | OSError]:
    def read(path: str) -> bytes | OSError:
        try:
            return storage.read(storage.within(path, base, query), most)
        except OSError as error:
            return error
        except storage.AddressError as error:
            return OSError(str(error))

    with ThreadPoolExecutor(_AHEAD) as pool:
        # Made as they are asked for.
        submitted = (pool.submit(read, path) for path in paths)
        waiting = deque(islice(submitted, _AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(submitted, 1))


def _in_parquet(
    file: str, wanted: list[int], column: str, base: str, query: str
) -> Iterator[bytes | OSError]:
    """The pictures of some rows, which follow one another; of damaged row groups errors."""
    try:
        content = storage.opened(storage.within(file, base, query))
    except OSError as error:
        yield from [error] * len(wanted)
        return
    try:
        opened = parquet.ParquetFile(content)
    except (OSError, pa.ArrowException) as error:
        yield from [_damage(error, "its Parquet file")] * len(wanted)
        return
    start = 0
    for group in range(opened.num_row_groups):
        end = start + opened.metadata.row_group(group).num_rows
        first, last = max(start, wanted[0]), min(end, wanted[-1] + 1)
        if first < last:
            yield from _in_group(opened, group, column, first - start, last - start)
        start = end


def _in_group(
    opened: Any, group: int, column: str, first: int, last: int
) -> Iterator[bytes | OSError]:
    """The pictures of the rows from `first` to before `last` of a row group."""
    is_struct = pa.types.is_struct(opened.schema_arrow.field(column).type)
    source = f"{column}.bytes" if is_struct else column
    position, left = 0, last - first
    try:
        for batch in opened.iter_batches(LARGEST, [group], [source]):
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
        yield from [_damage(error, f"row group {group} of its Parquet file")] * left


def _damage(error: Exception, what: str) -> OSError:
    """Why rows have no picture: the storage did not give it, or what it gave is damaged."""
    if isinstance(error, storage.AwayError):
        return error
    return OSError(f"{what} is damaged: {' '.join(str(error).split())}")
