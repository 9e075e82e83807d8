"""`ARCH=resnet50`: torchvision's classifiers, with published weights or a file of the user's."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from handler.inference.torch_models import empty_model
from handler.settings import Preprocessing
from scripts.build import architectures, export
from scripts.build.checkpoints import read_checkpoint
from scripts.build.classes import IMAGENET_CLASSES, read_classes
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.sources import graph, random_weights
from scripts.build.sources.download import local_file
from scripts.build.sources.source import TorchSource
from scripts.build.state_dicts import fit, load_into


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(TorchSource):
    """A classifier of torchvision, which PyTorch can serve as well."""

    def for_pytorch(
        self, preprocessing: Preprocessing, target: Path
    ) -> tuple[str, NDArray[np.float32] | None]:
        """Write the state dict that the PyTorch engine loads.

        Returns:
            the node of the last features, empty without any, and the last layer's float32 weights
            (classes, channels) then.
        """
        last = architectures.last_layer(self.module, self.architecture)
        state_dict = self.module.state_dict()
        if self.outputs == 1:
            # Two outputs from one: the softmax of (0, x) is the sigmoid of x.
            name = architectures.class_layer(self.architecture).removesuffix(".weight")
            for key in (f"{name}.weight", f"{name}.bias"):
                state_dict[key] = torch.cat([torch.zeros_like(state_dict[key]), state_dict[key]])
        torch.save(state_dict, target)
        features = export.features_node(self.module, last, preprocessing)
        weights = state_dict[architectures.class_layer(self.architecture)].float().numpy()
        return features, weights if features else None


def open_source(spec: ModelFile) -> TorchvisionSource:
    """Return the architecture with its weights; download published ones.

    Raises:
        HostUnreachableError: only the network is missing.
    """
    name = architectures.check_architecture(spec.arch or "")
    if spec.weights == RANDOM:
        classes = len(read_classes(spec.classes)) if spec.classes else IMAGENET_CLASSES
        return random_source(name, classes)
    path = local_file(spec.weights or official_url(name))
    checkpoint = read_checkpoint(path)
    fitted = fit(checkpoint, architectures.template(name), spec.weights_key)
    module = load_into(empty_model(name, fitted.classes), fitted)
    return TorchvisionSource(
        architecture=name,
        file=path.name,
        sha256=checkpoint.sha256,
        outputs=fitted.classes,
        preprocessing=asdict(architectures.official_preprocessing(name)),
        module=module,
    )


def official_url(architecture: str) -> str:
    """Return the URL of torchvision's ImageNet weights for an architecture."""
    url: str = architectures.official_weights(architecture).url
    return url


def random_source(architecture: str, classes: int = IMAGENET_CLASSES) -> TorchvisionSource:
    """Return an architecture with seeded random weights."""
    module = random_weights.random_model(architecture, classes)
    return TorchvisionSource(
        architecture=architecture,
        file=graph.RANDOM_FILE,
        sha256=random_weights.digest(module),
        outputs=classes,
        preprocessing=asdict(architectures.official_preprocessing(architecture)),
        trained=False,
        module=module,
    )
