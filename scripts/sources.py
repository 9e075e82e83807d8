"""Which files, folders and patterns a person named in one option: IMAGES="holidays more/*.jpg"."""

import glob
import os
import shlex

from scripts.terminal import UserError


def sources(*values: str | None) -> list[str]:
    """Return the files, folders and patterns that values of options name, all by one rule.

    A value that is the name of something there, or a pattern of such names, is that, spaces, quotes
    and all; any other is split at its spaces as a shell does it. `UserError` if a quote has no end.
    """
    return [source for value in values if value for source in _split(value)]


def _split(value: str) -> list[str]:
    if os.path.lexists(value) or glob.glob(value):  # noqa: PTH207  # takes absolute ones
        return [value]
    try:
        parts = shlex.split(value)
    except ValueError as error:
        raise UserError(
            f"{value}: there is no such file, and as a list it has a quote without an end. A name "
            "with a quote in it goes between quotes of the other kind."
        ) from error
    return [os.path.expanduser(part) for part in parts]  # noqa: PTH111  # patterns too
