"""How the commands of this project run: errors as sentences, what nobody foresaw in a log file.

An option can also be set in the environment, for units and containers: DENSENET_WORKERS=2.
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

# Where what no person should have to read goes.
LOGS = Path(".run/logs")
_DETAILS = "errors.log"

# Of environment variables that set options.
PREFIX = "DENSENET"


def command(function: Callable[..., int | None]) -> NoReturn:
    """Run `function` as a command line made from its signature, with errors as sentences.

    Exit status: what the function returns, 0 for nothing; 1 for a `UserError` or a mistake of the
    program's own, 2 for a bad command line, 130 for Ctrl-C.
    """
    _run(program(function))


def run(app: typer.Typer) -> NoReturn:
    """Run a command line with the conventions of `command`."""
    _run(typer.main.get_command(app))


def step(text: str) -> None:
    """Print what is being done or was found."""
    console.print(f"[bold cyan]==>[/] {escape(text)}")


def _run(parsed: Any) -> NoReturn:
    for part in (parsed, *getattr(parsed, "commands", {}).values()):
        part.context_settings["auto_envvar_prefix"] = PREFIX
        for parameter in part.params:
            # A column of the same prefix would only widen `--help`.
            parameter.show_envvar = getattr(parameter, "envvar", None) is not None
    terminal.run(parsed, _explain)


def _explain(error: Any) -> NoReturn:
    explain_known(error)
    fail(_unexpected(error))


def _unexpected(error: Exception) -> str:
    """Return a sentence for what nobody foresaw; the details go to a file."""
    details = "".join(traceback.format_exception(error))
    # What a library says of itself is of no use to the person; the kind of error may be.
    first = next(iter(str(error).splitlines()), "")[:200]
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    begin = f"something went wrong that this program did not expect ({said})"
    for folder in (LOGS, Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / _DETAILS).open("a", encoding="utf-8", errors="replace") as file:
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                file.write(f"{now} {' '.join(sys.argv)}\n{details}\n")
        except OSError:
            continue
        return f"{begin}. The details, to report it with, are in {folder / _DETAILS}."
    return f"{begin}, and the details cannot be written:\n{details}"
