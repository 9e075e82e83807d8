"""What every command prints: results, warnings, and one sentence if it cannot go on."""

import codecs
import errno
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import stamina
import typer
from rich.console import Console
from rich.markup import escape

from classification_client.errors import UserError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

_INTERRUPTED = 130  # the shell's status of a program that Ctrl-C stopped


def printable(text: str) -> str:
    """Return text from elsewhere without control characters and surrogates."""
    return "".join("\ufffd" if unicodedata.category(c) in {"Cc", "Cs"} else c for c in text)


def safe(text: object) -> str:
    """Return text from elsewhere as rich prints it."""
    return escape(printable(str(text)))


def warn(text: str) -> None:
    """Print what must not be missed."""
    console.print(f"[bold black on yellow] WARNING [/] [bold yellow]{safe(text)}[/]")


def program(function: Callable[..., int | None]) -> Any:
    """Return a command line made from a function's signature."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return typer.main.get_command(app)


def run(parsed: Any, explain: Callable[[Exception], None] | None = None) -> NoReturn:
    """Run typer's command line and exit, with errors as sentences.

    Exit status: what the command returns, 0 for nothing; 1 for a `UserError`, 2 for a bad command
    line, 130 for Ctrl-C. `explain` exits with a message about an error, or has it raised.
    """
    for part in (parsed, *getattr(parsed, "commands", {}).values()):
        for parameter in part.params:
            parameter.callback = parameter.callback or _expand_home
    stamina.instrumentation.set_on_retry_hooks([])  # each attempt would be a line of a log
    codecs.register_error("printable", _encode)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="printable")
    try:
        # If the command is interrupted, typer returns the exit status and raises nothing.
        status = parsed.main(standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except BrokenPipeError:
        # The reader of standard output has had enough, as in `make status | head -1`.
        _discard_output()
        sys.exit(1)
    except Exception as error:
        (explain or explain_known)(error)
        raise
    if status == _INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nobody presses it once
        errors.print("[bold red]Stopped by Ctrl-C.[/] Run the same command again to resume.")
    sys.exit(status or 0)


def explain_known(error: Any) -> None:
    """Exit with a message if the error is the user's or the command line's; return otherwise."""
    if isinstance(error, UserError):
        fail(str(error))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _discard_output()
        fail(f"The output cannot be written: {error.strerror}.")
    # typer's own errors carry their exit status and know how to print themselves.
    show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is not None and status is not None:
        show()
        sys.exit(status)


def fail(sentence: str, status: int = 1) -> NoReturn:
    """Exit with a message."""
    errors.print(f"[bold red]Error:[/] {safe(sentence)}")
    sys.exit(status)


def _expand_home(_context: Any, _parameter: Any, value: Any) -> Any:
    """Return an option's value with its `~`, which a shell keeps in --weights=~/model.pth."""
    if isinstance(value, list):
        return [_expand_home(_context, _parameter, each) for each in value]
    if isinstance(value, str | Path) and str(value).startswith("~/"):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111  # text stays text
    return value


def _discard_output() -> None:
    """Discard what Python would still write to standard output at exit, and fail to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode bytes in a file's name as they were, and what an encoding lacks as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
