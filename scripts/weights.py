"""Gets the DenseNet-121 weights: torchvision's, a file of the user's, or seeded random numbers.

torchvision's file goes to the cache that torch users already have, and is used only after its
SHA-256 was compared with the digits that its name carries. Files are loaded with
`weights_only=True`, so that they cannot run code.
"""

import hashlib
import io
import re
import socket
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import torch
import typer
from torch import Tensor, nn
from torchvision.models import DenseNet121_Weights, get_model

from handler.settings import Preprocessing
from scripts.export import Normalized
from scripts.photographs import sample_batch
from scripts.terminal import UserError, command, console, step

ARCHITECTURE = "densenet121"
CLASSES = 1000

UNTRAINED_SEED = 20
UNTRAINED_FILE = "seeded random numbers"
# Spread of the random weights' logits, so that their answers differ from picture to picture.
UNTRAINED_LOGIT_STD = 2.5

# A silent host is given up after this many seconds.
NETWORK_TIMEOUT = 30.0

# Part of a file that another, killed process left behind.
_STALE_PARTIAL_SECONDS = 3600.0

# torchvision's files were written before module names could not hold dots: `norm.1` is `norm1`.
_OLD_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


class HostUnreachableError(UserError):
    """The weights' host did not answer at all."""


@dataclass(frozen=True)
class Weights:
    """Weights ready to be put into a model.

    Attributes:
        state_dict: parameter name in torchvision's present naming to tensor.
        file: name of the file they came from.
        sha256: of that file's bytes, or of the random weights' values.
        trained: false for random numbers.
    """

    state_dict: dict[str, Tensor]
    file: str
    sha256: str
    trained: bool


def obtain(path: Path | None = None, url: str | None = None) -> Weights:
    """The user's file where `path` is given, else torchvision's, fetched if it is not there yet.

    Raises:
        UserError: with the reason and what to do; `HostUnreachableError` where only the network
            is missing.
    """
    return load(path if path is not None else fetch(url or official_url()))


def official_url() -> str:
    """Where torchvision keeps its ImageNet weights."""
    url: str = DenseNet121_Weights.IMAGENET1K_V1.url
    return url


def cached_file(url: str) -> Path:
    """Where `fetch` puts the file, whether or not it is there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def fetch(url: str) -> Path:
    """Downloads a file of weights into torch's cache, unless a sound copy is there.

    Args:
        url: its last part must be `NAME-DIGITS.pth`, the digits beginning the file's SHA-256.

    Returns:
        the verified file. A file that fails verification is removed, never returned.
    """
    target = cached_file(url)
    digits = _digits_in_name(target.name)
    if target.exists():
        if sha256(target).startswith(digits):
            step(f"Weights: using {target}")
            return target
        step(f"Weights: {target} is damaged; fetching it again")
        target.unlink()
    step(f"Weights: fetching {url}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_partials(target)
    _download(url, target, digits)
    return target


def _download(url: str, target: Path, digits: str) -> None:
    """Downloads beside `target`, verifies, and only then gives the file its name."""
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=digits, progress=True)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"The weights' host answered {error.code} {error.reason} for {url}. Check the address, "
            "or give a file of your own with WEIGHTS=path."
        ) from error
    except urllib.error.URLError as error:
        raise HostUnreachableError(
            f"The weights' host cannot be reached ({error.reason}): {url}. Check the network, "
            "or give a file of your own with WEIGHTS=path."
        ) from error
    except (TimeoutError, ConnectionError) as error:
        raise UserError(
            f"The connection to the weights' host was lost ({error}). Run the same command again."
        ) from error
    except OSError as error:
        raise UserError(
            f"The weights cannot be written to {target.parent}: {error.strerror or error}. "
            "Free some space or set TORCH_HOME to another folder, then run the same command again."
        ) from error
    except RuntimeError as error:  # torch.hub: the hash does not fit
        raise UserError(
            f"What arrived is not the expected file: {error}. It was cut off or altered on the "
            "way, and was thrown away. Run the same command again."
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def _digits_in_name(name: str) -> str:
    match = torch.hub.HASH_REGEX.search(name)
    if match is None:
        raise UserError(
            f"{name!r} does not carry its SHA-256. The name must be like densenet121-a639ec97.pth."
        )
    digits: str = match.group(1)
    return digits


def _remove_stale_partials(target: Path) -> None:
    for partial in target.parent.glob(f"{target.name}.*.partial"):
        if time.time() - partial.stat().st_mtime > _STALE_PARTIAL_SECONDS:
            partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> Weights:
    """Reads a file of weights made for DenseNet-121 with 1,000 classes.

    Raises:
        UserError: the file is missing, no weights, would run code, or is for another model.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The weights {path} cannot be read: {error.strerror}.") from error
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds for a foreign file
        raise UserError(
            f"{path} is not a file of PyTorch weights, is cut off, or holds more than weights."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} does not hold a state dict, a mapping of names to tensors.")
    state_dict = {_present_key(key): value for key, value in loaded.items()}
    weights = Weights(state_dict, path.name, hashlib.sha256(content).hexdigest(), trained=True)
    build_model(weights)
    return weights


def _present_key(key: str) -> str:
    return _OLD_KEY.sub(r"\1\2", key)


def build_model(weights: Weights) -> nn.Module:
    """DenseNet-121 with these weights, in evaluation mode, on the CPU."""
    model: nn.Module = get_model(ARCHITECTURE, weights=None, num_classes=CLASSES)
    try:
        model.load_state_dict(weights.state_dict)
    except RuntimeError as error:
        first_lines = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise UserError(
            f"{weights.file} does not fit DenseNet-121 with {CLASSES} classes: {first_lines[:300]}"
        ) from error
    return model.eval()


def untrained() -> Weights:
    """Seeded random weights, for trying everything but the answers.

    A freshly initialised DenseNet answers nearly the same for every picture. So the batch
    normalisation statistics are random too, and the last layer is centred and scaled on real
    photographs: then answers differ from picture to picture, as trained ones do.
    """
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        model: nn.Module = get_model(ARCHITECTURE, weights=None, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    _spread_logits(model.eval())
    state_dict = model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return Weights(state_dict, UNTRAINED_FILE, digest.hexdigest(), trained=False)


@torch.inference_mode()
def _spread_logits(model: nn.Module) -> None:
    """Gives each class a mean logit of 0 over the sample photographs, and all a common spread."""
    preprocessing = Preprocessing()
    logits = Normalized(model, preprocessing)(torch.from_numpy(sample_batch(preprocessing)))
    centred = logits - logits.mean(dim=0)
    scale = UNTRAINED_LOGIT_STD / float(centred.std())
    classifier = model.classifier
    assert isinstance(classifier, nn.Linear)
    classifier.bias.copy_((classifier.bias - logits.mean(dim=0)) * scale)
    classifier.weight.mul_(scale)


def main(
    weights: Annotated[Path | None, typer.Option(help="A file of your own to check.")] = None,
    url: Annotated[str | None, typer.Option(help="A mirror of torchvision's file.")] = None,
) -> None:
    """Fetches torchvision's DenseNet-121 weights into torch's cache, or checks a file."""
    found = obtain(weights, url)
    console.print(f"{found.file}: SHA-256 {found.sha256}, fits DenseNet-121")


if __name__ == "__main__":
    command(main)
