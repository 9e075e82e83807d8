"""A file of weights as torchvision publishes it."""

import hashlib
import re
from pathlib import Path

import torch

from scripts.build.sources.torchvision import TorchvisionSource


def publish(densenet: TorchvisionSource, folder: Path) -> Path:
    """Write DenseNet-121's weights with torchvision's old key names, and with digits of the
    file's SHA-256 in its name.
    """
    old_names = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", key): tensor
        for key, tensor in densenet.module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old_names
    path = folder / "weights.pth"
    torch.save(old_names, path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"densenet121-{digits}.pth"))
