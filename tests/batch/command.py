"""`python -m batch` in a process, and the rows that it wrote."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import requests

from scripts.serve.management import wait_until
from scripts.serve.running import ServerState

Row = dict[str, Any]

# Seconds of a job of a few hundred images with Ray's start, on a busy machine.
_TIMEOUT = 240


def begin(
    *args: str | Path, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start the command in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "batch", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | dict(environment or {}),
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Wait for its exit; return its output."""
    try:
        printed, _ = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, printed
    return printed


def wait_for(ready: Callable[[], bool]) -> None:
    """Wait until the function returns true, as long as a job may take."""
    assert wait_until(ready, _TIMEOUT), f"it did not happen within {_TIMEOUT} s"


def classify(
    *args: str | Path, status: int = 0, environment: Mapping[str, str] | None = None
) -> str:
    """Run the command; return its output."""
    return ended(begin(*args, environment=environment), status)


def part_files(output: Path) -> list[Path]:
    """Return the result files."""
    return sorted(output.glob("part-*.parquet"))


def rows(output: Path) -> list[Row]:
    """Return all rows, in the order of the plan."""
    return [row for file in part_files(output) for row in pq.read_table(file).to_pylist()]


def differs(row: Row, session: requests.Session, server: ServerState, topk: int = 5) -> bool:
    """Return whether a row differs from the server's response to the same bytes."""
    headers = {"Content-Type": "application/octet-stream"}
    content = Path(row["path"]).read_bytes()
    response = session.post(server.predictions_url, data=content, headers=headers, timeout=60)
    answer: Any = response.json()
    if not answer["success"]:
        expected = {"error_type": answer["type"], "error_message": answer["message"]}
    else:
        predictions = answer["predictions"][:topk]
        expected = {
            "labels": [one["label"] for one in predictions],
            "class_ids": [one["class_id"] for one in predictions],
            "probabilities": [one["probability"] for one in predictions],
            "recognized": answer["recognized"],
            "error_type": None,
            "error_message": None,
        }
        if "labels" in answer:
            expected["passing"] = [label["label"] for label in answer["labels"]]
    expected["precision"] = response.headers["X-Model-Precision"]
    return {name: row[name] for name in expected} != expected
