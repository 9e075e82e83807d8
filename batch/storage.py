"""Files where they are: on this machine, or in object storage.

An address is a path, or one that pyarrow's file systems know, such as `s3://bucket/folder` or
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

# How often a file is tried that cannot be read for a reason that may pass, and for how long.
_ATTEMPTS = 4
_SECONDS = 30.0


class AwayError(OSError):
    """A file cannot be read or written now, for a reason that may pass."""


class AddressError(ValueError):
    """An address that no file system takes; `str(error)` says why."""


_retried = stamina.retry(on=AwayError, attempts=_ATTEMPTS, timeout=_SECONDS)


@dataclass(frozen=True)
class Place:
    """A file or a folder.

    Attributes:
        system: the file system that it is in.
        path: there.
    """

    system: Any
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return isinstance(self.system, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> "Place":
        return Place(self.system, f"{self.path.rstrip('/')}/{name}")


def place(address: str) -> Place:
    """The file or folder of an address that a person gave.

    Raises:
        AddressError: no file system is called so, or the address has something that it has not.
        AwayError: the storage cannot be asked now where the bucket is.
    """
    base, question, query = address.partition("?")
    if _SCHEME.match(address):
        return within(base, "", question + query)
    return within(address, os.getcwd())  # noqa: PTH109  # text


def within(path: str, base: str, query: str = "") -> Place:
    """The file of a path as lists and folders have it: all of it is the name.

    Args:
        path: a path, or a scheme, a bucket and a key.
        base: the folder that relative paths begin in.
        query: what the file system of a bucket is to be told, from a question mark on.

    Raises:
        AddressError: as `place`; so is AwayError.
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
    """Of a bucket; its keys are no part of the address, where they would have to be quoted."""
    try:
        return fs.FileSystem.from_uri(address)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise AddressError(f"{address}: {error}") from error
    except OSError as error:
        # Of an S3 bucket without a region in its address the network is asked for it.
        if str(error).endswith("' not found"):
            raise AddressError(f"{address}: {error}") from error
        raise AwayError(error.errno, error.strerror or str(error)) from error


@_retried
def read(file: Place, most: int) -> bytes:
    """A file's bytes, of a longer one the first `most` and one more.

    Raises:
        AwayError: it cannot be read now, though it was tried several times.
        OSError: it can never be read as it is.
    """
    return _read(file, most)


def _read(file: Place, most: int) -> bytes:
    try:
        if file.is_local:
            return _read_local(Path(file.path), most)
        with file.system.open_input_stream(file.path) as opened:
            content: bytes = opened.read(most + 1)
            return content
    except OSError as error:
        raise _judged(error, file) from error
    except ValueError as error:  # a name that no file can have
        raise OSError(f"no file can have this name: {error}") from error


def _read_local(file: Path, most: int) -> bytes:
    # A pipe would not open before somebody writes to it.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:  # noqa: PTH123  # it is open already
        return opened.read(most + 1)


def _judged(error: OSError, file: Place) -> OSError:
    """Whether it lies in this file, or may pass."""
    final = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    if isinstance(error, final) or "ACCESS_DENIED" in str(error):
        # What is left of a drive that is not mounted is an empty folder, or none.
        if file.is_local and not _has_entries(Path(file.path).parent):
            return AwayError(error.errno, f"its folder is not there ({error.strerror})")
        return error
    return AwayError(error.errno, error.strerror or str(error))


def opened(file: Place) -> Any:
    """A file of pyarrow's that is read in pieces, each of which is tried several times.

    Raises:
        OSError: as `read`; so do its methods that read.
    """
    return pa.PythonFile(_Pieces(file), mode="r")


class _Pieces:
    """What `pyarrow.PythonFile` needs of a file that is read."""

    closed = False

    def __init__(self, file: Place) -> None:
        self._file = file
        self._input = _input(file)
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._input.size()}
        self._at = starts[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> bytes:
        content = self._read(count)
        self._at += len(content)
        return content

    def close(self) -> None:
        self._input.close()

    @_retried
    def _read(self, count: int) -> bytes:
        try:
            content: bytes = self._input.read_at(count, self._at)
        except OSError as error:
            raise _judged(error, self._file) from error
        return content


@_retried
def _input(file: Place) -> Any:
    try:
        return file.system.open_input_file(file.path)
    except OSError as error:
        raise _judged(error, file) from error


def _has_entries(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def write(file: Place, content: Any) -> None:
    """Writes a file, whole or not at all; what was there before goes.

    Args:
        file: its folder is made where it is missing.
        content: bytes, or a buffer of pyarrow's.

    Raises:
        AwayError: it cannot be written now.
    """
    if file.is_local:
        _write_local(Path(file.path), content)
    else:
        _write_object(file, content)


@_retried
def _write_object(file: Place, content: Any) -> None:
    try:
        # An object is there from its end on, not before; nothing in between may fail.
        with file.system.open_output_stream(file.path) as opened:
            opened.write(content)
    except OSError as error:
        raise AwayError(error.errno, error.strerror or str(error)) from error


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
        raise AwayError(error.errno, error.strerror or str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_table(file: Place, table: Any) -> None:
    """Writes a Parquet file, as `write` does."""
    buffer = pa.BufferOutputStream()
    parquet.write_table(table, buffer, compression="zstd")
    write(file, buffer.getvalue())


def names(folder: Place) -> set[str]:
    """The names of all that is in a folder, not below; empty where there is none."""
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    return {info.base_name for info in folder.system.get_file_info(selector)}


def files(folder: Place) -> Iterator[tuple[Place, str | None]]:
    """All files below a folder, in the order of their names; hidden ones and links to folders not.

    Returns:
        for each file its place and None, or, for what is left out, what it is.

    Raises:
        OSError: a folder cannot be read.
    """
    for name, is_folder, other in _entries(folder):
        at = folder / name
        if name.startswith("."):
            yield at, "hidden"
        elif is_folder:
            yield from files(at)
        else:
            yield at, other


def _entries(folder: Place) -> list[tuple[str, bool, str | None]]:
    """What is in a folder: the name, whether it is a folder, and what it is if it is no file."""
    if not folder.is_local:
        found = folder.system.get_file_info(fs.FileSelector(folder.path))
        kinds = ((info.base_name, info.type == fs.FileType.Directory, None) for info in found)
        return sorted(kinds, key=itemgetter(0))
    with os.scandir(folder.path) as entries:
        return sorted(map(_local_entry, entries), key=itemgetter(0))


def _local_entry(entry: "os.DirEntry[str]") -> tuple[str, bool, str | None]:
    if not _is_text(entry.name):
        # No column of text can hold it.
        return entry.name, False, "whose names are no text in UTF-8"
    if entry.is_symlink() and entry.is_dir():
        # It may lead back to where it is.
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
