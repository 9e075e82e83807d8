"""A part of the job as the nodes read it: its rows of the plan, and the bytes of its pictures.

The plan is Parquet files of rows; a row group is a part.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from batch import storage
from batch.storage import Place

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
    if rows.column("file").null_count == 0:
        assert column is not None
        yield from _in_parquet(rows, column, base, query)
        return

    def read(path: str) -> bytes | OSError:
        try:
            return storage.read(storage.within(path, base, query), most)
        except OSError as error:
            return error
        except storage.AddressError as error:
            return OSError(str(error))

    with ThreadPoolExecutor(_AHEAD) as pool:
        # Made as they are asked for.
        submitted = (pool.submit(read, path) for path in rows.column("path").to_pylist())
        waiting = deque(islice(submitted, _AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(submitted, 1))


def _in_parquet(rows: Any, column: str, base: str, query: str) -> Iterator[bytes]:
    files = rows.column("file").to_pylist()
    numbers = rows.column("row").to_pylist()
    for file in dict.fromkeys(files):
        wanted = [number for of, number in zip(files, numbers, strict=True) if of == file]
        with opened_parquet(storage.within(file, base, query)) as opened:
            yield from _rows(opened, column, wanted)


def _rows(opened: Any, column: str, wanted: list[int]) -> Iterator[bytes]:
    """Values of a column, from those row groups only that have them."""
    is_struct = pa.types.is_struct(opened.schema_arrow.field(column).type)
    source = f"{column}.bytes" if is_struct else column
    # The rows of a part follow one another.
    first, start = wanted[0], 0
    for group in range(opened.num_row_groups):
        end = start + opened.metadata.row_group(group).num_rows
        if end > first and start <= wanted[-1]:
            position = start
            for batch in opened.iter_batches(LARGEST, [group], [source]):
                (values,) = batch.columns
                if is_struct:
                    (values,) = values.flatten()
                low, high = max(first, position), min(wanted[-1] + 1, position + len(values))
                for index in range(low, high):
                    yield values[index - position].as_py() or b""
                position += len(values)
                if position > wanted[-1]:
                    return
        start = end


def opened_parquet(file: Place) -> Any:
    """A Parquet file; raises pyarrow's `ArrowInvalid` where it is none."""
    return parquet.ParquetFile(file.system.open_input_file(file.path))
