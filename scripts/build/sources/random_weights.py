"""Seeded random weights, to try the service without trained ones."""

import hashlib

import torch
from torch import Tensor, nn

from handler.inference.torch_models import empty_model
from scripts.build.architectures import last_layer, official_preprocessing
from scripts.build.export import Normalized
from scripts.build.sources import graph
from scripts.samples import sample_batch
from scripts.store import DEFAULT_ARCHITECTURE

SEED = 20


def random_model(architecture: str, classes: int) -> nn.Module:
    """Return a torchvision classifier with random weights whose answers differ between images.

    A freshly initialized network answers nearly the same for every image. So the statistics of
    batch normalization are random too, and the last layer is centered and scaled on real
    photographs.
    """
    if architecture == DEFAULT_ARCHITECTURE:
        # The same as without PyTorch.
        weights = graph.random_source(architecture, classes).weights
        same: nn.Module = empty_model(architecture, classes)
        same.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
        return same
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
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
    # With random statistics, differences between images drown in rounding.
    _take_statistics(normalized, photographs)
    last = last_layer(model, architecture)
    if isinstance(last, nn.Linear):
        _spread_logits(normalized, last, photographs)
    return model


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of the values of a model."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


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
        generator = torch.Generator().manual_seed(SEED)
        last.weight.normal_(generator=generator)
    logits = model(photographs)
    centered = logits - logits.mean(dim=0)
    scale = graph.LOGIT_STD / float(centered.std())
    if last.bias is not None:
        last.bias.copy_((last.bias - logits.mean(dim=0)) * scale)
    last.weight.mul_(scale)
