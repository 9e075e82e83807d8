"""Runs `python -m batch`."""

from batch import cluster  # noqa: F401, I001  # before Ray is imported, see there

from batch.command import main
from scripts.terminal import command

if __name__ == "__main__":
    command(main)
