"""How a command speaks to a person: steps, results, and one sentence when it cannot go on."""

import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn

import stamina
import typer
from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

# Where `make` runs a command, its options are make's variables, and the environment has the command
# that it was asked for under this name.
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


def asked() -> str | None:
    """The command as make was asked for it, such as "make classify"; None without make."""
    return os.environ.get(ASKED)


def spelt(option: str, value: object = None) -> str:
    """An option as the person would give it: --topk 3, or TOPK=3."""
    given = "" if value is None else str(value)
    if asked() is not None:
        return f"{option.upper()}={given}" if given else option.upper()
    return f"--{option} {given}".rstrip()


def program(function: Callable[..., int | None]) -> Any:
    """A command line made from a function's signature."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return typer.main.get_command(app)


def run(parsed: Any, explain: Callable[[Exception], None] | None = None) -> NoReturn:
    """Runs a command line to its end, with errors as sentences.

    Exit status: what the command returns, 0 for nothing; 1 for a `UserError`, 2 for a bad command
    line, 130 for Ctrl-C.

    Args:
        parsed: typer's command.
        explain: what to do about any other error; otherwise a bad command line is explained, and
            what nobody foresaw is raised.
    """
    stamina.instrumentation.set_on_retry_hooks([])  # each try would be a line of a log
    try:
        # Where the command is interrupted, typer gives back the exit status and raises nothing.
        status = parsed.main(standalone_mode=False)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # Whoever read standard output has had enough, as in `make status | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        (explain or explain_usage)(error)
        raise
    if status == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nobody presses it once
        _errors.print("[bold red]Stopped by Ctrl-C.[/] Run the same command again to go on.")
    sys.exit(status or 0)


def explain_usage(error: Any) -> None:
    """Ends the command where the error is one of its command line; returns otherwise."""
    # typer's own errors carry their exit status and know how to print themselves.
    show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is not None and status is not None:
        show()
        sys.exit(status)


def fail(sentence: str, status: int = 1) -> NoReturn:
    """Ends the command with a sentence for the person."""
    _errors.print(f"[bold red]Error:[/] {escape(printable(sentence))}")
    sys.exit(status)
