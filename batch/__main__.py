"""Run the command with `python -m batch`."""

from batch import cluster  # noqa: F401, I001  # sets variables before Ray is imported

from batch.command import main
from scripts.terminal import command

if __name__ == "__main__":
    command(main)
