"""Whether the container is ready: a worker of each model is, and it was not told to end.

TorchServe's own /ping is Healthy while no worker is ready. Its management API knows more, but goes
on to call a worker READY that ended behind its back, so the worker's process must be there too.

As a command it exits 0 if the first process found it so, for probes that run a program; others ask
/ping. Uses the standard library only.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

_URL = "http://127.0.0.1:{}/models{}"
_SECONDS = 3.0


def folder() -> Path:
    """Where the first process keeps all that it writes."""
    return Path(os.environ.get("TMPDIR", "/tmp")) / "densenet"  # noqa: S108


def note() -> Path:
    """A file that is there while the container is ready."""
    return folder() / "ready"


def main() -> None:
    """Looks once."""
    if not note().exists():
        sys.exit("not ready")


def why_not_ready() -> str | None:
    """None where every model has a worker that is ready."""
    try:
        models = [model["modelName"] for model in _asked("")["models"]]
        without = [model for model in models if not _serves(model)]
    except (OSError, ValueError, LookupError) as error:
        return str(error)
    if without or not models:
        return f"no worker is ready for {', '.join(without)}" if without else "no model is there"
    return None


def _serves(model: str) -> bool:
    workers = _asked(f"/{model}")[0]["workers"]
    return any(worker["status"] == "READY" and _lives(worker["pid"]) for worker in workers)


def _asked(path: str) -> Any:
    url = _URL.format(os.environ.get("MANAGEMENT_PORT", "8081"), path)
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310  # it is http
        return json.load(answer)


def _lives(pid: int) -> bool:
    """Whether a worker's process of that id is there; one that has ended has no command line."""
    try:
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    main()
