"""How make's commands speak to a person.

Each option of such a command is a variable of make's: `make run WORKERS=2` sets `GIVEN_WORKERS` for
it (see the Makefile), and what is wrong with it is said in make's words.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import typer

from classification_client import terminal
from classification_client.terminal import (
    UserError,
    asked,
    console,
    explain_usage,
    fail,
    printable,
    program,
    step,
    warn,
)

__all__ = [
    "GIVEN",
    "UserError",
    "asked",
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

# How the Makefile passes variables on.
GIVEN = "GIVEN"


def command(function: Callable[..., int | None]) -> NoReturn:
    """Runs `function` as a command line made from its signature, with errors as sentences.

    Exit status: what the function returns, 0 for nothing; 1 for a `UserError` or a mistake of the
    program's own, 2 for a bad command line, 130 for Ctrl-C.
    """
    _run(program(function))


def run(app: typer.Typer) -> NoReturn:
    """Runs a command line with the conventions of `command`."""
    _run(typer.main.get_command(app))


def _run(parsed: Any) -> NoReturn:
    for part in (parsed, *getattr(parsed, "commands", {}).values()):
        part.context_settings["auto_envvar_prefix"] = GIVEN
        for parameter in part.params:
            # These are for the Makefile, and nobody's to set; `--help` leaves them out.
            parameter.show_envvar = getattr(parameter, "envvar", None) is not None
    terminal.run(parsed, _explain)


def _explain(error: Any) -> NoReturn:
    sentence = _about_variable(error)
    if sentence is not None:
        fail(sentence, error.exit_code)
    explain_usage(error)
    fail(_unexpected(error))


def _about_variable(error: Any) -> str | None:
    """What is wrong with one of make's variables; None where the person gave options."""
    parameter = getattr(error, "param", None)
    if asked() is None or parameter is None or parameter.name is None:
        return None
    name = parameter.name.rstrip("_").upper()
    value = os.environ.get(f"{GIVEN}_{name}")
    if hasattr(error, "param_type"):  # typer's error for what was not given at all
        return f"{name} is missing, as in: {asked()} {name}=..."
    if value is None:
        return None
    # As in "Input should be a valid integer, unable to parse string as an integer".
    said = error.message.removeprefix("Value error, ").removesuffix(".")
    said = said.replace("Input should be", "must be").split(", unable")[0]
    return f"{name} {said}, got {value!r}."


def _unexpected(error: Exception) -> str:
    """A sentence for what nobody foresaw; the details go to a file."""
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
