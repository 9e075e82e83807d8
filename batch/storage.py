"""Read and write files on this machine and in object storage, with retries.

An address is a path, or a URI that pyarrow's file systems accept, such as `s3://bucket/folder` or
`s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http`.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import stamina
from pyarrow import fs, parquet

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

# Limits of the retries of one operation after transient errors.
_MAX_ATTEMPTS = 4
_MAX_SECONDS = 30.0


class TransientStorageError(OSError):
    """Reading or writing a file failed; a retry may succeed."""


class AddressError(ValueError):
    """No file system accepts the address; `str(error)` is the reason."""


_retried = stamina.retry(on=TransientStorageError, attempts=_MAX_ATTEMPTS, timeout=_MAX_SECONDS)


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
        TransientStorageError: looking up the bucket's region failed.
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
        TransientStorageError: see `place`.
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
@_retried
def _system(address: str) -> Any:
    """Return a bucket's file system; `address` contains no key, which would have to be quoted."""
    try:
        return fs.FileSystem.from_uri(address)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise AddressError(f"{address}: {error}") from error
    except OSError as error:
        # pyarrow looks up the region of an S3 bucket over the network if the address has none.
        if str(error).endswith("' not found"):
            raise AddressError(f"{address}: {error}") from error
        raise _transient(error) from error


@_retried
def read(file: Place, max_bytes: int) -> bytes:
    """Read a file, at most `max_bytes` + 1 bytes.

    Raises:
        TransientStorageError: all attempts failed.
        OSError: the error is permanent.
    """
    return _read(file, max_bytes)


def _read(file: Place, max_bytes: int) -> bytes:
    try:
        if file.is_local:
            return _read_local(Path(file.path), max_bytes)
        with file.system.open_input_stream(file.path) as opened:
            content: bytes = opened.read(max_bytes + 1)
            return content
    except OSError as error:
        raise _classified(error, file) from error
    except ValueError as error:  # a null byte in the name
        raise OSError(f"no file can have this name: {error}") from error


def _read_local(file: Path, max_bytes: int) -> bytes:
    # Without O_NONBLOCK, opening a pipe would block until another process writes to it.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:  # noqa: PTH123  # a descriptor
        return opened.read(max_bytes + 1)


def _classified(error: OSError, file: Place) -> OSError:
    """Return a permanent error unchanged, and a `TransientStorageError` for any other."""
    permanent = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    if isinstance(error, permanent) or "ACCESS_DENIED" in str(error):
        # The mount point of an unmounted drive is an empty or missing folder.
        if file.is_local and not _has_entries(Path(file.path).parent):
            return TransientStorageError(error.errno, f"its folder is not there ({error.strerror})")
        return error
    return _transient(error)


def _transient(error: OSError) -> TransientStorageError:
    return TransientStorageError(error.errno, error.strerror or str(error))


def opened(file: Place) -> Any:
    """Open a file for pyarrow, which reads it in ranges; each read is retried.

    Raises:
        OSError: see `read`; the returned file's methods raise the same errors.
    """
    return pa.PythonFile(_RetryingFile(file), mode="r")


class _RetryingFile:
    """The methods that `pyarrow.PythonFile` needs to read a file."""

    closed = False

    def __init__(self, file: Place) -> None:
        self._file = file
        self._input = _open_input(file)
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._input.size()}
        self._position = starts[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        content = self._read(count)
        self._position += len(content)
        return content

    def close(self) -> None:
        self._input.close()

    @_retried
    def _read(self, count: int) -> bytes:
        try:
            content: bytes = self._input.read_at(count, self._position)
        except OSError as error:
            raise _classified(error, self._file) from error
        return content


@_retried
def _open_input(file: Place) -> Any:
    try:
        return file.system.open_input_file(file.path)
    except OSError as error:
        raise _classified(error, file) from error


def _has_entries(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def write(file: Place, content: Any) -> None:
    """Write a file atomically, replacing an existing one.

    Args:
        file: the file; a missing folder is created.
        content: bytes, or a pyarrow buffer.

    Raises:
        TransientStorageError: the file cannot be written.
    """
    if file.is_local:
        _write_local(Path(file.path), content)
    else:
        _write_object(file, content)


@_retried
def _write_object(file: Place, content: Any) -> None:
    try:
        # An object becomes visible when the stream is closed. The context manager also closes it
        # after an exception, so there must be only one write.
        with file.system.open_output_stream(file.path) as opened:
            opened.write(content)
    except OSError as error:
        raise _transient(error) from error


def _write_local(file: Path, content: Any) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise _transient(error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_table(file: Place, table: Any) -> None:
    """Write a Parquet file; see `write`."""
    buffer = pa.BufferOutputStream()
    parquet.write_table(table, buffer, compression="zstd")
    write(file, buffer.getvalue())


def names(folder: Place) -> set[str]:
    """Return the names of a folder's direct children; empty if the folder does not exist."""
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    return {info.base_name for info in folder.system.get_file_info(selector)}


def files(folder: Place) -> Iterator[tuple[Place, str | None]]:
    """Yield all files of a folder and its subfolders, in the order of their names.

    Hidden folders and links to folders are skipped.

    Yields:
        each file, with None or the reason to skip it.

    Raises:
        OSError: a folder cannot be read.
    """
    for name, is_folder, other in _entries(folder):
        found = folder / name
        if name.startswith("."):
            yield found, "hidden"
        elif is_folder:
            yield from files(found)
        else:
            yield found, other


def _entries(folder: Place) -> list[tuple[str, bool, str | None]]:
    """Return a folder's children: name, whether it is a folder, and the reason to skip it."""
    if not folder.is_local:
        found = folder.system.get_file_info(fs.FileSelector(folder.path))
        kinds = ((info.base_name, info.type == fs.FileType.Directory, None) for info in found)
        return sorted(kinds, key=itemgetter(0))
    with os.scandir(folder.path) as entries:
        return sorted(map(_local_entry, entries), key=itemgetter(0))


def _local_entry(entry: "os.DirEntry[str]") -> tuple[str, bool, str | None]:
    if not _is_text(entry.name):
        # Parquet stores text as UTF-8.
        return entry.name, False, "whose names are no text in UTF-8"
    if entry.is_symlink() and entry.is_dir():
        # Links may form a cycle.
        return entry.name, False, "link(s) to folders"
    is_folder = entry.is_dir(follow_symlinks=False)
    is_file = entry.is_file()
    return entry.name, is_folder, None if is_folder or is_file else "pipe(s), or links to nothing"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
