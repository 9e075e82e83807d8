"""Fits the weights in a file to an architecture: names, prefixes, the number of classes.

Nothing that computes is left out: tensors that the architecture does not have are rejected by name,
unless they are a loss's, a counter, or another copy of the model.
"""

import functools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scripts.build.architectures import (
    architectures,
    class_layer,
    official_weights,
    shapes,
    without_auxiliary,
)
from scripts.build.checkpoints import Checkpoint, StateDict
from scripts.terminal import UserError, printable, step

# Names of tensors, or differences, in a message.
MAX_LISTED = 3
# A prefix is taken for one of the model's if this share of the architecture's names is below it.
MIN_SHARE = 0.5
# Copies of a model in a file: raw, averaged, of the best epoch.
MAX_PREFIXES = 20
# `_suggested` compares only with architectures whose number of parameters differs by no more: by
# that of the largest last layer of 1000 classes, or by this share.
MAX_LAST_LAYER_PARAMETERS = 4_200_000
MAX_DIFFERENCE = 0.1

_EXPORT = (
    'Export the whole model with torch.onnx.export(model, torch.zeros(1, 3, 224, 224), "m.onnx",'
    ' dynamo=True, external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},)) and use '
    "MODEL_FILE=m.onnx"
)

_AVERAGED = re.compile(r"(?<![a-zA-Z])(ema|swa)(?![a-z])|EMA|SWA|Ema|averag")
# What may be left out: counters of thop and of weight averaging, and what only losses use.
_COUNTERS = ("n_averaged", "num_updates", "total_ops", "total_params")
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
# Modules that do nothing but dropout and their last layer, besides those whose layers have numbers.
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
    """What an architecture expects.

    Attributes:
        architecture: for messages, as ARCH has it, or the name of a Python class.
        shapes: of the parameters and buffers of a model with so many classes.
        last: the name of the last layer, as in "fc"; empty if the code fixes the number of
            classes, so that `shapes(0)` is right.
        optional: whether a name may be missing or left out, such as an auxiliary classifier's.
        rename: old names to present ones, whatever prefix they have.
    """

    architecture: str
    shapes: Callable[[int], Mapping[str, torch.Size]]
    last: str
    optional: Callable[[str], bool] = lambda _: False
    rename: Callable[[str], str] = lambda name: name


@dataclass(frozen=True)
class Fitted:
    """Weights that fit an architecture.

    Attributes:
        state_dict: all of the architecture's names; with the file's `_metadata`, if it has one, for
            layers that convert parameters of their older versions.
        classes: outputs of the last layer; 0 if the code fixes them.
        key: of the state dict that was taken, with the prefix of its names, as in "model_ema".
        notes: sentences to print.
    """

    state_dict: "OrderedDict[str, Tensor]"
    classes: int
    key: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    """The tensors below a prefix of a state dict, as those of the architecture.

    Attributes:
        key: of the state dict.
        prefix: of the names, as in "module."; or empty.
        tensors: by the architecture's names.
        used: their names in the file.
        classes: outputs of the last layer; 0 if the code fixes them, or no last layer was found.
        own: whether at least `MIN_SHARE` of the architecture's names were found.
        last: the last layer's name in the file, without the prefix.
        problems: differing shapes and missing names; empty if the weights are complete.
    """

    key: str
    prefix: str
    tensors: "OrderedDict[str, Tensor]"
    used: frozenset[str]
    classes: int
    own: bool
    last: str
    problems: tuple[str, ...]

    @property
    def label(self) -> str:
        """The key and the prefix, as WEIGHTS_KEY has them."""
        return ".".join(filter(None, (self.key, self.prefix.rstrip(".")))) or "."

    @property
    def averaged(self) -> bool:
        return _AVERAGED.search(self.label) is not None


def torchvision_template(architecture: str) -> Template:
    """Return what one of torchvision's architectures expects."""
    return Template(
        architecture,
        functools.partial(shapes, architecture),
        class_layer(architecture).removesuffix(".weight"),
        optional=lambda name: not without_auxiliary(architecture, [name]),
        rename=_present_name,
    )


