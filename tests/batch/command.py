"""`python -m batch` as a person runs it, and the rows that it wrote."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

Row = dict[str, Any]

# Of a job of a few hundred pictures, Ray's start included, on a busy machine.
_TIMEOUT = 240


def begin(*args: str | Path, **environment: str) -> "subprocess.Popen[str]":
    """Starts the command; it and what it starts are a process group of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "batch", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Waits for its end; returns what it said."""
    said, _ = process.communicate(timeout=_TIMEOUT)
    assert process.returncode == status, said
    return said


def classify(*args: str | Path, status: int = 0, **environment: str) -> str:
    """Runs it; returns what it said."""
    return ended(begin(*args, **environment), status)


def part_files(output: Path) -> list[Path]:
    """The parts that have results."""
    return sorted(output.glob("part-*.parquet"))


def rows(output: Path) -> list[Row]:
    """All rows, in the order of the plan."""
    return [row for file in part_files(output) for row in pq.read_table(file).to_pylist()]
