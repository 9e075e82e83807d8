"""Reads an image's file, and tells permanent errors from transient ones."""

import errno
import os
import stat
import time
from pathlib import Path

from classification_client.errors import PassingError

# Errors of one file. Any other, such as an input error of a network drive, may pass.
_NAMES = "EACCES EINVAL EISDIR ELOOP ENAMETOOLONG ENOENT ENOTDIR ENXIO EPERM"
_PERMANENT = {getattr(errno, name) for name in _NAMES.split()}
# A file that was written to so many seconds ago may still be being copied; how long to wait then.
_FRESH, _LOOK = 5.0, 1.0


def read(file: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return a file's content, at most one byte more than `max_bytes`, and its status before.

    Raises a `PassingError` if it cannot be read now, another `OSError` if it never can.
    """
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode):
            with file.open("rb") as opened:
                return opened.read(max_bytes + 1), status
    except ValueError as error:  # a null byte
        raise OSError(errno.EINVAL, "no file can have this name", str(file)) from error
    except OSError as error:
        if error.errno == errno.ENOENT and _is_away(file):
            raise PassingError(errno.ENOENT, "its folder is missing or empty", str(file)) from error
        if error.errno in _PERMANENT:
            raise
        raise PassingError(error.errno, error.strerror, str(file)) from error
    # A pipe would block, a device may be endless.
    raise OSError(errno.EINVAL, "it is not a regular file", str(file))


def _is_away(file: Path) -> bool:
    """Whether the file's folder is missing, or empty as a drive that is not mounted leaves it."""
    folder = Path(os.path.realpath(file)).parent
    return not folder.is_dir() or not any(folder.iterdir())


def check_unchanged(file: Path, since: os.stat_result) -> None:
    """Raise `PassingError` if the file was written to since: it may have been half an image."""
    if abs(time.time() - since.st_mtime) < _FRESH:
        time.sleep(_LOOK)
    now = file.stat()
    if (now.st_size, now.st_mtime_ns) != (since.st_size, since.st_mtime_ns):
        raise PassingError(errno.EBUSY, "another program is writing to it", str(file))
