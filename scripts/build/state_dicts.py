"""Fit the weights in a file to an architecture: names, prefixes, the number of classes.

Nothing that computes is left out: tensors that the architecture does not have are rejected by name,
unless they are a loss's, a counter, or another copy of the model.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scripts.build.checkpoints import Checkpoint, StateDict
from scripts.build.messages import listed
from scripts.terminal import UserError, printable, step

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
Tensors = Mapping[str, NDArray[Any]]

# Share of the architecture's names that must be below a prefix for it to be the model's.
MIN_SHARE = 0.5
# Copies of a model in a file: raw, averaged, of the best epoch.
MAX_PREFIXES = 20
# `_hint` suggests only architectures whose number of parameters differs by no more: the size of the
# largest last layer of 1000 classes, RegNetY-128GF's.
MAX_LAST_LAYER_PARAMETERS = 7_400_000

_EXPORT = (
    'Export the whole model with torch.onnx.export(model, torch.zeros(1, 3, 224, 224), "m.onnx",'
    ' dynamo=True, external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},)) and use '
    "MODEL_FILE=m.onnx"
)

_AVERAGED = re.compile(r"(?<![a-zA-Z])(ema|swa)(?![a-z])|EMA|SWA|Ema|averag")
# Names of tensors that may be left out: counters of thop and of weight averaging, and a loss's own.
_COUNTER = re.compile(r"(^|\.)(n_averaged|num_updates|total_ops|total_params)$")
_LOSS = re.compile(
    r"(^|[._])(criterion|metrics?)([._\d]|$)|loss(es)?(_?fn|_?func)?([._\d]|$)|"
    r"(pos|class)_weights?$",
    re.IGNORECASE,
)
# The names in torchvision's own files, written by its first versions, and the present ones.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_1\."), r"\g<1>0."),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_2\."), r"\g<1>3."),
)
# Modules that consist of dropout and the last layer, besides those whose layers have numbers.
_PLAIN_HEADS = {"heads"}  # of torchvision's vision transformers

_LIBRARIES = {
    r"(^|\.)(_conv_stem|_blocks)\.": "These are the names of the package efficientnet_pytorch. "
    + _EXPORT,
    r"(^|\.)(embeddings\.(patch_embeddings|cls_token|convolution)|embedder\.embedder)\b"
    r"|\.convolution\.weight$": "These are Hugging Face's names: MODEL_FILE=folder with "
    "config.json, preprocessor_config.json and model.safetensors",
    r"(^|\.)(conv_stem\.weight$|stages\.\d+\.|patch_embed\.)": "These are timm's names: "
    "ARCH=timm/NAME",
}


@dataclass(frozen=True)
class Template:
    """The names and shapes that an architecture expects.

    Attributes:
        shapes: of the parameters and buffers, for any number of classes.
        heads: the layers whose first dimension is the number of classes, as in "fc", first the one
            that computes the logits; empty if the code fixes the number of classes.
        optional: prefixes of names that may be missing or left out, such as auxiliary classifiers'.
        rename: old names to present ones, whatever prefix they have.
    """

    architecture: str
    shapes: Mapping[str, Shape]
    heads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rename: Callable[[str], str] = lambda name: name

    @property
    def last(self) -> str:
        """Return the layer that computes the logits; empty if there are no heads."""
        return next(iter(self.heads), "")

    def of_classes(self, classes: int) -> dict[str, Shape]:
        """Return the shapes for a number of classes; for 0 as they are."""
        resized = {
            f"{head}.{kind}" for head in self.heads if classes for kind in ("weight", "bias")
        }
        return {n: (classes, *s[1:]) if n in resized else s for n, s in self.shapes.items()}


@dataclass(frozen=True)
class Fitted:
    """The tensors below a prefix of a state dict, as weights of an architecture.

    Attributes:
        key: of the state dict, with the prefix, as WEIGHTS_KEY has them.
        state_dict: all of the architecture's names.
        classes: outputs of the last layer; 0 if the code fixes them, or no last layer was found.
        problems: differing shapes and missing names.
        source: the whole state dict.
        last: the last layer's name below the prefix.
        notes: the printed sentences.
    """

    key: str
    state_dict: StateDict
    classes: int
    problems: tuple[str, ...]
    source: StateDict
    prefix: str
    last: str
    notes: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        """Return whether the key names an average of the weights, such as EMA."""
        return _AVERAGED.search(self.key) is not None

    @property
    def is_copy(self) -> bool:
        """Return whether this is a whole model, or an averaged one without its buffers."""
        return self.averaged or not self.problems


def fit(checkpoint: Checkpoint, template: Template, weights_key: str | None = None) -> Fitted:
    """Take the weights of an architecture from a file, with as many classes as they have, and print
    what was chosen and left out.

    Averaged weights (EMA, SWA) are preferred to raw ones, unless `weights_key` is the key of
    another state dict, or the prefix of its names.
    """
    file, states = checkpoint.file, checkpoint.states
    found = [f for key, state in states.items() for f in _candidates(key, state, template)]
    candidates = found if weights_key is None else _with_key(checkpoint, found, weights_key)
    misfit = f"{file} does not fit {template.architecture}"
    if not candidates:
        state = states.get(weights_key or "", max(states.values(), key=len))
        hint = _hint(state, {}, template)
        raise UserError(f"{misfit}: its first names are {listed(state)}. {hint}")
    taken = _preferred(candidates, file)
    harmless, further = _left_out(taken, found, template)
    problems = [*taken.problems]
    if further:
        problems.insert(0, f"it has further layers that change its answers: {listed(further)}")
    if problems:
        hint = _hint(taken.source, taken.state_dict, template)
        classes = f" with {taken.classes} classes" if taken.classes else ""
        raise UserError(f"{misfit}{classes}: {listed(problems, separator='; ')}. {hint}")
    copies = {id(copy.source) for copy in found if copy.is_copy}
    others = [
        key or "."
        for key, state in states.items()
        if id(state) not in copies and any(tensor.ndim > 1 for tensor in state.values())
    ]
    if others and weights_key is None:
        raise UserError(
            f"{file} holds further layers under {listed(others)}. If they are no part of the "
            f"model, choose its weights: WEIGHTS_KEY={taken.key}"
        )
    for name, tensor in taken.state_dict.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds values that are not finite.")
    notes = tuple(_notes(taken, candidates, harmless, template))
    for note in notes:
        step(f"Weights: {note}")
    return replace(taken, notes=notes)


def load_into(module: "nn.Module", fitted: Fitted) -> "nn.Module":
    """Load weights into a PyTorch module of their architecture."""
    import torch

    tensors = OrderedDict(
        (name, torch.from_numpy(np.array(tensor))) for name, tensor in fitted.state_dict.items()
    )
    # Formats other than PyTorch's have no version: the module's is used, which MNASNet needs.
    versions = {"": module._version, **fitted.state_dict.versions}
    tensors._metadata = {  # type: ignore[attr-defined]
        name: {"version": version} for name, version in versions.items()
    }
    module.load_state_dict(tensors)
    return module


def present_name(name: str) -> str:
    """Return the present name of a tensor of torchvision's files."""
    for old, present in _OLD_NAMES:
        name = old.sub(present, name)
    return name


