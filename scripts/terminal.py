"""How the commands speak to a person: steps, results, and one sentence when they cannot go on."""

import sys
import unicodedata
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


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

    Exit status: what the function returns, 0 for nothing; 1 for a `UserError`, 2 for a bad command
    line, 130 for Ctrl-C.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    run(app)


def run(app: typer.Typer) -> None:
    """Runs a command line with the conventions of `command`."""
    try:
        # Where the command is interrupted, typer gives back the exit status and raises nothing.
        status = app(standalone_mode=False)
    except UserError as error:
        _errors.print(f"[bold red]Error:[/] {escape(printable(str(error)))}")
        sys.exit(1)
    except Exception as error:
        # click's own errors carry their exit status and know how to print themselves.
        show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or status is None:
            raise
        show()
        sys.exit(status)
    if status == INTERRUPTED:
        _errors.print("[bold red]Stopped by Ctrl-C.[/] Run the same command again to go on.")
    sys.exit(status or 0)
