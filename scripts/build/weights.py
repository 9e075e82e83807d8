"""Gets a classifier's weights: torchvision's, a file of the user's, or seeded random numbers.

torchvision's file goes to the cache that torch users already have, and is used only after its
SHA-256 was compared with the digits that its name carries. No file can run code: see
`scripts.build.weight_files`.
"""

import hashlib
import re
import socket
import textwrap
import time
import urllib.error
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import torch
import typer
from rich.status import Status
from torch import Tensor, nn

from handler.torch_models import empty_model
from scripts.build import architectures, heads
from scripts.build.architectures import (
    check_architecture,
    class_layer,
    last_layer,
    official_preprocessing,
    official_weights,
    without_auxiliary,
)
from scripts.build.class_names import IMAGENET_CLASSES
from scripts.build.export import Normalized
from scripts.build.weight_files import layer_versions, read_state_dict, set_layer_versions
from scripts.samples import sample_batch
from scripts.store import DEFAULT_ARCHITECTURE, sha256
from scripts.terminal import UserError, command, console, step

# Of layers that do not fit.
_SHOWN_MISMATCHES = 3

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


class DownloadError(UserError):
    """A file of weights could not be fetched, or what arrived is not that file."""


class HostUnreachableError(DownloadError):
    """The weights' host did not answer at all."""


@dataclass(frozen=True)
class Weights:
    """Weights ready to be put into a model.

    Attributes:
        state_dict: parameter name in torchvision's present naming to tensor.
        file: name of the file they came from.
        sha256: of that file's bytes, or of the random weights' values.
        trained: false for random numbers.
        architecture: name in torchvision's classification registry.
        classes: how many the model tells apart.
        head: see `handler.torch_models.empty_model`; empty for the architecture's own.
    """

    state_dict: dict[str, Tensor]
    file: str
    sha256: str
    trained: bool
    architecture: str = DEFAULT_ARCHITECTURE
    classes: int = IMAGENET_CLASSES
    head: str = ""

    @property
    def last_layer(self) -> str:
        """The name of the weight that has a row a class."""
        return heads.last_linear(self.head) if self.head else class_layer(self.architecture)


def obtain(
    path: Path | None = None,
    url: str | None = None,
    architecture: str = DEFAULT_ARCHITECTURE,
    head: str | None = None,
) -> Weights:
    """The user's file where `path` is given, else torchvision's, fetched if it is not there yet.

    Args:
        path: the user's file.
        url: where to fetch torchvision's instead.
        architecture: the one that the weights were trained with.
        head: see `load`.

    Raises:
        UserError: with the reason and what to do; `HostUnreachableError` where only the network
            is missing.
    """
    check_architecture(architecture)
    found = path if path is not None else fetch(url or official_url(architecture))
    return load(found, architecture, head)


def official_url(architecture: str = DEFAULT_ARCHITECTURE) -> str:
    """Where torchvision keeps its ImageNet weights."""
    url: str = official_weights(architecture).url
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


def load(path: Path, architecture: str = DEFAULT_ARCHITECTURE, head: str | None = None) -> Weights:
    """Reads a file of weights made for an architecture, with as many classes as it has.

    Args:
        path: in any of the forms of `read_state_dict`.
        architecture: the one that the weights were trained with.
        head: the layers of a head of one's own, with commas between; None for what can be seen.

    Raises:
        UserError: the file is missing, no weights, would run code, or is for another architecture.
    """
    found, digest = read_state_dict(path)
    state_dict = _named_as_now(found, architecture)
    heads.check_channels(state_dict, architecture, path.name)
    built = ""
    # A head of one's own can have the sizes of the architecture's, with other activations.
    if head is not None or not architectures.fits(state_dict, architecture):
        recognised = heads.recognise(state_dict, architecture, head, path.name)
        if recognised is not None:
            state_dict, built = recognised.state_dict, recognised.head
    classes = _count_classes(state_dict, architecture, built, path.name)
    model = empty_model(architecture, classes, built)
    # Files of other formats than torch's have none; those of the whole model decide.
    versions = layer_versions(found) or {"": (layer_versions(model.state_dict()) or {})[""]}
    set_layer_versions(state_dict, versions)
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path.name} does not fit {architecture} with {classes} classes: "
            f"{first_mismatches(error)}.{_suggestion(state_dict, architecture)}"
        ) from error
    check_finite(model, path.name)
    return Weights(
        model.state_dict(),
        path.name,
        digest,
        trained=True,
        architecture=architecture,
        classes=classes,
        head=built,
    )


def _named_as_now(found: Mapping[str, Tensor], architecture: str) -> "OrderedDict[str, Tensor]":
    kept = without_auxiliary(architecture, found)
    return OrderedDict((_OLD_KEY.sub(r"\1\2", key), found[key]) for key in kept)


