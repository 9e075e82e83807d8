"""Heads of one's own: what stands in a file of weights in the place of a classifier's last layers.

A file of weights names the layers that have parameters, and no others. What is certain is
recognised; of the rest a person is asked to say the layers, since another activation would give
other answers without any error.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handler.torch_models import LAYERS, PLAIN
from scripts.build.architectures import Shapes, architectures, class_layer, misfit, shapes
from scripts.terminal import UserError, step

StateDict = Mapping[str, Tensor]

# They change no features that are a flat row, as nearly all architectures give them, in serving.
_WITHOUT_EFFECT = {"dropout", "identity", "flatten"}
# At the end of a head they turn logits into probabilities, which is done here to every model's.
_AT_THE_END = {"softmax", "logsoftmax", "sigmoid"}
_AFFINE = {"linear", "batchnorm", *_WITHOUT_EFFECT}

_HOW_TO_GO_ON = (
    "Or export the whole model with torch.onnx.export and pack that: MODEL_FILE=model.onnx"
)


@dataclass(frozen=True)
class Recognised:
    """Weights whose head is known.

    Attributes:
        state_dict: named as `head` or the architecture's own layers are.
        head: see `handler.torch_models.empty_model`; empty where the head does what the
            architecture's own last layer does.
        classes: outputs of its last layer.
    """

    state_dict: "OrderedDict[str, Tensor]"
    head: str
    classes: int


@dataclass(frozen=True)
class _Group:
    """The parameters of one layer.

    Attributes:
        name: of the layer within the head, as in "3".
        kind: of `handler.torch_models.LAYERS`; empty for any other.
        sizes: as that layer is made with.
        tensors: by their names within the layer.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    tensors: dict[str, Tensor]

    def __str__(self) -> str:
        match self.kind:
            case "linear":
                return f"{self.name}: linear, {self.sizes[0]} to {self.sizes[1]}"
            case "":
                return f"{self.name}: {', '.join(self.tensors)}"
            case _:
                return f"{self.name}: {self.kind} of {self.sizes[0]}"


def check_channels(state_dict: StateDict, architecture: str, file: str) -> None:
    """Raises `UserError` for weights that take pictures of other channels than three."""
    for name, shape in shapes(architecture, 2).items():
        if len(shape) != 4 or shape[1] != 3:  # noqa: PLR2004  # a convolution of a picture
            continue
        found = state_dict[name].shape if name in state_dict else shape
        if len(found) == len(shape) and found[1] != shape[1]:
            raise UserError(
                f"{file} takes pictures of {found[1]} channel(s): {name} has the shape "
                f"{list(found)}. Here pictures have 3: red, green and blue, grey ones too. Train "
                "with those, as Grayscale(num_output_channels=3) of torchvision's transforms gives."
            )
        return


def recognise(
    state_dict: StateDict, architecture: str, said: str | None, file: str
) -> Recognised | None:
    """Finds the head that stands in the place of an architecture's own.

    Args:
        state_dict: parameter names to tensors.
        architecture: name in torchvision's registry.
        said: the head's layers by name, with commas between; None for what can be seen.
        file: of the weights, for errors.

    Returns:
        None where what is not the head is not the architecture's.

    Raises:
        UserError: there is a head, but its layers are not certain, or none, but layers are said.
    """
    place = _place({name: tensor.shape for name, tensor in state_dict.items()}, architecture)
    if place is None:
        return None
    whose = "of its own"
    if said is not None and f"{place}.weight" in state_dict:
        whose = "of the usual sizes, which needs HEAD only where its activations are unusual"
        layer, place = place, place.rpartition(".")[0]
        if not place:
            raise UserError(
                f"{file} has {architecture}'s own last layer: its {layer} is one layer, and no "
                "nn.Sequential. Leave HEAD out."
            )
    inside = {
        name.removeprefix(f"{place}."): tensor
        for name, tensor in state_dict.items()
        if name.startswith(f"{place}.")
    }
    groups = list(_groups(inside))
    found = f"{file} is {architecture} with a {place} {whose} ({'; '.join(map(str, groups))})"
    if file.endswith(".safetensors") and len(groups) > 1 and not _numbered(g.name for g in groups):
        raise UserError(
            f"{found}. Such names do not tell the order of the layers, and a safetensors file "
            f"keeps none. Save the state dict with torch.save. {_HOW_TO_GO_ON}"
        )
    unknown = [group for group in groups if not group.kind]
    if unknown or not groups or groups[-1].kind != "linear":
        raise UserError(
            f"{found}. Known are linear, batchnorm and layernorm layers in an nn.Sequential, the "
            f"last with parameters a linear one. {_HOW_TO_GO_ON}"
        )
    names = _said(said, groups, found) if said is not None else _seen(groups, found)
    head = f"{place}={','.join(_layers(names, groups))}"
    classes = groups[-1].sizes[1]
    reason = misfit(architecture, classes, head)
    if reason:
        # As with ConvNeXt, which gives pictures of a pixel where others give a row of numbers.
        flat = ["flatten", *names[1:]]
        other = f"{place}={','.join(_layers(flat, groups))}"
        helps = names[0] in _WITHOUT_EFFECT and not misfit(architecture, classes, other)
        raise UserError(
            f"{found}. As {','.join(names)} it does not take what {architecture} gives it: "
            f"{reason}. "
            + (f"With a flatten first it does: HEAD={','.join(flat)}" if helps else _HOW_TO_GO_ON)
        )
    if said is None:
        _say_what_is_assumed(place, names, groups, file)
    outside = [(k, v) for k, v in state_dict.items() if not k.startswith(f"{place}.")]
    own = _as_own_layer(architecture, place, names, groups)
    if own is not None:
        return Recognised(OrderedDict([*outside, *own]), "", classes)
    return Recognised(OrderedDict([*outside, *_as_layers(place, names, groups)]), head, classes)


