"""Download weights: torchvision's to torch's own cache, and timm's from the Hugging Face hub.

A file is used only if its SHA-256 is the one in its name, or the one that the hub keeps.
"""

import re
import socket
import urllib.error
from pathlib import Path
from urllib.parse import urlsplit

import torch

from scripts.build.sources.source import DownloadError, HostUnreachableError
from scripts.store import sha256
from scripts.terminal import UserError, step

# Seconds without a byte from the host.
NETWORK_TIMEOUT = 30.0

_HUB = "https://huggingface.co"
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cached_file(url: str) -> Path:
    """Return the path that `fetch` downloads to, whether or not the file exists."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def fetch(url: str) -> Path:
    """Download a file of weights into torch's cache, unless a sound copy is there.

    Args:
        url: its last part must be `NAME-DIGITS.pth`, the digits beginning the file's SHA-256.

    Returns:
        the verified file. A file that fails verification is removed, never returned.
    """
    target = cached_file(url)
    match = torch.hub.HASH_REGEX.search(target.name)
    if match is None:
        raise UserError(
            f"{target.name!r} does not carry its SHA-256. The name must be like "
            "densenet121-a639ec97.pth."
        )
    digits: str = match.group(1)
    if target.exists():
        if sha256(target).startswith(digits):
            step(f"Weights: using {target}")
            return target
        step(f"Weights: {target} is damaged; fetching it again")
        target.unlink()
    step(f"Weights: fetching {url}")
    _download(url, target, digits)
    return target


def _download(url: str, target: Path, digits: str) -> None:
    """Download to a temporary file, verify it, and only then give it its name."""
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=digits, progress=True)
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
    except OSError as error:
        raise UserError(
            f"The weights cannot be written to {target.parent}: {error.strerror or error}. "
            "Free some space or set TORCH_HOME to another folder, then run the same command again."
        ) from error
    except RuntimeError as error:  # torch.hub: the hash does not fit
        raise DownloadError(
            f"What arrived is not the expected file: {error}. It was cut off or altered on the "
            "way, and was thrown away. Run the same command again."
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def fetch_from_hub(repository: str, revision: str | None) -> Path:
    """Download `model.safetensors` of a repository on the Hugging Face hub into the hub's cache.

    Args:
        repository: as in "timm/resnet50.a1_in1k".
        revision: a whole commit, which never changes; 40 digits.

    Returns:
        the file, whose SHA-256 is the one that the hub keeps for it.
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
    if not _SHA256.fullmatch(blob.name) or digest != blob.name:
        blob.unlink()
        raise DownloadError(
            f"What arrived is not the expected file: its SHA-256 is {digest[:8]}..., the hub keeps "
            f"{blob.name[:8]}... It was thrown away. Run the same command again."
        )
    return path
