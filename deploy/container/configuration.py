"""Writes what TorchServe and nginx are started with."""

import os
from pathlib import Path

from deploy.container.limits import QUEUE, Limits
from deploy.container.serving import HERE, Serving
from handler.settings import MAX_REQUEST_BYTES

# Where TorchServe listens, for nginx alone.
TORCHSERVE_PORT = 8085
# Seconds: more than a full batch of the most costly pictures takes.
LONGEST_ANSWER = 20


def write_torchserve(serving: Serving, limits: Limits, folder: Path) -> Path:
    """Writes TorchServe's configuration into the folder; its path."""
    base = (HERE / "config.properties").read_text()
    decided = {
        "inference_address": f"http://127.0.0.1:{TORCHSERVE_PORT}",
        "model_store": str(serving.model_store),
        "load_models": ",".join(archive.name for archive in serving.archives),
        "default_workers_per_model": str(limits.workers),
        "job_queue_size": str(QUEUE),
        "vmargs": f"{value_of('vmargs', base)} {limits.vmargs()}",
        **serving.properties,
    }
    path = folder / "config.properties"
    # The last line of a key counts.
    path.write_text(base + "".join(f"{key}={value}\n" for key, value in decided.items()))
    return path


def value_of(key: str, properties: str) -> str:
    """A key's value in the text of a configuration; the last line of a key counts."""
    lines = [line for line in properties.splitlines() if line.startswith(f"{key}=")]
    return lines[-1].split("=", 1)[1]


def write_nginx(serving: Serving, limits: Limits, folder: Path, ready: Path) -> Path:
    """Writes nginx's configuration into the folder; its path.

    Args:
        serving: what is served, and where.
        limits: how many requests at once.
        folder: for nginx's own files too.
        ready: a file that is there while the container is ready.
    """
    values = {
        # Started by root, nginx would change to a user who cannot write here.
        "USER": "user root;" if os.geteuid() == 0 else "",
        "FOLDER": str(folder),
        "READY": str(ready),
        "PORT": str(serving.port),
        "TORCHSERVE_PORT": str(TORCHSERVE_PORT),
        "LONGEST_ANSWER": str(LONGEST_ANSWER),
        "REQUESTS": str(limits.requests),
        "LARGE": str(limits.large),
        "MAX_REQUEST_BYTES": str(MAX_REQUEST_BYTES),
        "MAX_REQUEST_MB": str(MAX_REQUEST_BYTES >> 20),
    }
    text = (HERE / "nginx.conf").read_text().replace("@LOCATIONS@", serving.locations)
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    path = folder / "nginx.conf"
    path.write_text(text)
    return path
