"""Download weights: torchvision's to PyTorch's own cache, and timm's from the Hugging Face hub.

A file is used only if its checksum (SHA-256) is the one in its name, or the one that the hub keeps.
"""

import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from rich import progress

from scripts.build.sources.source import DownloadError, HostUnreachableError
from scripts.store import sha256
from scripts.terminal import UserError, console, step

# Seconds without a byte from the host.
NETWORK_TIMEOUT = 30.0

_HUB = "https://huggingface.co"
_REVISION = re.compile(r"[0-9a-f]{40}")
# In names such as densenet121-a639ec97.pth.
_DIGITS = re.compile(r"-([a-f0-9]{8,64})\.")


def local_file(weights: str) -> Path:
    """Return a file of weights, which is fetched if `weights` is its address."""
    return fetch(weights) if re.match("https?://", weights) else Path(weights)


def fetch(url: str) -> Path:
    """Download a file of weights into PyTorch's cache, unless a sound copy is there.

    The name must be like `NAME-DIGITS.pth`, the digits beginning the file's SHA-256. A file that
    fails this verification is removed, never returned.
    """
    # As torch.hub has it.
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser()
    target = home / "hub" / "checkpoints" / Path(urlsplit(url).path).name
    match = _DIGITS.search(target.name)
    if match is None:
        raise UserError(
            f"{target.name!r} does not carry its SHA-256. The name must be like "
            "densenet121-a639ec97.pth."
        )
    if target.exists():
        if sha256(target).startswith(match[1]):
            step(f"Weights: using {target}")
            return target
        step(f"Weights: {target} is damaged; fetching it again")
        target.unlink()
    step(f"Weights: fetching {url}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that a file with the final name is always whole.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            file = Path(folder, target.name)
            _download(url, file)
            digest = sha256(file)
            if not digest.startswith(match[1]):
                raise DownloadError(
                    f"What arrived is not the expected file: its SHA-256 begins with {digest[:8]}, "
                    f"not {match[1][:8]}. It was cut off or altered on the way, and was thrown "
                    "away. Run the same command again."
                )
            file.replace(target)
    except OSError as error:
        raise UserError(
            f"The weights cannot be written to {target.parent}: {error.strerror or error}. "
            "Free some space or set TORCH_HOME to another folder, then run the same command again."
        ) from error
    return target


def _download(url: str, target: Path) -> None:
    """Write what the host sends to a file; raise `DownloadError` or, for the file, `OSError`."""
    try:
        with (
            urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT) as response,
            target.open("wb") as file,
            progress.wrap_file(
                response,
                int(response.headers.get("Content-Length", 0)),
                description="Fetching",
                console=console,
                transient=True,
            ) as shown,
        ):
            shutil.copyfileobj(shown, file)
    except urllib.error.HTTPError as error:
        raise DownloadError(
            f"The weights' host answered {error.code} {error.reason} for {url}. Check the address, "
            "or give a file of your own with WEIGHTS=path."
        ) from error
    except urllib.error.URLError as error:
        raise HostUnreachableError(
            f"The weights' host cannot be reached ({error.reason}): {url}. Check the network, "
            "give a file of your own with WEIGHTS=path, or take ARCH=efficientnet_lite0: its "
            "trained weights are a Python package."
        ) from error
    except (TimeoutError, ConnectionError) as error:
        raise DownloadError(
            f"The connection to the weights' host was lost ({error}). Run the same command again."
        ) from error


def fetch_from_hub(repository: str, revision: str | None) -> Path:
    """Download `model.safetensors` of a repository on the Hugging Face hub into the hub's cache.

    Its SHA-256 is the one that the hub keeps for it. The revision must be a whole commit, which
    never changes.
    """
    from huggingface_hub import errors, hf_hub_download  # of timm's group

    if revision is None or _REVISION.fullmatch(revision) is None:
        raise UserError(
            "Weights are fetched at a fixed revision only: revision: in a model file is a commit, "
            f"40 digits, as {_HUB}/{repository}/commits/main lists them. Or give a file: "
            "WEIGHTS=path"
        )
    step(f"Weights: {repository} at {revision[:8]}, from the Hugging Face hub or its cache")
    try:
        path = Path(hf_hub_download(repository, "model.safetensors", revision=revision))
    except (
        errors.RemoteEntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        raise UserError(
            f"The Hugging Face hub has no model.safetensors of {repository} at {revision}."
        ) from error
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise HostUnreachableError(
            f"The Hugging Face hub cannot be reached, or the connection was lost "
            f"({type(error).__name__}): {repository}. Run the same command again, name a mirror "
            "with HF_ENDPOINT, or give a file of your own with WEIGHTS=path."
        ) from error
    # The cache names a large file by the SHA-256 that the hub keeps of it.
    blob = path.resolve()
    digest = sha256(blob)
    if digest != blob.name:
        blob.unlink()
        raise DownloadError(
            f"What arrived is not the expected file: its SHA-256 is {digest[:8]}..., the hub keeps "
            f"{blob.name[:8]}... It was thrown away. Run the same command again."
        )
    return path
