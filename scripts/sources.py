"""Parse options that name files, folders and patterns: IMAGES="holidays more/*.jpg"."""

import glob
import os
import shlex

from scripts.terminal import UserError


def sources(*values: str | None) -> list[str]:
    """Return the files, folders and patterns in the values of options.

    A value that is an existing path, or a pattern that matches one, is used as it is, with its
    spaces and quotes. Any other value is split like a shell command line.

    Raises:
        UserError: a quote is not closed.
    """
    return [source for value in values if value for source in _split(value)]


def _split(value: str) -> list[str]:
    if os.path.lexists(value) or glob.glob(value):  # noqa: PTH207  # pathlib rejects absolute patterns
        return [value]
    try:
        parts = shlex.split(value)
    except ValueError as error:
        raise UserError(
            f"{value}: there is no such file, and as a list it has a quote without an end. A name "
            "with a quote in it goes between quotes of the other kind."
        ) from error
    return [os.path.expanduser(part) for part in parts]  # noqa: PTH111  # may be a pattern
