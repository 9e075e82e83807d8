"""Run the command with `python -m batch`."""

from batch.command import main
from scripts.terminal import command

if __name__ == "__main__":
    command(main)
