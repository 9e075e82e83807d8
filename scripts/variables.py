"""Refuses variables that a make command does not have, with the nearest name that it has.

`make` runs this where it found such a one, on the system's Python before anything is installed, so
it uses the standard library only, and stays readable to Pythons older than the project supports.
"""

from __future__ import annotations

import difflib
import sys


def complaint(name: str, commands: list[str], variables: dict[str, list[str]]) -> str:
    """What is wrong with a variable, and what to do.

    Args:
        name: of the variable.
        commands: those that make was asked for.
        variables: those of each command.
    """
    known = sorted({own for command in commands for own in variables.get(command, [])})
    asked = "make " + " ".join(commands)
    begin = "%s is no variable of %s" % (name, asked)
    elsewhere = sorted(command for command, own in variables.items() if name in own)
    if elsewhere:
        return "%s, but of: make %s." % (begin, ", make ".join(elsewhere))
    nearest = difflib.get_close_matches(name.upper(), known, 1)
    if nearest:
        return "%s. Did you mean %s?" % (begin, nearest[0])
    return "%s. It has %s." % (begin, ", ".join(known) or "none")


def main() -> None:
    """Prints a sentence for each variable and exits with 1.

    Args: the commands; the foreign variables; for each command its name and its variables. Each
    argument is words with spaces between.
    """
    commands, foreign, lists = sys.argv[1].split(), sys.argv[2].split(), sys.argv[3:]
    variables = {words.split()[0]: words.split()[1:] for words in lists}
    for name in foreign:
        sys.stderr.write("Error: %s\n" % complaint(name, commands, variables))
    sys.exit(1)


if __name__ == "__main__":
    main()
