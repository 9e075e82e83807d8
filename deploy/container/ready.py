"""Whether the container is ready: each model has a worker that is, and no SIGTERM was received.

TorchServe's own /ping is Healthy while no worker is ready. Its management API goes on reporting a
worker as READY after it crashed, so the worker's process is checked too.

As a command it exits 0 if the container is ready, for probes that run a program; others use /ping.
It needs the standard library only.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

# Everything that the container writes.
FOLDER = Path(os.environ.get("TMPDIR", "/tmp")) / "densenet"  # noqa: S108
# Exists while the container is ready.
FILE = FOLDER / "ready"
_SECONDS = 3.0


def why_not_ready(management_port: int) -> str | None:
    """Return the reason; None if each model has a worker that is ready."""
    url = f"http://127.0.0.1:{management_port}/models"
    try:
        models = [model["modelName"] for model in _get(url)["models"]]
        without = [model for model in models if not _has_worker(_get(f"{url}/{model}"))]
    except (OSError, ValueError, LookupError) as error:
        return str(error)
    if without or not models:
        return f"no worker is ready for {', '.join(without)}" if without else "there is no model"
    return None


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310  # it is http
        return json.load(answer)


def _has_worker(versions: Any) -> bool:
    workers = versions[0]["workers"]
    return any(worker["status"] == "READY" and _runs(worker["pid"]) for worker in workers)


def _runs(pid: int) -> bool:
    """Return whether that is a worker; one that exited has no command line."""
    try:
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(0 if FILE.exists() else "not ready")
