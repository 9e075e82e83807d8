"""How the commands speak to a person: steps, results, and one sentence when they cannot go on.

Where `make` runs a command, each of its options is a variable of make's: `make run WORKERS=2` sets
`GIVEN_WORKERS` for it (see the Makefile), and what is wrong with it is said in make's words.
"""

import os
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


# Where what no person should have to read goes.
LOGS = Path(".run/logs")
_DETAILS = "errors.log"

# How the Makefile passes variables on; and, under that name, the command that it was asked for.
GIVEN = "GIVEN"
ASKED = "GIVEN_TO"

# The shell's status of a program that Ctrl-C ended.
INTERRUPTED = 130


# Control characters, and halves of characters, as names of files can hold.
_NOT_PRINTED = {"Cc", "Cs"}


class UserError(Exception):
    """The command cannot go on, for a reason that the person at the terminal can change.

    `str(error)` says what is wrong and what to do; no traceback is shown.
    """


def printable(text: str) -> str:
    """Text from elsewhere, such as the name of a file, without what a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) in _NOT_PRINTED else c for c in text)


def step(text: str) -> None:
    """Says what is being done or was found."""
    console.print(f"[bold cyan]==>[/] {escape(text)}")


def warn(text: str) -> None:
    """Says something that must not be missed."""
    console.print(f"[bold black on yellow] WARNING [/] [bold yellow]{escape(printable(text))}[/]")


def command(function: Callable[..., int | None]) -> None:
    """Runs `function` as a command line made from its signature, with errors as sentences.

    Exit status: what the function returns, 0 for nothing; 1 for a `UserError` or a mistake of the
    program's own, 2 for a bad command line, 130 for Ctrl-C.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    run(app)


def run(app: typer.Typer) -> None:
    """Runs a command line with the conventions of `command`."""
    parsed = typer.main.get_command(app)
    for part in (parsed, *getattr(parsed, "commands", {}).values()):
        part.context_settings["auto_envvar_prefix"] = GIVEN
    try:
        # Where the command is interrupted, typer gives back the exit status and raises nothing.
        status = parsed.main(standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # Whoever read standard output has had enough, as in `make status | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # typer's own errors carry their exit status and know how to print themselves.
        show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or status is None:
            fail(_unexpected(error))
        sentence = _about_variable(error)
        if sentence is not None:
            fail(sentence, status)
        show()
        sys.exit(status)
    if status == INTERRUPTED:
        _errors.print("[bold red]Stopped by Ctrl-C.[/] Run the same command again to go on.")
    sys.exit(status or 0)


def fail(sentence: str, status: int = 1) -> NoReturn:
    """Ends the command with a sentence for the person."""
    _errors.print(f"[bold red]Error:[/] {escape(printable(sentence))}")
    sys.exit(status)


def _about_variable(error: Any) -> str | None:
    """What is wrong with one of make's variables; None where the person gave options."""
    asked, parameter = os.environ.get(ASKED), getattr(error, "param", None)
    if not asked or parameter is None or parameter.name is None:
        return None
    name = parameter.name.rstrip("_").upper()
    value = os.environ.get(f"{GIVEN}_{name}")
    if hasattr(error, "param_type"):  # typer's error for what was not given at all
        return f"{name} is missing, as in: {asked} {name}=..."
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
