"""`ARCH=resnet50`: torchvision's classifiers, with published weights or a file of the user's."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum, get_model_weights, list_models
from torchvision.transforms._presets import ImageClassification

from handler.inference.torch_models import INCEPTIONS, empty_model
from handler.settings import Preprocessing
from scripts.build import export
from scripts.build.checkpoints import read_checkpoint
from scripts.build.classes import IMAGENET_CLASSES, given_classes
from scripts.build.convert import Converted
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.sources import graph
from scripts.build.sources.download import local_file
from scripts.build.sources.source import TorchSource
from scripts.build.state_dicts import Template, fit, load_into, present_name
from scripts.samples import sample_batch
from scripts.store import DEFAULT_ARCHITECTURE
from scripts.terminal import UserError

_SEED = 20


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(TorchSource):
    """A classifier of torchvision, which PyTorch can serve as well."""

    def for_pytorch(self, preprocessing: Preprocessing, target: Converted) -> str:
        """Write what the PyTorch engine loads, a state dict and `target.classifier`.

        Return the node of the last features; empty if there is none, nor a classifier.
        """
        name, state_dict = class_layer(self.architecture), self.module.state_dict()
        if self.outputs == 1:
            # Two outputs from one: the softmax of (0, x) is the sigmoid of x.
            for key in (f"{name}.weight", f"{name}.bias"):
                state_dict[key] = torch.cat([torch.zeros_like(state_dict[key]), state_dict[key]])
        torch.save(state_dict, target.file)
        features = export.features_node(self.module, self.module.get_submodule(name), preprocessing)
        if features:
            np.save(target.classifier, state_dict[f"{name}.weight"].float().numpy())
        return features


def open_source(spec: ModelFile) -> TorchvisionSource:
    """Return the architecture with its weights; download published ones."""
    name = spec.arch or ""
    names = architectures()
    if name not in names:
        similar = get_close_matches(name.lower(), names, 8)
        raise UserError(
            f"torchvision has no classifier {name!r}. ARCH can be: {', '.join(similar or names)}."
        )
    if spec.weights == RANDOM:
        classes = len(given_classes(spec.classes) or range(IMAGENET_CLASSES))
        return random_source(name, classes)
    checkpoint = read_checkpoint(local_file(spec.weights or official_weights(name).url))
    fitted = fit(checkpoint, template(name), spec.weights_key)
    return TorchvisionSource(
        architecture=name,
        file=checkpoint.file,
        sha256=checkpoint.sha256,
        outputs=fitted.classes,
        preprocessing=asdict(official_preprocessing(name)),
        module=load_into(empty_model(name, fitted.classes), fitted),
    )


def architectures() -> list[str]:
    """Return all names of torchvision's classification registry."""
    names: list[str] = list_models(module=torchvision.models)
    return names


def official_weights(architecture: str) -> WeightsEnum:
    """Return the best weights that torchvision has for an architecture."""
    return get_model_weights(architecture).DEFAULT


def official_preprocessing(architecture: str) -> Preprocessing:
    """Return the preprocessing of torchvision's weights; for DenseNet-121 the tutorial's.

    The tutorial resizes to 255, torchvision to 256.
    """
    if architecture == DEFAULT_ARCHITECTURE:
        return Preprocessing()
    preset = official_weights(architecture).transforms()
    assert isinstance(preset, ImageClassification)
    red, green, blue = preset.mean
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=(red, green, blue),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def template(architecture: str) -> Template:
    """Return the names and shapes of an architecture."""
    auxiliary = ("aux", "AuxLogits") if architecture in INCEPTIONS else ()  # only for training
    shapes, heads = _shapes(architecture, 2), (class_layer(architecture),)
    return Template(architecture, shapes, heads, auxiliary, present_name)


def class_layer(architecture: str) -> str:
    """Return the name of the layer that computes the logits, such as "fc"."""
    few, more = _shapes(architecture, 2), _shapes(architecture, 3)
    names = (name for name in few if few[name] != more[name] and name.endswith(".weight"))
    return next(names).removesuffix(".weight")


@functools.cache
def _shapes(architecture: str, classes: int) -> dict[str, torch.Size]:
    """Return the shape of every parameter and buffer."""
    with _WithoutMemory():
        model = empty_model(architecture, classes)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


class _WithoutMemory(TorchFunctionMode):
    """Make layers with shapes, but no values.

    `torch.device("meta")` cannot be used: RegNets compute their widths with tensors' values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def random_source(architecture: str, classes: int = IMAGENET_CLASSES) -> TorchvisionSource:
    """Return an architecture with seeded random weights, made as `graph.random_source` does."""
    preprocessing = official_preprocessing(architecture)
    if architecture == DEFAULT_ARCHITECTURE:  # the same as without PyTorch
        weights = graph.random_source(architecture, classes).weights
        model: nn.Module = empty_model(architecture, classes)
        model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    else:
        model = _random_model(architecture, classes, preprocessing)
    values = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return TorchvisionSource(
        architecture=architecture,
        file=graph.RANDOM_FILE,
        sha256=graph.digest(values),
        outputs=classes,
        preprocessing=asdict(preprocessing),
        trained=False,
        module=model,
    )


def _random_model(architecture: str, classes: int, preprocessing: Preprocessing) -> nn.Module:
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
    photographs = torch.from_numpy(sample_batch(preprocessing))
    normalized = export.Normalized(model, preprocessing)
    # With random statistics, differences between images drown in rounding.
    _take_statistics(normalized, photographs)
    last = model.get_submodule(class_layer(architecture))
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