def _candidates(key: str, source: StateDict, template: Template) -> Iterator[Fitted]:
    """Find the prefixes below which most of the architecture's names are."""
    present = {template.rename(name): tensor for name, tensor in source.items()}
    starts = Counter(
        name[:start]
        for name in present
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in template.shapes
    )
    required = sum(not name.endswith(".num_batches_tracked") for name in template.shapes)
    for prefix, count in starts.most_common(MAX_PREFIXES):
        if count >= MIN_SHARE * required:
            label = f"{key}.{prefix}".strip(".") or "."
            below = {n.removeprefix(prefix): t for n, t in present.items() if n.startswith(prefix)}
            last = _last_layer(below, template)
            tensors, classes, problems = _compare(below, last, template)
            tensors.versions = {
                f"{module}."[len(prefix) : -1]: version
                for module, version in source.versions.items()
                if f"{module}.".startswith(prefix)
            }
            yield Fitted(label, tensors, classes, problems, source, prefix, last)


def _compare(
    below: Tensors, last: str, template: Template
) -> tuple[StateDict, int, tuple[str, ...]]:
    """Return the tensors by the architecture's names, the number of classes, and the problems."""
    weight, bias = f"{template.last}.weight", f"{template.last}.bias"
    moved = {weight: f"{last}.weight", bias: f"{last}.bias"}
    found = ((name, below.get(moved.get(name, name))) for name in template.shapes)
    tensors = StateDict((name, tensor) for name, tensor in found if tensor is not None)
    shape = tensors[weight].shape if weight in tensors else ()
    classes = shape[0] if shape and shape[1:] == template.shapes[weight][1:] else 0
    expected = template.of_classes(classes)
    for name in (name for name in expected if name not in tensors):
        if name.endswith(".num_batches_tracked"):  # not in files of PyTorch 0.4 and before
            tensors[name] = np.zeros((), np.int64)
        elif name == bias and weight in tensors:
            tensors[name] = np.zeros(expected[name], np.float32)
    lacking = [n for n in expected if n not in tensors and not n.startswith(template.optional)]
    problems = [
        f"{name} has the shape {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    if lacking:
        problems.insert(0, f"it lacks {listed(lacking)}")
    return tensors, classes, tuple(problems)


def _last_layer(names: Iterable[str], template: Template) -> str:
    """Return the name of the layer in the place of the last one.

    It may be in an nn.Sequential there, or in the place of one that holds only the last layer.
    """
    parent, _, own = template.last.rpartition(".")
    layers = {name.rpartition(".")[0] for name in template.shapes if name.startswith(f"{parent}.")}
    is_plain = layers == {template.last} and (own.isdecimal() or parent in _PLAIN_HEADS)
    for module in (template.last, parent) if is_plain else (template.last,):
        inside = [n for n in names if n.startswith(f"{module}.") and not _COUNTER.search(n)]
        layers = {name.rpartition(".")[0] for name in inside}
        pattern = re.compile(rf"{re.escape(module)}(\.\d+)?\.(weight|bias)")
        if len(layers) == 1 and all(map(pattern.fullmatch, inside)):
            return layers.pop()
    return template.last


def _with_key(checkpoint: Checkpoint, found: list[Fitted], weights_key: str) -> list[Fitted]:
    """Return the candidates of a key or a prefix, those that it names in full first."""
    wanted = weights_key.rstrip(".") or "."
    state = checkpoint.states.get(wanted)
    in_full = [f for f in found if f.source is state or wanted in (f.key, f.prefix.rstrip("."))]
    matching = in_full or [f for f in found if f".{wanted}." in f".{f.key}."]
    if not matching and weights_key not in checkpoint.states:
        keys = [f.key for f in found] or [key or "." for key in checkpoint.states]
        raise UserError(
            f"{checkpoint.file} has no weights {weights_key!r}. "
            f"WEIGHTS_KEY can be: {listed(keys, limit=20)}."
        )
    return matching


def _preferred(candidates: list[Fitted], file: str) -> Fitted:
    """Return the complete candidate, the averaged one of several, or else the most complete."""
    complete = [f for f in candidates if not f.problems]
    best = [f for f in complete if f.averaged] or complete
    if len(best) > 1:
        raise UserError(
            f"{file} holds the weights of several models. Choose one with WEIGHTS_KEY: "
            f"{listed([f.key for f in complete], limit=20)}."
        )
    return best[0] if best else max(candidates, key=lambda f: len(f.state_dict))


def _left_out(
    taken: Fitted, found: list[Fitted], template: Template
) -> tuple[list[str], list[str]]:
    """Return the tensors that the architecture does not have: harmless ones, and all others.

    Copies of the model are neither. Harmless are counters and, outside the model, what only losses
    use. A loss's tensor with two dimensions may compute: ArcFace's is the last layer.
    """
    modules = {name.partition(".")[0] for name in template.shapes}
    copies = [f for f in found if f.source is taken.source and f.is_copy]
    used = {id(tensor) for copy in (taken, *copies) for tensor in copy.state_dict.values()}
    prefixes = tuple(f.prefix for f in copies if f.prefix and not taken.prefix.startswith(f.prefix))
    harmless, further = [], []
    for old, tensor in taken.source.items():
        name = template.rename(old)
        below = name.startswith(taken.prefix)
        inner = name.removeprefix(taken.prefix)
        optional = below and inner.startswith(template.optional)
        if id(tensor) in used or name.startswith(prefixes) or optional:
            continue
        inside = below and inner.partition(".")[0] in modules
        counts = _COUNTER.search(name) or not (inside or np.issubdtype(tensor.dtype, np.floating))
        loss = not inside and tensor.ndim <= 1 and _LOSS.search(name)
        if loss or (counts and tensor.size == 1):
            harmless.append(old)
        else:
            further.append(f"{old} {list(tensor.shape)}")
    return harmless, further


def _notes(
    taken: Fitted, candidates: list[Fitted], harmless: list[str], template: Template
) -> Iterator[str]:
    raw = [f.key for f in candidates if not f.problems and not f.averaged]
    incomplete = [f for f in candidates if f.problems and f.averaged]
    if taken.averaged and raw:
        yield f"Took the averaged weights, {taken.key}. The raw ones: WEIGHTS_KEY={raw[0]}"
    elif incomplete:
        yield (
            f"Took {taken.key}, since the averaged weights, {incomplete[0].key}, are "
            f"incomplete: {incomplete[0].problems[0]}."
        )
    if taken.prefix:
        yield f"Removed the prefix {printable(taken.prefix)} from the names."
    if harmless:
        yield f"Left out, since they are no part of the model: {listed(harmless, limit=20)}."
    if taken.last != template.last and taken.last.rpartition(".")[2] not in {"0", taken.last}:
        yield (
            f"Whatever comes before {taken.last} in {template.last} is taken as dropout, which "
            "changes no answers. If it is anything else, such as an activation, export the whole "
            "model to ONNX."
        )


def _hint(state: StateDict, tensors: Tensors, template: Template) -> str:
    """Return what to do with weights that do not fit.

    `tensors` are those of them that have names of the architecture, if they are most.
    """
    for name, tensor in tensors.items():
        # An image has 3 channels, and a convolution's weights 4 dimensions.
        if tensor.ndim == 4 and template.shapes[name][1:2] == (3,) != tensor.shape[1:2]:
            return (
                f"It takes images of {tensor.shape[1]} channel(s). Here they have 3: red, green "
                "and blue, also gray ones. Train with those, as Grayscale(num_output_channels=3) "
                "of torchvision's transforms gives"
            )
    is_timm = template.architecture.startswith("timm/")
    for pattern, text in {} if tensors else _LIBRARIES.items():
        if any(re.search(pattern, name) for name in state) and not (is_timm and "timm/" in text):
            return text
    try:
        from scripts.build.sources import torchvision
    except ImportError:  # without PyTorch, no other architecture can be tried
        return _EXPORT
    size = sum(t.size for name, t in state.items() if ".running_" not in name)
    for name in torchvision.architectures():
        difference = abs(size - torchvision.official_weights(name).meta["num_params"])
        if name == template.architecture or difference > MAX_LAST_LAYER_PARAMETERS:
            continue
        other = torchvision.template(name)
        for candidate in _candidates("", state, other):
            if not candidate.problems and not _left_out(candidate, [candidate], other)[1]:
                return f"Its layers are those of {name}: ARCH={name}"
    return _EXPORT
