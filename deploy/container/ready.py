"""Exits 0 if a worker is ready, for probes; TorchServe's own /ping is Healthy while none is.

Uses the standard library only, and asks the management API, which nobody outside the container
can reach. That one goes on to call a worker READY that ended behind its back, so the worker's
process must be there too.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path

_URL = "http://127.0.0.1:{}/models/densenet121"
_SECONDS = 3.0


def main() -> None:
    """Asks once."""
    url = _URL.format(os.environ.get("MANAGEMENT_PORT", "8081"))
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310  # it is http
            workers = json.load(answer)[0]["workers"]
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"not ready: {error}")
    if not any(worker["status"] == "READY" and _lives(worker["pid"]) for worker in workers):
        sys.exit("not ready: no worker is")


def _lives(pid: int) -> bool:
    """Whether a worker's process of that id is there; one that has ended has no command line."""
    try:
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    main()
