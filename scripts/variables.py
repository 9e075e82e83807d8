"""Make's variables as the options of a command.

A recipe leaves them to the environment, where spaces, quotes and dollars in the name of a file
survive, and says its target in MAKE_TARGET. Whoever came by make reads of make's variables in an
error, whoever came by `python -m` of options.
"""

import glob
import os
import shlex
from collections.abc import Callable, Sequence

import typer

from scripts import terminal
from scripts.terminal import UserError

# What holds names of files, by one rule.
SOURCES = ("IMAGE", "IMAGES")

_TARGET = "MAKE_TARGET"


def target() -> str | None:
    """The target whose recipe runs; None where make does not."""
    return os.environ.get(_TARGET)


def spelt(option: str, value: object = None) -> str:
    """An option as the person would give it: TOPK=3 or --topk 3."""
    given = "" if value is None else str(value)
    if target() is not None:
        return f"{option.upper()}={given}" if given else option.upper()
    return f"--{option} {given}".rstrip()


def sources() -> list[str]:
    """The files, folders and patterns that IMAGE and IMAGES name.

    A value that is the name of something there, or a pattern of such names, is that, spaces, quotes
    and all; any other is taken apart at its spaces as a shell does it.

    Raises:
        UserError: a quote has no end.
    """
    return [source for name in SOURCES for source in _taken_apart(name, os.environ.get(name, ""))]


def _taken_apart(variable: str, value: str) -> list[str]:
    if not value.strip():
        return []
    if os.path.lexists(value) or glob.glob(value):  # noqa: PTH207  # takes absolute ones
        return [value]
    try:
        parts = shlex.split(value)
    except ValueError as error:
        raise UserError(
            f"{variable}={value}: there is no such file, and as a list it has a quote without "
            "an end. A name with a quote in it goes between quotes of the other kind."
        ) from error
    return [os.path.expanduser(part) for part in parts]  # noqa: PTH111  # patterns too


def command(main: Callable[..., int | None], options: Sequence[str]) -> None:
    """Runs `main` as `terminal.command` does, or with make's variables as its command line.

    Args:
        main: what to run.
        options: those of its options that are variables of make.
    """
    if target() is None:
        terminal.command(main)
        return

    def from_variables() -> int | None:
        return _run(main, options)

    terminal.command(from_variables)


def _run(main: Callable[..., int | None], options: Sequence[str]) -> int | None:
    given = {option: os.environ.get(option.upper(), "") for option in options}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    words = [f"--{option}={value}" for option, value in given.items() if value]
    try:
        status: int | None = app([*words, "--", *sources()], standalone_mode=False)
    except Exception as error:
        # click's own errors name the option that they are about.
        name = getattr(getattr(error, "param", None), "name", None)
        if name is None:
            raise
        option = name.rstrip("_")
        message = (getattr(error, "message", "") or f"{error}").removeprefix("Value error, ")
        raise UserError(f"{spelt(option, given.get(option))}: {message}") from error
    return status