def similar(state_dict: StateDict) -> str | None:
    """The architecture to which all but the head belongs, if torchvision has one."""
    found = {name: tensor.shape for name, tensor in state_dict.items()}
    return next((name for name in architectures() if _place(found, name)), None)


def widened(state_dict: StateDict, layer: str) -> "OrderedDict[str, Tensor]":
    """One output made two, of which the softmax is what a sigmoid gives of the one.

    Args:
        state_dict: of a model with one output.
        layer: the name of the last layer's weight.

    Returns:
        the same with a first output that is always 0.
    """
    result = OrderedDict(state_dict)
    for name in (layer, layer.removesuffix("weight") + "bias"):
        if name in result:
            result[name] = torch.cat([torch.zeros_like(result[name]), result[name]])
    return result


def last_linear(head: str) -> str:
    """The name of the weight of a head's last linear layer."""
    place, _, layers = head.partition("=")
    numbers = [i for i, text in enumerate(layers.split(",")) if text.startswith("linear:")]
    return f"{place}.{numbers[-1]}.weight"


def described(head: str) -> str:
    """For a person, as in "fc: linear 512 to 256, relu, linear 256 to 5"."""
    place, _, layers = head.partition("=")
    parts = [text.split(":") for text in layers.split(",")]
    shown = [" ".join([name, " to ".join(sizes)]).strip() for name, *sizes in parts]
    return f"{place}: {', '.join(shown)}"


def _place(found: Shapes, architecture: str) -> str | None:
    """The module with the head in it: the last layer, or one around it."""
    expected = shapes(architecture, 2)
    module = class_layer(architecture).removesuffix(".weight")
    while module:
        if _outside(found, module) == _outside(expected, module) and any(
            name.startswith(f"{module}.") for name in found
        ):
            return module
        module = module.rpartition(".")[0]
    return None


def _outside(tensors: Shapes, module: str) -> Shapes:
    """What is not in a module, but for counters that old files do not have."""
    return {
        name: shape
        for name, shape in tensors.items()
        if not name.startswith((f"{module}.", "aux", "AuxLogits"))
        and not name.endswith("num_batches_tracked")
    }


