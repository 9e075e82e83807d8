"""`ARCH=resnet50`: torchvision's classifiers, with published weights or a file of the user's."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handler.inference.torch_models import empty_model
from handler.settings import Preprocessing
from scripts.build import architectures, export
from scripts.build.checkpoints import read_checkpoint
from scripts.build.classes import IMAGENET_CLASSES, given_classes
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.sources import graph
from scripts.build.sources.download import local_file
from scripts.build.sources.source import TorchSource
from scripts.build.state_dicts import fit, load_into
from scripts.samples import sample_batch
from scripts.store import DEFAULT_ARCHITECTURE

_SEED = 20


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(TorchSource):
    """A classifier of torchvision, which PyTorch can serve as well."""

    def for_pytorch(
        self, preprocessing: Preprocessing, target: Path
    ) -> tuple[str, NDArray[np.float32] | None]:
        """Write the state dict that the PyTorch engine loads.

        Return the node of the last features and the last layer's float32 weights (classes,
        channels); without such a node "" and None.
        """
        name, state_dict = architectures.class_layer(self.architecture), self.module.state_dict()
        if self.outputs == 1:
            # Two outputs from one: the softmax of (0, x) is the sigmoid of x.
            for key in (f"{name}.weight", f"{name}.bias"):
                state_dict[key] = torch.cat([torch.zeros_like(state_dict[key]), state_dict[key]])
        torch.save(state_dict, target)
        features = export.features_node(self.module, self.module.get_submodule(name), preprocessing)
        return features, state_dict[f"{name}.weight"].float().numpy() if features else None


def open_source(spec: ModelFile) -> TorchvisionSource:
    """Return the architecture with its weights; download published ones."""
    name = architectures.check_architecture(spec.arch or "")
    if spec.weights == RANDOM:
        classes = len(given_classes(spec.classes) or range(IMAGENET_CLASSES))
        return random_source(name, classes)
    path = local_file(spec.weights or architectures.official_weights(name).url)
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


def random_source(architecture: str, classes: int = IMAGENET_CLASSES) -> TorchvisionSource:
    """Return an architecture with seeded random weights."""
    module = _random_model(architecture, classes)
    values = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    return TorchvisionSource(
        architecture=architecture,
        file=graph.RANDOM_FILE,
        sha256=graph.digest(values),
        outputs=classes,
        preprocessing=asdict(architectures.official_preprocessing(architecture)),
        trained=False,
        module=module,
    )


def _random_model(architecture: str, classes: int) -> nn.Module:
    """Return an architecture with random weights that are made as `graph.random_source` does."""
    if architecture == DEFAULT_ARCHITECTURE:
        # The same as without PyTorch.
        weights = graph.random_source(architecture, classes).weights
        same: nn.Module = empty_model(architecture, classes)
        same.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
        return same
    generator = torch.Generator().manual_seed(_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
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
    preprocessing = architectures.official_preprocessing(architecture)
    photographs = torch.from_numpy(sample_batch(preprocessing))
    normalized = export.Normalized(model, preprocessing)
    # With random statistics, differences between images drown in rounding.
    _take_statistics(normalized, photographs)
    last = architectures.last_layer(model, architecture)
    if isinstance(last, nn.Linear):
        _spread_logits(normalized, last, photographs)
    return model


@torch.inference_mode()
def _take_statistics(model: nn.Module, photographs: Tensor) -> None:
    """Replace the statistics of batch normalization by those of the photographs."""
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
    """Give each class a mean logit of 0 over the photographs, and all a common spread."""
    if not bool(last.weight.any()):  # vision transformers start with zeros
        generator = torch.Generator().manual_seed(_SEED)
        last.weight.normal_(generator=generator)
    logits = model(photographs)
    centered = logits - logits.mean(dim=0)
    scale = graph.LOGIT_STD / float(centered.std())
    if last.bias is not None:
        last.bias.copy_((last.bias - logits.mean(dim=0)) * scale)
    last.weight.mul_(scale)
