"""Read an image file and distinguish permanent from transient errors."""

import errno
import os
import stat
import time
from pathlib import Path

from classification_client.errors import TransientError

# Permanent errors. All others, such as an I/O error of a network drive, are transient.
_NAMES = "EACCES EINVAL EISDIR ELOOP ENAMETOOLONG ENOENT ENOTDIR ENXIO EPERM"
_PERMANENT = {getattr(errno, name) for name in _NAMES.split()}
# A file modified this recently may still be in the process of being copied; it is checked again.
_RECENT_SECONDS, _RECHECK_SECONDS = 5.0, 1.0


def read(file: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return a file's content, at most `max_bytes` + 1 bytes, and its status before reading.

    Raises:
        TransientError: the error is transient.
        OSError: the error is permanent.
    """
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode):
            with file.open("rb") as opened:
                return opened.read(max_bytes + 1), status
    except ValueError as error:  # a null byte
        raise OSError(errno.EINVAL, "no file can have this name", str(file)) from error
    except OSError as error:
        if error.errno == errno.ENOENT and _is_unmounted(file):
            raise TransientError(
                errno.ENOENT, "its folder is missing or empty", str(file)
            ) from error
        if error.errno in _PERMANENT:
            raise
        raise TransientError(error.errno, error.strerror, str(file)) from error
    # Reading a pipe would block, and a device may be endless.
    raise OSError(errno.EINVAL, "it is not a regular file", str(file))


def _is_unmounted(file: Path) -> bool:
    """Return whether the file's folder is missing or empty, like an unmounted drive's."""
    folder = Path(os.path.realpath(file)).parent
    return not folder.is_dir() or not any(folder.iterdir())


def check_unchanged(file: Path, since: os.stat_result) -> None:
    """Raise `TransientError` if the file was modified after `since`, perhaps while it was read."""
    if abs(time.time() - since.st_mtime) < _RECENT_SECONDS:
        time.sleep(_RECHECK_SECONDS)
    now = file.stat()
    if (now.st_size, now.st_mtime_ns) != (since.st_size, since.st_mtime_ns):
        raise TransientError(errno.EBUSY, "another program is writing to it", str(file))
