"""Read and write files on this machine and in object storage, with retries.

An address is a path, or a URI that pyarrow's file systems accept, such as `s3://bucket/folder` or
`s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http`.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import stamina
from pyarrow import fs, parquet

from classification_client import reading
from classification_client.errors import TransientError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

# Limits of the retries of one operation after transient errors.
_MAX_ATTEMPTS = 4
_MAX_SECONDS = 30.0
_retried = stamina.retry(on=TransientError, attempts=_MAX_ATTEMPTS, timeout=_MAX_SECONDS)

_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class AddressError(ValueError):
    """No file system accepts the address; `str(error)` is the reason."""


@dataclass(frozen=True)
class Place:
    """A file or a folder.

    Attributes:
        system: its file system.
        path: the path in that file system.
    """

    system: Any
    path: str

    @property
    def is_local(self) -> bool:
        """Return whether the file system is this machine's."""
        return isinstance(self.system, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """Return the last component of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> "Place":
        return Place(self.system, f"{self.path.rstrip('/')}/{name}")


def place(address: str) -> Place:
    """Return the file or folder at an address from the user.

    Raises:
        AddressError: the scheme or an option is unknown, or the bucket does not exist.
        TransientError: looking up the bucket's region failed.
    """
    base, question, query = address.partition("?")
    if _SCHEME.match(address):
        return within(base, "", question + query)
    return within(address, os.getcwd())  # noqa: PTH109  # text


def within(path: str, base: str, query: str = "") -> Place:
    """Return the file at a path from a list or a folder, in which `?` is part of the name.

    Args:
        path: a path, or a scheme, a bucket and a key.
        base: the folder for relative paths.
        query: options of the bucket's file system, with the leading question mark.

    Raises:
        AddressError: see `place`.
        TransientError: see `place`.
    """
    if not _SCHEME.match(path):
        return Place(_local(), os.path.abspath(os.path.join(base, path)))  # noqa: PTH100, PTH118
    scheme, _, key = path.partition("://")
    if scheme.lower() == "file":
        return Place(_local(), key)
    if scheme.lower() in {"http", "https"}:
        raise AddressError(
            f"{path}: files are read from this machine and from object storage, not from web "
            "servers."
        )
    return Place(_system(f"{scheme}://{key.partition('/')[0]}{query}"), key)


@lru_cache
def _local() -> Any:
    return fs.LocalFileSystem()


@lru_cache
def _system(address: str) -> Any:
    """Return a bucket's file system; `address` contains no key, which would have to be quoted."""
    try:
        # pyarrow looks up the region of an S3 bucket over the network if the address has none.
        return _call(fs.FileSystem.from_uri, address)[0]
    except TransientError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise AddressError(f"{address}: {error}") from error


def read(file: Place, max_bytes: int) -> bytes:
    """Read a file, at most `max_bytes` + 1 bytes.

    Raises:
        TransientError: all attempts failed.
        OSError: the error is permanent.
    """
    content: bytes = _call(_read_local if file.is_local else _read_object, file, max_bytes)
    return content


def _read_local(file: Place, max_bytes: int) -> bytes:
    return reading.read(Path(file.path), max_bytes)[0]


def _read_object(file: Place, max_bytes: int) -> bytes:
    with file.system.open_input_stream(file.path) as opened:
        content: bytes = opened.read(max_bytes + 1)
        return content


@_retried
def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a file system; raise `TransientError` if it fails, unless permanently."""
    try:
        return function(*args)
    except (TransientError, *_PERMANENT):
        raise
    except OSError as error:
        # The texts of a key and of a bucket for which pyarrow has no error class.
        if "ACCESS_DENIED" in str(error) or str(error).endswith("' not found"):
            raise
        raise TransientError(error.errno, error.strerror or str(error)) from error


def opened(file: Place) -> Any:
    """Open a file for pyarrow, which reads it in ranges; each read is retried.

    Raises:
        OSError: see `read`; the returned file's methods raise the same errors.
    """
    if file.is_local:
        read(file, 0)  # raises an error that distinguishes a missing file from a missing drive
    return pa.PythonFile(_RetryingFile(file), mode="r")


class _RetryingFile:
    """The methods that `pyarrow.PythonFile` needs to read a file."""

    closed = False

    def __init__(self, file: Place) -> None:
        self._input = _call(file.system.open_input_file, file.path)
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._input.size()}
        self._position = starts[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        content: bytes = _call(self._input.read_at, count, self._position)
        self._position += len(content)
        return content

    def close(self) -> None:
        self._input.close()


def write(file: Place, content: Any) -> None:
    """Write bytes or a pyarrow buffer atomically, replacing an existing file.

    Raises:
        OSError: the file cannot be written.
    """
    if not file.is_local:
        _call(_write_object, file, content)
        return
    path = Path(file.path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_object(file: Place, content: Any) -> None:
    # An object becomes visible when the stream is closed. The context manager also closes it after
    # an exception, so there must be only one write.
    with file.system.open_output_stream(file.path) as opened:
        opened.write(content)


def write_table(file: Place, table: Any, **options: Any) -> None:
    """Write a Parquet file; see `write` and the options of `pyarrow.parquet.write_table`."""
    buffer = pa.BufferOutputStream()
    parquet.write_table(table, buffer, compression="zstd", **options)
    write(file, buffer.getvalue())


def names(folder: Place) -> set[str]:
    """Return the names of a folder's direct children; empty if the folder does not exist."""
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    return {info.base_name for info in folder.system.get_file_info(selector)}


def files(folder: Place) -> Iterator[tuple[Place, str | None]]:
    """Yield all files of a folder and its subfolders, in the order of their names.

    Hidden folders and links to folders, which may form a cycle, are skipped.

    Yields:
        each file, with None or the reason to skip it.

    Raises:
        OSError: a folder cannot be read.
    """
    if folder.is_local:
        entries = sorted(os.scandir(folder.path), key=attrgetter("name"))
        found = [(e.name, e.is_dir(follow_symlinks=False), _reason_to_skip(e)) for e in entries]
    else:
        infos = folder.system.get_file_info(fs.FileSelector(folder.path))
        found = sorted((info.base_name, info.type == fs.FileType.Directory, None) for info in infos)
    for name, is_folder, reason in found:
        if name.startswith("."):
            yield folder / name, "hidden"
        elif is_folder and reason is None:
            yield from files(folder / name)
        else:
            yield folder / name, reason


def _reason_to_skip(entry: "os.DirEntry[str]") -> str | None:
    if entry.name.encode(errors="ignore").decode() != entry.name:
        # Parquet stores text as UTF-8.
        return "whose names are no text in UTF-8"
    if entry.is_dir():
        return "link(s) to folders" if entry.is_symlink() else None
    return None if entry.is_file() else "pipe(s), or links to nothing"
