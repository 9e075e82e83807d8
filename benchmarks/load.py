"""The load generator: wrk in a closed loop, in which each client waits for its response."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from scripts.terminal import UserError


@dataclass(frozen=True)
class Body:
    """The body of every request."""

    data: bytes
    content_type: str = "image/jpeg"


@dataclass(frozen=True)
class Load:
    """The measurements of wrk.

    Attributes:
        answered: responses of status 200 to 399.
        failed: other responses, lost connections and timeouts.
        seconds: duration.
        p50, p95, p99: latency in ms of all responses, rejections included.
    """

    answered: int
    failed: int
    seconds: float
    p50: float
    p95: float
    p99: float

    @property
    def rate(self) -> float:
        """Successful responses per second."""
        return self.answered / self.seconds


def require_wrk() -> None:
    """Raise `UserError` if wrk is not installed, before anything is started."""
    if shutil.which("wrk") is None:
        raise UserError("The load generator wrk is not installed (Debian package: wrk).")


def closed_loop(url: str, body: Body, clients: int, seconds: int) -> Load:
    """Send `body` from `clients` connections for `seconds`."""
    with NamedTemporaryFile() as file:
        Path(file.name).write_bytes(body.data)
        result = subprocess.run(
            [
                *("wrk", "--threads", "1", "--connections", str(clients)),
                *("--duration", f"{seconds}s", "--timeout", "60s"),
                *("--script", "benchmarks/wrk.lua", url),
            ],
            env=os.environ | {"BENCHMARK_BODY": file.name, "BENCHMARK_TYPE": body.content_type},
            capture_output=True,
            text=True,
            check=True,
        )
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    return Load(**json.loads(line.removeprefix("RESULT")))