def _count_classes(
    state_dict: Mapping[str, Tensor], architecture: str, head: str, name: str
) -> int:
    """As many as the last layer has outputs."""
    layer = heads.last_linear(head) if head else class_layer(architecture)
    if layer not in state_dict or state_dict[layer].dim() == 0:
        raise UserError(
            f"{name} does not fit {architecture}: it has no {layer}."
            f"{_suggestion(state_dict, architecture)}"
        )
    return int(state_dict[layer].shape[0])


def first_mismatches(error: Exception) -> str:
    """What torch names: keys that are missing, not expected, or of another shape, a line each."""
    lines = [" ".join(line.split()).rstrip(". ") for line in str(error).splitlines()]
    lines = lines[1:] or lines
    shown = "; ".join(textwrap.shorten(line, 300) for line in lines[:_SHOWN_MISMATCHES])
    more = len(lines) - _SHOWN_MISMATCHES
    return f"{shown}; and {more} more" if more > 0 else shown


def check_finite(model: nn.Module, file: str) -> None:
    """Raises `UserError` where one of the model's numbers, read from `file`, is not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: {name} holds values that are not finite.")


def _suggestion(state_dict: Mapping[str, Tensor], architecture: str) -> str:
    with Status("Comparing with torchvision's other architectures ...", console=console):
        other = architectures.guess(state_dict)
        alike = heads.similar(state_dict) if other is None else None
    if alike is not None:
        return f" All but its head is {alike}'s: ARCH={alike}"
    if other is None:
        return " It is no classifier of torchvision's."
    return f" Its layers are those of {other}: ARCH={other}" if other != architecture else ""


def build_model(weights: Weights) -> nn.Module:
    """The architecture with these weights, in evaluation mode, on the CPU."""
    model: nn.Module = empty_model(weights.architecture, weights.classes, weights.head)
    model.load_state_dict(weights.state_dict)
    return model


def with_two_outputs(weights: Weights) -> Weights:
    """A model of one output made one of two classes: the second has what a sigmoid gives."""
    widened = heads.widened(weights.state_dict, weights.last_layer)
    head = weights.head and weights.head.rpartition(":")[0] + ":2"
    return replace(weights, state_dict=widened, classes=2, head=head)


def untrained(architecture: str = DEFAULT_ARCHITECTURE, classes: int = IMAGENET_CLASSES) -> Weights:
    """Seeded random weights, for trying everything but the answers.

    A freshly initialised network answers nearly the same for every picture. So the batch
    normalisation statistics are random too, and the last layer is centred and scaled on real
    photographs: then answers differ from picture to picture, as trained ones do.
    """
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        model: nn.Module = empty_model(architecture, classes)
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
    preprocessing = official_preprocessing(architecture)
    photographs = torch.from_numpy(sample_batch(preprocessing))
    normalized = Normalized(model, preprocessing)
    if architecture != DEFAULT_ARCHITECTURE:
        # DenseNet keeps pictures apart with random statistics; what others do drowns in rounding.
        _take_statistics(normalized, photographs)
    last = last_layer(model, architecture)
    if isinstance(last, nn.Linear):
        _spread_logits(normalized, last, photographs)
    state_dict = model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return Weights(
        state_dict,
        UNTRAINED_FILE,
        digest.hexdigest(),
        trained=False,
        architecture=architecture,
        classes=classes,
    )


@torch.inference_mode()
def _take_statistics(model: nn.Module, photographs: Tensor) -> None:
    """Replaces the batch normalisations' statistics by those of the photographs."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    model(photographs)
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
        layer.eval()


@torch.inference_mode()
def _spread_logits(model: nn.Module, last: nn.Linear, photographs: Tensor) -> None:
    """Gives each class a mean logit of 0 over the photographs, and all a common spread."""
    if not bool(last.weight.any()):  # as vision transformers begin
        generator = torch.Generator().manual_seed(UNTRAINED_SEED)
        last.weight.normal_(generator=generator)
    logits = model(photographs)
    centred = logits - logits.mean(dim=0)
    scale = UNTRAINED_LOGIT_STD / float(centred.std())
    if last.bias is not None:
        last.bias.copy_((last.bias - logits.mean(dim=0)) * scale)
    last.weight.mul_(scale)


def main(
    weights: Annotated[Path | None, typer.Option(help="A file of your own to check.")] = None,
    weights_url: Annotated[
        str | None, typer.Option("--url", help="A mirror of torchvision's file.")
    ] = None,
    arch: Annotated[str, typer.Option(help="torchvision's name.")] = DEFAULT_ARCHITECTURE,
) -> None:
    """Fetches torchvision's weights into torch's cache, or checks a file."""
    found = obtain(weights, weights_url, arch)
    console.print(f"{found.file}: SHA-256 {found.sha256}, fits {arch} with {found.classes} classes")


if __name__ == "__main__":
    command(main)