def fit(checkpoint: Checkpoint, template: Template, weights_key: str | None = None) -> Fitted:
    """Take the weights of an architecture from a file, with as many classes as they have.

    Averaged weights (EMA, SWA) are preferred to raw ones.

    Args:
        checkpoint: what the file holds.
        template: what the architecture expects.
        weights_key: the state dict to take, by its key or by the prefix of its names.

    Raises:
        UserError: the file is for another architecture, has further layers, is ambiguous, or holds
            values that are not finite.
    """
    file, states = checkpoint.file, checkpoint.states
    template = replace(template, shapes=functools.cache(template.shapes))
    found = [c for key, state in states.items() for c in _candidates(key, state, template)]
    asked = found if weights_key is None else _asked(checkpoint, found, weights_key)
    complete = [candidate for candidate in asked if not candidate.problems]
    if not complete:
        state = states.get(weights_key or "", max(states.values(), key=len))
        raise UserError(_misfit(checkpoint, asked, state, template))
    taken = _preferred(complete, file)
    harmless, computing = _left_out(taken, found, states[taken.key], template)
    if computing:
        raise UserError(
            f"{file} does not fit {template.architecture}: it has further layers, "
            f"{_listed(computing)}, without which the model gives other answers. "
            f"{_suggested(states[taken.key], template) or _EXPORT}"
        )
    if weights_key is None:
        _check_other_states(checkpoint, found, taken)
    for name, tensor in taken.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: {name} holds values that are not finite.")
    _copy_versions(states[taken.key], taken)
    notes = tuple(_notes(taken, asked, harmless, template, file))
    return Fitted(taken.tensors, taken.classes, taken.label, notes)


def load_into(module: nn.Module, fitted: Fitted) -> nn.Module:
    """Load weights into a module of their architecture, and print what was noticed about them."""
    for note in fitted.notes:
        step(f"Weights: {note}")
    if not hasattr(fitted.state_dict, "_metadata"):
        # A file of another format than torch's: the module's version decides, as MNASNet needs.
        versions = module.state_dict()._metadata  # type: ignore[attr-defined]  # noqa: SLF001
        fitted.state_dict._metadata = OrderedDict({"": versions[""]})  # type: ignore[attr-defined]  # noqa: SLF001
    module.load_state_dict(fitted.state_dict)
    return module


def _present_name(name: str) -> str:
    for old, present in _OLD_NAMES:
        name = old.sub(present, name)
    return name


def _candidates(key: str, state: StateDict, template: Template) -> Iterator[_Candidate]:
    """Find the prefixes below which most of the architecture's names are, or the best one."""
    few = template.shapes(2 if template.last else 0)
    present = {
        template.rename(name): tensor for name, tensor in state.items() if not _is_counter(name)
    }
    starts = Counter(
        name[:start]
        for name in present
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in few
    )
    required = sum(not name.endswith(".num_batches_tracked") for name in few)
    for number, (prefix, count) in enumerate(starts.most_common(MAX_PREFIXES)):
        own = count >= MIN_SHARE * required
        if own or number == 0:
            yield _candidate(key, prefix, present, template, own=own)


