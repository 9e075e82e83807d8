"""Run commands and print their results, warnings and error messages."""

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

_INTERRUPTED = 130  # the shell's exit status after Ctrl-C


def printable(text: str) -> str:
    """Return untrusted text without control characters and surrogates."""
    return "".join("\ufffd" if unicodedata.category(c) in {"Cc", "Cs"} else c for c in text)


def safe(text: object) -> str:
    """Return untrusted text escaped for rich."""
    return escape(printable(str(text)))


def warn(text: str) -> None:
    """Print a prominent warning."""
    console.print(f"[bold black on yellow] WARNING [/] [bold yellow]{safe(text)}[/]")


def program(function: Callable[..., int | None]) -> Any:
    """Return a command line made from a function's signature."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return typer.main.get_command(app)


def run(parsed: Any, explain: Callable[[Exception], None] | None = None) -> NoReturn:
    """Run a Typer command line and exit; print known errors as messages.

    The exit status is the command's return value (0 for None), 1 for a `UserError`, 2 for a bad
    command line, 130 for Ctrl-C. `explain` exits with a message for an error, or returns to have it
    raised.
    """
    for part in (parsed, *getattr(parsed, "commands", {}).values()):
        for parameter in part.params:
            parameter.callback = parameter.callback or _expand_home
    stamina.instrumentation.set_on_retry_hooks([])  # do not log each attempt
    codecs.register_error("printable", _encode)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="printable")
    try:
        # After Ctrl-C, Typer returns the exit status instead of raising.
        status = parsed.main(standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except BrokenPipeError:
        # The reader of standard output has exited, as in `make status | head -1`.
        _discard_output()
        sys.exit(1)
    except Exception as error:
        (explain or explain_known)(error)
        raise
    if status == _INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # users press Ctrl-C repeatedly
        errors.print("[bold red]Stopped by Ctrl-C.[/] Run the same command again to resume.")
    sys.exit(status or 0)


def explain_known(error: Any) -> None:
    """Exit with a message for a user's or command line's error; return for any other."""
    if isinstance(error, UserError):
        fail(str(error))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _discard_output()
        fail(f"The output cannot be written: {error.strerror}.")
    # Typer's errors have an exit status and a method that prints them.
    show, status = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is not None and status is not None:
        show()
        sys.exit(status)


def fail(sentence: str, status: int = 1) -> NoReturn:
    """Exit with a message, as one paragraph: another program's error may have several lines."""
    errors.print(f"[bold red]Error:[/] {safe(' '.join(sentence.splitlines()))}")
    sys.exit(status)


def _expand_home(_context: Any, _parameter: Any, value: Any) -> Any:
    """Expand `~` in an option's value; shells do not expand it in --weights=~/model.pth."""
    if isinstance(value, list):
        return [_expand_home(_context, _parameter, each) for each in value]
    if isinstance(value, str | Path) and str(value).startswith("~/"):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111  # keeps the type
    return value


def _discard_output() -> None:
    """Redirect standard output to /dev/null, since flushing it at exit would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode a file name's undecodable bytes unchanged, and unsupported characters as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
