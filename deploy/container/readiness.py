"""Check readiness: each model has a worker that is ready and runs.

TorchServe's own /ping is Healthy while no worker is ready. Its management API still reports a
worker as READY after it crashed, so the worker's process is checked too.
"""

import json
import urllib.request
from pathlib import Path
from typing import Any

_SECONDS = 3.0


def why_not_ready(management_port: int) -> str | None:
    """Return why the container is not ready; None if each model has a ready worker."""
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
    # Do not use the environment's proxies for this container's own port.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=_SECONDS) as answer:
        return json.load(answer)


def _has_worker(versions: Any) -> bool:
    workers = versions[0]["workers"]
    return any(worker["status"] == "READY" and _is_worker(worker["pid"]) for worker in workers)


def _is_worker(pid: int) -> bool:
    """Return whether a process is a running worker; a zombie has no command line."""
    try:
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
