"""Run the commands of this project: print errors as messages and log unexpected ones.

Environment variables set options too, for systemd units and containers: DENSENET_WORKERS=2.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.markup import escape

from classification_client import terminal
from classification_client.errors import UserError
from classification_client.terminal import console, explain_known, fail, printable, program, warn

__all__ = [
    "PREFIX",
    "UserError",
    "command",
    "console",
    "printable",
    "run",
    "step",
    "warn",
]

# Folder of the log with the tracebacks of unexpected errors.
LOGS = Path(".run/logs")
_DETAILS = "errors.log"

# Prefix of environment variables that set options.
PREFIX = "DENSENET"


def command(function: Callable[..., int | None]) -> NoReturn:
    """Run `function` as a command line made from its signature, and print errors as messages.

    Exit status: the return value of `function`, 0 for None; 1 for a `UserError` or an unexpected
    error, 2 for an invalid command line, 130 for Ctrl-C.
    """
    _run(program(function))


def run(app: typer.Typer) -> NoReturn:
    """Run a Typer app with the conventions of `command`."""
    _run(typer.main.get_command(app))


def step(text: str) -> None:
    """Print a step of the command, or its result."""
    console.print(f"[bold cyan]==>[/] {escape(text)}")


def _run(parsed: Any) -> NoReturn:
    for part in (parsed, *getattr(parsed, "commands", {}).values()):
        part.context_settings["auto_envvar_prefix"] = PREFIX
        for parameter in part.params:
            # By default `--help` would show a variable with the prefix for each option.
            parameter.show_envvar = getattr(parameter, "envvar", None) is not None
    terminal.run(parsed, _explain)


def _explain(error: Any) -> NoReturn:
    explain_known(error)
    fail(_unexpected(error))


def _unexpected(error: Exception) -> str:
    """Log the traceback of an unexpected error; return a message for the user."""
    details = "".join(traceback.format_exception(error))
    # The type of the error may help the user; a library's long message does not.
    first = next(iter(str(error).splitlines()), "")[:200]
    summary = f"{type(error).__name__}: {first}" if first else type(error).__name__
    begin = f"something went wrong that this program did not expect ({summary})"
    for folder in (LOGS, Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / _DETAILS).open("a", encoding="utf-8", errors="replace") as file:
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                file.write(f"{now} {' '.join(sys.argv)}\n{details}\n")
        except OSError:
            continue
        return f"{begin}. Details for a bug report are in {folder / _DETAILS}."
    return f"{begin}, and the details cannot be written:\n{details}"
