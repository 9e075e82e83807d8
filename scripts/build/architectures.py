"""The classifiers of torchvision: names, preprocessing, and the layer that depends on classes."""

import functools
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum, get_model_weights, list_models
from torchvision.transforms._presets import ImageClassification

from handler.inference.torch_models import INCEPTIONS, empty_model
from handler.settings import Preprocessing
from scripts.build.state_dicts import Template, present_name
from scripts.store import DEFAULT_ARCHITECTURE
from scripts.terminal import UserError


def check_architecture(name: str) -> str:
    """Return the name; raise `UserError` with similar ones if torchvision does not have it."""
    names = architectures()
    if name in names:
        return name
    similar = get_close_matches(name.lower(), names, 8)
    raise UserError(
        f"torchvision has no classifier {name!r}. ARCH can be: {', '.join(similar or names)}."
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


@functools.cache
def shapes(architecture: str, classes: int) -> dict[str, torch.Size]:
    """Return the shape of every parameter and buffer."""
    with _WithoutMemory():
        model = empty_model(architecture, classes)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def class_layer(architecture: str) -> str:
    """Return the name of the layer that computes the logits, such as "fc"."""
    few, more = shapes(architecture, 2), shapes(architecture, 3)
    names = (name for name in few if few[name] != more[name] and name.endswith(".weight"))
    return next(names).removesuffix(".weight")


def last_layer(model: nn.Module, architecture: str) -> nn.Module:
    """Return the layer that computes the logits."""
    return model.get_submodule(class_layer(architecture))


def template(architecture: str) -> Template:
    """Return the names and shapes of an architecture."""
    auxiliary = ("aux", "AuxLogits") if architecture in INCEPTIONS else ()  # only for training
    return Template(
        architecture,
        functools.partial(shapes, architecture),
        class_layer(architecture),
        optional=lambda name: name.startswith(auxiliary),
        rename=present_name,
    )
