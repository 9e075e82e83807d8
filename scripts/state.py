"""State files of the processes that the commands start: one JSON file in each process's folder.

If a state file is missing, `process_by_arguments` finds the process by its command line. Only
`delete_state` removes a state file; an unreadable one is reported.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from scripts.terminal import UserError


def process_by_arguments(*arguments: str) -> psutil.Process | None:
    """Return this user's process with all of these arguments in its command line, or None.

    Args:
        arguments: complete arguments that identify it, such as the path of its configuration file.
    """
    for process in psutil.process_iter(["cmdline", "uids", "status"]):
        command_line = f" {' '.join(process.info['cmdline'] or [])} "
        if (
            all(f" {argument} " in command_line for argument in arguments)
            and process.info["uids"] is not None
            and process.info["uids"].effective == os.geteuid()
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ):
            return process
    return None


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write a state file atomically; only this user can read it."""
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


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the values of a state file; None if there is no such file.

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
        raise unreadable_state(path) from error
    if not isinstance(values, dict):
        raise unreadable_state(path)
    return values


def unreadable_state(path: Path) -> UserError:
    """Return the error for a state file of another version or of another program."""
    return UserError(
        f"{path}, which lists the running processes, is unreadable: another version of this "
        "project or another program wrote it. Delete it: running processes are then found by their "
        "command lines."
    )


def delete_state(path: Path) -> None:
    """Delete the state file of a process that was stopped."""
    path.unlink(missing_ok=True)