def _groups(tensors: StateDict) -> Iterator[_Group]:
    """The layers, in the order of the file; those of a number in that of the numbers."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        by_layer.setdefault(layer, {})[parameter] = tensor
    names = list(by_layer)
    if _numbered(names):
        names.sort(key=lambda name: [int(part) for part in name.split(".")])
    for name in names:
        yield _group(name, by_layer[name])


def _numbered(names: Iterable[str]) -> bool:
    """Whether all names are numbers, as in "3", or in "1.2" of a Sequential in the Sequential."""
    return all(name.replace(".", "").isdecimal() for name in names)


def _group(name: str, tensors: dict[str, Tensor]) -> _Group:
    shapes_ = {parameter: tuple(tensor.shape) for parameter, tensor in tensors.items()}
    kept = {p: t for p, t in tensors.items() if p != "num_batches_tracked"}
    match shapes_:
        case {"weight": (outputs, inputs), **others} if others in ({}, {"bias": (outputs,)}):
            return _Group(name, "linear", (inputs, outputs), kept)
        case {
            "weight": (size,),
            "bias": (also,),
            "running_mean": (_,),
            "running_var": (_,),
        } if size == also:
            return _Group(name, "batchnorm", (size,), tensors)
        case {"weight": (size,), "bias": (also,), **others} if size == also and not others:
            return _Group(name, "layernorm", (size,), kept)
    return _Group(name, "", (), tensors)


def _seen(groups: list[_Group], found: str) -> list[str]:
    """The layers where none without parameters can stand between them."""
    numbers = [_number(group) for group in groups]
    names = [*["dropout"] * (numbers[0] or 0), groups[0].kind]
    certain = True
    for before, number, group in zip(numbers, numbers[1:], groups[1:], strict=False):
        # Other names, as those of a Sequential in the Sequential, do not tell what is between.
        between = 1 if before is None or number is None else number - before - 1
        names += ["relu", *["dropout"] * (between - 1)] if between else []
        names.append(group.kind)
        certain &= not between
    if not certain:
        raise UserError(
            f"{found}. What has no parameters, such as activations and dropout, cannot be seen in "
            f"a file of weights. Say all layers in order: if it was HEAD={','.join(names)}, just "
            f"so. {_HOW_TO_GO_ON}"
        )
    return names


def _number(group: _Group) -> int | None:
    """Where the layer stands in the head, if its name says that."""
    return int(group.name) if group.name.isdecimal() else None


def _say_what_is_assumed(place: str, names: list[str], groups: list[_Group], file: str) -> None:
    """Says what is taken to stand before the first layer that can be seen, if anything may."""
    first = groups[0]
    # A layer without a name is the place itself.
    if not first.name or _number(first) == 0:
        return
    said = ["relu", *names[_number(first) is not None :]]
    step(
        f"Weights: whatever stands before {place}.{first.name} in {file} is taken as dropout, "
        "which changes no answers. If it was anything else, name all layers, as in "
        f"HEAD={','.join(said)}"
    )


def _said(said: str, groups: list[_Group], found: str) -> list[str]:
    """The layers that a person says, which must be those that can be seen."""
    names = [name.strip().lower().replace("_", "") for name in said.split(",")]
    names = [name.removesuffix("1d") for name in names]
    while names and names[-1] in _AT_THE_END:
        names.pop()
    strange = [name for name in names if name not in LAYERS]
    if strange:
        raise UserError(
            f"HEAD has no layer {strange[0]!r}. It can have: {', '.join(LAYERS)}; and at its end "
            f"{', '.join(sorted(_AT_THE_END))}."
        )
    with_parameters = [(i, name) for i, name in enumerate(names) if name not in PLAIN]
    kinds = [group.kind for group in groups]
    numbers = itertools.takewhile(lambda number: number is not None, map(_number, groups))
    fits = [name for _, name in with_parameters] == kinds and all(
        number == i for number, (i, _) in zip(numbers, with_parameters, strict=False)
    )
    if not fits:
        raise UserError(
            f"{found}. HEAD={said} does not fit: name each layer in order, from number 0 on, those "
            "without parameters too."
        )
    return names


def _layers(names: list[str], groups: list[_Group]) -> list[str]:
    """The layers as `handler.torch_models.empty_model` takes them, as in "linear:512:5"."""
    left = iter(groups)
    return [
        name if name in PLAIN else ":".join([name, *map(str, next(left).sizes)]) for name in names
    ]


def _as_own_layer(
    architecture: str, place: str, names: list[str], groups: list[_Group]
) -> list[tuple[str, Tensor]] | None:
    """The parameters of the architecture's last layer, where that does what the head does."""
    own = class_layer(architecture)
    bias = own.removesuffix("weight") + "bias"
    expected = shapes(architecture, groups[-1].sizes[1])
    of_the_place = {name for name in expected if name.startswith(f"{place}.")}
    if not set(names) <= _AFFINE or of_the_place != {own, bias}:
        return None
    weight, offset = _folded(groups)
    return [(own, weight), (bias, offset)] if expected[own] == weight.shape else None


def _as_layers(place: str, names: list[str], groups: list[_Group]) -> Iterator[tuple[str, Tensor]]:
    """The parameters, named by where their layers stand in the head."""
    left = iter(groups)
    for number, name in enumerate(names):
        if name in PLAIN:
            continue
        group = next(left)
        for parameter, tensor in group.tensors.items():
            yield f"{place}.{number}.{parameter}", tensor
        if name == "linear" and "bias" not in group.tensors:
            yield f"{place}.{number}.bias", torch.zeros(group.sizes[1])


def _folded(groups: Iterable[_Group]) -> tuple[Tensor, Tensor]:
    """Layers that are linear functions as one: weight (classes, channels) and bias (classes,)."""
    layers = list(groups)
    if len(layers) == 1:
        weight = layers[0].tensors["weight"]
        return weight, layers[0].tensors.get("bias", torch.zeros(len(weight)))
    modules = []
    for group in layers:
        module: nn.Module
        if group.kind == "linear":
            inputs, outputs = group.sizes
            module = nn.Linear(inputs, outputs, bias="bias" in group.tensors)
        else:
            module = nn.BatchNorm1d(group.sizes[0])
        module.load_state_dict(group.tensors, strict=group.kind == "linear")
        modules.append(module)
    together = nn.Sequential(*modules).double().eval()
    with torch.inference_mode():
        each = torch.eye(layers[0].sizes[0], dtype=torch.float64)
        offset = together(torch.zeros_like(each[:1]))
        weight = (together(each) - offset).T
    return weight.float().contiguous().clone(), offset[0].float().clone()
