"""Fetches weights from the Hugging Face hub: a pinned revision, and safetensors only."""

import hashlib
import os
import re
from pathlib import Path

import requests

from scripts.store import sha256
from scripts.terminal import UserError, step

# The variable that Hugging Face's own programs have for a mirror.
_ENDPOINT = "HF_ENDPOINT"
_HUB = "https://huggingface.co"
_FILE = "model.safetensors"

# A model of more cannot be packed into one file of ONNX.
_MOST_BYTES = 2**31

# Seconds without a byte.
TIMEOUT = 30.0

_REVISION = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_revision(revision: str | None, repository: str) -> str:
    """The revision; raises `UserError` unless it is a whole commit, which never changes."""
    if revision is None or _REVISION.fullmatch(revision) is None:
        raise UserError(
            f"Weights are fetched at a fixed revision only: REVISION=... is a commit, 40 digits, "
            f"as {_HUB}/{repository}/commits/main lists them. Or give a file: WEIGHTS=path"
        )
    return revision


def fetch(repository: str, revision: str, folder: Path) -> Path:
    """Downloads a model's weights, unless a sound copy is there.

    Args:
        repository: as in "timm/resnet50.a1_in1k".
        revision: a commit, 40 digits.
        folder: where to keep them.

    Returns:
        the file, whose SHA-256 is the one that the hub keeps for it.

    Raises:
        UserError: with the reason and what to do.
    """
    kept = f"{repository.replace('/', '--')}-{revision}"
    for path in folder.glob(f"{kept}-*.safetensors"):
        if path.stem.endswith(sha256(path)):
            step(f"Weights: using {path}")
            return path
        step(f"Weights: {path} is damaged; fetching it again")
        path.unlink()
    url = f"{os.environ.get(_ENDPOINT) or _HUB}/{repository}/resolve/{revision}/{_FILE}"
    step(f"Weights: fetching {url}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{kept}.{os.getpid()}.partial"
    try:
        digest = _download(url, partial)
        return partial.replace(folder / f"{kept}-{digest}.safetensors")
    except requests.RequestException as error:
        raise UserError(
            f"The Hugging Face hub cannot be reached, or the connection was lost "
            f"({type(error).__name__}): {url}. Run the same command again, name a mirror with "
            f"{_ENDPOINT}, or give a file of your own with WEIGHTS=path."
        ) from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _download(url: str, target: Path) -> str:
    """Returns the SHA-256."""
    with requests.get(url, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code != requests.codes.ok:
            raise UserError(
                f"The Hugging Face hub answered {answer.status_code} for {url}. Is there such a "
                "model, with safetensors, at this revision?"
            )
        expected = _promised(answer)
        digest, size = hashlib.sha256(), 0
        with target.open("wb") as file:
            for part in answer.iter_content(1 << 20):
                size += len(part)
                if size > _MOST_BYTES:
                    raise UserError(f"{url} is larger than {_MOST_BYTES / 1e9:.0f} GB.")
                digest.update(part)
                file.write(part)
    if digest.hexdigest() != expected:
        raise UserError(
            f"What arrived is not the expected file: its SHA-256 is {digest.hexdigest()[:8]}..., "
            f"the hub keeps {expected[:8]}... It was cut off or altered on the way, and was thrown "
            "away. Run the same command again."
        )
    return expected


def _promised(answer: requests.Response) -> str:
    """The SHA-256 that the hub keeps of a large file; it sends it with the redirect to the file."""
    for one in (*answer.history, answer):
        for name in ("X-Linked-Etag", "ETag"):
            value = one.headers.get(name, "").strip('W/"')
            if _SHA256.fullmatch(value):
                return value
    raise UserError(f"{answer.url} does not say the file's SHA-256, so that it cannot be checked.")
