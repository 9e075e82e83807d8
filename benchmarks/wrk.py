"""The closed loop: wrk's clients, of whom each asks again when it has its answer."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from scripts.terminal import UserError


class Body(NamedTuple):
    """What every request carries."""

    data: bytes
    content_type: str = "image/jpeg"


def require_wrk() -> None:
    """`UserError` where it is not installed: before anything is started."""
    if shutil.which("wrk") is None:
        raise UserError("The load is made by wrk, which is not installed (on Debian: wrk).")


def closed_loop(url: str, body: Body, clients: int, seconds: int) -> dict[str, float]:
    """Runs wrk.

    Returns:
        what wrk.lua found: `count` of answers and `failures` in so many `seconds`, and `p50`,
        `p95` and `p99` of the latency in milliseconds.
    """
    with TemporaryDirectory() as folder:
        result = subprocess.run(
            [
                *("wrk", "--threads", "1", "--connections", str(clients)),
                *("--duration", f"{seconds}s", "--timeout", "60s"),
                *("--script", "benchmarks/wrk.lua", url),
            ],
            env=environment(body, Path(folder)),
            capture_output=True,
            text=True,
            check=True,
        )
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    found: dict[str, float] = json.loads(line.removeprefix("RESULT"))
    return found


def environment(body: Body, folder: Path) -> dict[str, str]:
    """How wrk.lua and locustfile.py are told the body, which is written into this folder."""
    (folder / "body").write_bytes(body.data)
    return {
        **os.environ,
        "BENCHMARK_BODY": str(folder / "body"),
        "BENCHMARK_TYPE": body.content_type,
    }
