"""Reading a picture's file, and whether a failure is the picture's or may pass.

A network drive that is away for a moment says much the same as a file that is not there. What is
wrong with one file alone is final; whatever else fails may be better in a minute.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")

# Seconds since it was last written to in which a file may still be being copied, and how long to
# look whether it is.
_FRESH, _LOOK = 5.0, 1.0

# What a file says of itself. An error that is not here may pass: nothing is lost by asking again.
_OF_THE_FILE = {
    errno.EISDIR,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
}
# The same, unless its folder is away with all that is in it.
_OF_THE_FILE_OR_ITS_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}


class PassingError(OSError):
    """A file cannot be read now, for a reason that lies not in this file and may pass."""


@dataclass(frozen=True)
class Snapshot:
    """What a file held when it was read.

    Attributes:
        content: its bytes; None where they are more than were wanted.
        size: how many they are.
        changed_ns: when the file was last written to, in nanoseconds.
    """

    content: bytes | None
    size: int
    changed_ns: int


def read(file: Path, most: int) -> Snapshot:
    """Reads a file of at most `most` bytes.

    Raises:
        PassingError: it cannot be read now.
        OSError: it can never be read as it is.
    """
    try:
        return _read(file, most)
    except PassingError:
        raise
    except OSError as error:
        raise judged(error, file) from error
    except ValueError as error:
        raise OSError(errno.EINVAL, "no file can have this name", str(file)) from error


def _read(file: Path, most: int) -> Snapshot:
    # A pipe would not open before somebody writes to it.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:  # noqa: PTH123  # it is open already
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(file))
        size = status.st_size
        content = opened.read(size + 1) if size <= most else None
        if content is not None and len(content) != size:
            raise _being_written(file)
    return Snapshot(content, size, status.st_mtime_ns)


def check_unchanged(file: Path, since: Snapshot) -> None:
    """Raises `PassingError` if the file was written to since: it may have been half a picture.

    Takes a second where it was written to just before it was read.
    """
    if abs(time.time() - since.changed_ns / 1e9) < _FRESH:
        time.sleep(_LOOK)
    try:
        status = file.stat()
    except OSError as error:
        raise judged(error, file) from error
    if (status.st_size, status.st_mtime_ns) != (since.size, since.changed_ns):
        raise _being_written(file)


def _being_written(file: Path) -> PassingError:
    return PassingError(errno.EBUSY, "another program is writing to it", str(file))


def judged(error: OSError, file: Path) -> OSError:
    """The same error, of the kind that says whether it may pass."""
    if error.errno in _OF_THE_FILE:
        return error
    if error.errno in _OF_THE_FILE_OR_ITS_FOLDER:
        missing = away(file)
        if missing is None:
            return error
        return PassingError(error.errno, f"its folder {missing} is not there", str(file))
    return PassingError(error.errno, error.strerror, str(file))


def away(file: Path) -> Path | None:
    """The folder of a file, links followed, if it is not there with files in it.

    What is left of a network drive that is not mounted is an empty folder.
    """
    try:
        folder = Path(os.path.realpath(file)).parent
        with os.scandir(folder) as entries:
            return folder if next(entries, None) is None else None
    except OSError:
        return folder
    except ValueError:  # a name that no file can have
        return None


def in_thread(work: Callable[[], _Result], timeout: float) -> _Result:
    """Does `work` in a thread that is left to itself if it takes too long.

    A read from a network drive that hangs cannot be ended; it must not keep the program.

    Args:
        work: what to do with a file.
        timeout: seconds.

    Raises:
        PassingError: it is not done in that time.
        Exception: what `work` raises.
    """
    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise PassingError(errno.ETIMEDOUT, "the drive does not answer")
    return done.result()