def _candidate(
    key: str, prefix: str, present: StateDict, template: Template, *, own: bool
) -> _Candidate:
    few = template.shapes(2 if template.last else 0)
    last = template.last and _last_layer(prefix, present, template.last, few)
    renamed = {f"{template.last}.{part}": f"{last}.{part}" for part in ("weight", "bias")}
    names = {name: prefix + renamed.get(name, name) for name in few}
    found = {name: inside for name, inside in names.items() if inside in present}
    weight, bias = renamed
    classes = 0
    if weight in found and weight in few:
        shape = present[found[weight]].shape
        classes = shape[0] if len(shape) > 0 and shape[1:] == few[weight][1:] else 0
    expected = template.shapes(classes) if classes else few
    tensors = OrderedDict((name, present[inside]) for name, inside in found.items())
    for name in (name for name in expected if name not in found):
        if name.endswith(".num_batches_tracked"):  # not in files of PyTorch 0.4 and before
            tensors[name] = torch.zeros((), dtype=torch.int64)
        elif name == bias and weight in found:
            tensors[name] = torch.zeros(expected[name])
    lacking = [n for n in expected if n not in tensors and not template.optional(n)]
    problems = [
        f"{name} has the shape {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    if lacking:
        problems.insert(0, f"it lacks {_listed(lacking)}")
    used = frozenset(found.values())
    return _Candidate(key, prefix, tensors, used, classes, own, last, tuple(problems))


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _last_layer(
    prefix: str, present: StateDict, last: str, expected: Mapping[str, torch.Size]
) -> str:
    """Return the name of the layer in the place of the last one.

    It may be in an nn.Sequential there, or in the place of one that holds only the last layer.
    """
    modules = [last]
    parent, _, own = last.rpartition(".")
    siblings = [n for n in expected if n.startswith(f"{parent}.") and not n.startswith(f"{last}.")]
    if parent and not siblings and (own.isdecimal() or parent in _PLAIN_HEADS):
        modules.append(parent)
    for module in modules:
        start = f"{prefix}{module}."
        inside = {name.removeprefix(prefix) for name in present if name.startswith(start)}
        layers = {name.rpartition(".")[0] for name in inside}
        layer = layers.pop() if len(layers) == 1 else ""
        is_linear = {f"{layer}.weight"} <= inside <= {f"{layer}.weight", f"{layer}.bias"}
        if is_linear and re.fullmatch(rf"{re.escape(module)}(\.\d+)?", layer):
            return layer
    return last


def _asked(checkpoint: Checkpoint, found: list[_Candidate], weights_key: str) -> list[_Candidate]:
    """Return the candidates of a key or a prefix, those that it names in full first."""
    wanted = weights_key.rstrip(".") or "."
    in_full = [c for c in found if wanted in (c.label, c.key, c.prefix.rstrip("."))]
    asked = in_full or [c for c in found if f".{wanted}." in f".{c.label}."]
    if not asked and weights_key not in checkpoint.states:
        labels = [c.label for c in found if c.own] or [key or "." for key in checkpoint.states]
        raise UserError(
            f"{checkpoint.file} has no weights {weights_key!r}. "
            f"WEIGHTS_KEY can be: {_listed(labels, limit=20)}."
        )
    return asked


def _preferred(complete: list[_Candidate], file: str) -> _Candidate:
    best = [candidate for candidate in complete if candidate.averaged] or complete
    if len(best) > 1:
        raise UserError(
            f"{file} holds the weights of several models. Choose one with WEIGHTS_KEY: "
            f"{_listed([candidate.label for candidate in complete], limit=20)}."
        )
    return best[0]


def _left_out(
    taken: _Candidate, found: list[_Candidate], state: StateDict, template: Template
) -> tuple[list[str], list[str]]:
    """Return the tensors that the architecture does not have: harmless ones, and all others.

    Those of complete or averaged copies of the model are neither.
    """
    modules = {name.partition(".")[0] for name in template.shapes(2 if template.last else 0)}
    copies = [c for c in found if c.key == taken.key and c.own and (not c.problems or c.averaged)]
    used = frozenset().union(*(copy.used for copy in (taken, *copies)))
    prefixes = tuple(c.prefix for c in copies if c.prefix and not taken.prefix.startswith(c.prefix))
    harmless, computing = [], []
    for name, tensor in state.items():
        present = template.rename(name)
        inner = present.removeprefix(taken.prefix)
        below = present.startswith(taken.prefix)
        if present in used or present.startswith(prefixes) or (below and template.optional(inner)):
            continue
        inside = below and inner.partition(".")[0] in modules
        if _is_harmless(name, tensor, inside=inside):
            harmless.append(name)
        else:
            computing.append(f"{name} {list(tensor.shape)}")
    return harmless, computing


def _is_harmless(name: str, tensor: Tensor, *, inside: bool) -> bool:
    """Whether a tensor computes nothing: a counter, or, outside the model, a loss's weights.

    One of a loss with two dimensions is none of these: ArcFace's, for example, is the last layer.
    """
    if tensor.numel() == 1 and _is_counter(name):
        return True
    if inside:
        return False
    is_scalar = tensor.numel() == 1 and not tensor.is_floating_point()
    return is_scalar or (tensor.dim() <= 1 and _LOSS.search(name) is not None)


def _check_other_states(checkpoint: Checkpoint, found: list[_Candidate], taken: _Candidate) -> None:
    """Raise `UserError` for state dicts that may be another part of the model."""
    copies = {c.key for c in found if c.own and (not c.problems or c.averaged)}
    others = [
        key
        for key, state in checkpoint.states.items()
        if key not in copies and any(t.dim() > 1 for t in state.values())
    ]
    if others:
        raise UserError(
            f"{checkpoint.file} holds further layers under {_listed(k or '.' for k in others)}. If "
            f"they are no part of the model, choose its weights: WEIGHTS_KEY={taken.label}"
        )


def _copy_versions(state: StateDict, taken: _Candidate) -> None:
    """Keep the versions of the file's layers, by which they convert old parameters."""
    versions = {
        f"{module}."[len(taken.prefix) : -1]: version
        for module, version in getattr(state, "_metadata", {}).items()
        if f"{module}.".startswith(taken.prefix)
    }
    if versions:
        taken.tensors._metadata = OrderedDict(versions)  # type: ignore[attr-defined]  # noqa: SLF001


def _notes(
    taken: _Candidate,
    asked: list[_Candidate],
    harmless: list[str],
    template: Template,
    file: str,
) -> Iterator[str]:
    raw = [c.label for c in asked if not c.problems and not c.averaged]
    incomplete = [c for c in asked if c.own and c.problems and c.averaged]
    if taken.averaged and raw:
        yield f"Took the averaged weights, {taken.label}. The raw ones: WEIGHTS_KEY={raw[0]}"
    elif incomplete:
        yield (
            f"Took {taken.label}, since the averaged weights, {incomplete[0].label}, are "
            f"incomplete: {incomplete[0].problems[0]}."
        )
    if taken.prefix:
        yield f"Removed the prefix {printable(taken.prefix)} from the names in {file}."
    if harmless:
        yield f"Left out, since they are no part of the model: {_listed(harmless, limit=20)}."
    if taken.last != template.last and taken.last.rpartition(".")[2] not in {"0", taken.last}:
        yield (
            f"Whatever comes before {taken.last} in {template.last} is taken as dropout, which "
            "changes no answers. If it is anything else, such as an activation, export the whole "
            "model to ONNX."
        )


def _misfit(
    checkpoint: Checkpoint, asked: list[_Candidate], state: StateDict, template: Template
) -> str:
    """Explain why no state dict fits, and what to do."""
    file = checkpoint.file
    best = max(asked, key=lambda c: (c.own, len(c.used)), default=None)
    if best is None or not best.own:
        state = checkpoint.states[best.key] if best else state
        library = _library(state, template)
        return (
            f"{file} does not fit {template.architecture}: its first names are "
            f"{_listed(state)}. {library or _suggested(state, template) or _EXPORT}"
        )
    state = checkpoint.states[best.key]
    _check_channels(best, template, file)
    problems = _listed(best.problems, separator="; ")
    further = _left_out(best, asked, state, template)[1]
    has = f"; it has {_listed(further)} besides" if further else ""
    classes = f" with {best.classes} classes" if best.classes else ""
    hint = _suggested(state, template) or _EXPORT
    return f"{file} does not fit {template.architecture}{classes}: {problems}{has}. {hint}"


def _check_channels(candidate: _Candidate, template: Template, file: str) -> None:
    """Raise `UserError` for weights that take images of other channels than three."""
    for name, shape in template.shapes(2 if template.last else 0).items():
        if len(shape) == 4 and shape[1] == 3:  # noqa: PLR2004  # a convolution of an image
            found = candidate.tensors[name].shape if name in candidate.tensors else shape
            if len(found) == len(shape) and found[1] != shape[1]:
                raise UserError(
                    f"{file} takes images of {found[1]} channel(s): {name} has the shape "
                    f"{list(found)}. Here images have 3: red, green and blue, also gray ones. "
                    "Train with those, as Grayscale(num_output_channels=3) of torchvision's "
                    "transforms gives."
                )
            return


def _library(state: StateDict, template: Template) -> str:
    """Return what to do with the names of another library; empty if they are none's."""
    for pattern, text in _LIBRARIES.items():
        if any(re.search(pattern, name) for name in state):
            return "" if template.architecture.startswith("timm/") and "timm/" in text else text
    return ""


def _suggested(state: StateDict, template: Template) -> str:
    """Name the architecture of torchvision whose layers these are, if one's."""
    size = sum(t.numel() for name, t in state.items() if ".running_" not in name)
    for name in architectures():
        parameters = official_weights(name).meta["num_params"]
        limit = max(MAX_LAST_LAYER_PARAMETERS, MAX_DIFFERENCE * parameters)
        if name == template.architecture or abs(size - parameters) > limit:
            continue
        other = torchvision_template(name)
        for candidate in _candidates("", state, other):
            if not candidate.problems and not _left_out(candidate, [candidate], state, other)[1]:
                return f"Its layers are those of {name}: ARCH={name}"
    return ""


def _listed(items: Iterable[str], *, limit: int = MAX_LISTED, separator: str = ", ") -> str:
    texts = [printable(item[:200]) for item in items]
    more = f"{separator}and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + more
