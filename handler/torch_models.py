"""torchvision's classifiers as modules: what the PyTorch engine and the archive builder share.

torchvision costs a process 160 MB, so that workers with another engine never import this.
"""

from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn
from torchvision.models import feature_extraction

INCEPTIONS = ("googlenet", "inception_v3")

# What a head of one's own may be made of. With parameters, by name and sizes:
_SIZED: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "batchnorm": nn.BatchNorm1d,
    "layernorm": nn.LayerNorm,
}
# And without.
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "dropout": nn.Dropout,
    "elu": nn.ELU,
    "flatten": nn.Flatten,
    "gelu": nn.GELU,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leakyrelu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
LAYERS = (*_SIZED, *PLAIN)


def empty_model(architecture: str, classes: int, head: str = "") -> Any:
    """One of torchvision's classifiers, its parameters yet to be loaded, in evaluation mode.

    The two Inceptions come without the auxiliary classifiers that only training uses, and scale
    their input as torchvision's weights expect. Vision transformers are made for the size of
    picture that their best weights were trained with.

    Args:
        architecture: name in torchvision's registry.
        classes: how many it tells apart.
        head: what stands in the place of one of its modules, as in
            "fc=linear:512:256,relu,linear:256:5"; empty for its own.
    """
    options: dict[str, Any] = {"num_classes": classes}
    if architecture.startswith("vit_"):
        # A vision transformer is made for pictures of one size.
        preset = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
        options["image_size"] = preset.crop_size[0]
    if architecture in INCEPTIONS:
        options |= {"aux_logits": False, "transform_input": True, "init_weights": False}
    model = torchvision.models.get_model(architecture, weights=None, **options)
    if head:
        place, _, layers = head.partition("=")
        model.set_submodule(place, nn.Sequential(*map(_layer, layers.split(","))))
    return model.eval()


def _layer(text: str) -> nn.Module:
    name, *sizes = text.split(":")
    if name in PLAIN:
        return PLAIN[name]()
    return _SIZED[name](*map(int, sizes))


def with_features(model: Any, node: str) -> Any:
    """A model that gives a dict of "logits" and "features", the latter from a node of its graph."""
    last = feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)[1][-1]
    return feature_extraction.create_feature_extractor(
        model, {last: "logits", node: "features"}, suppress_diff_warning=True
    ).eval()
