"""What the commands remember of the processes they started: one JSON file in each process's folder.

A process is recognised by what no clock moves: its id together with when it started, counted by the
kernel since the machine did. Where a file is gone, `process_of` finds what still runs by what it
was started with. Only `forget` removes anything; commands that look report what they cannot read.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from scripts.terminal import UserError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Fields of /proc/PID/stat (proc(5)) behind the name, which may hold spaces: the 22nd is the time.
_START_TIME = 22 - 3


def started(pid: int) -> str:
    """When the process of that id started, as nothing but another process's start changes it.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        boot = _BOOT_ID.read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        # No Linux: there the kernel keeps the time that it wrote down at the start.
        return f"{psutil.Process(pid).create_time():.3f}"
    return f"{boot}/{stat.rpartition(')')[2].split()[_START_TIME]}"


def living_process(pid: int, when: str) -> psutil.Process | None:
    """The process of that id that `started` then; None where it has ended."""
    try:
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and started(pid) == when
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def process_of(*words: str) -> psutil.Process | None:
    """This user's living process that was started with all of these words, wherever they stand.

    Args:
        words: whole arguments, such as the path of a configuration that is nobody else's.
    """
    for process in psutil.process_iter(["cmdline", "uids", "status"]):
        said = f" {' '.join(process.info['cmdline'] or [])} "
        if (
            all(f" {word} " in said for word in words)
            and process.info["uids"] is not None
            and process.info["uids"].effective == os.geteuid()
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ):
            return process
    return None


def remember(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all, whatever happens; only this user can read it."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def recall(path: Path) -> dict[str, Any] | None:
    """What `remember` wrote there; None where there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise unreadable(path) from error
    if not isinstance(values, dict):
        raise unreadable(path)
    return values


def unreadable(path: Path) -> UserError:
    """What a person can do about a file of another version, or one that something else wrote."""
    return UserError(
        f"{path} says which processes run here, and cannot be understood: another version of this "
        "project wrote it, or something else. Remove it: what runs here is then found by what it "
        "was started with."
    )


def forget(path: Path) -> None:
    """Removes the file of a process that has been ended."""
    path.unlink(missing_ok=True)
