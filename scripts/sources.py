"""Which files, folders and patterns a person named in make's variables.

Make's variables come through the environment (see the Makefile), where spaces, quotes and dollars
in the name of a file survive.
"""

import glob
import os
import shlex

from scripts.terminal import GIVEN, UserError


def sources(*names: str) -> list[str]:
    """The files, folders and patterns that variables of make name, all by one rule.

    A value that is the name of something there, or a pattern of such names, is that, spaces, quotes
    and all; any other is taken apart at its spaces as a shell does it.

    Raises:
        UserError: a quote has no end.
    """
    given = {name: os.environ.get(f"{GIVEN}_{name}", "") for name in names}
    return [source for name, value in given.items() for source in _taken_apart(name, value)]


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
