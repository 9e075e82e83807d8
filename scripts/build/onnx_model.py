"""Reads an ONNX file from elsewhere, and makes of it a graph as the handler's engine takes it.

The file is a stranger's. Its size is looked at before it is read, and nothing outside of it is: no
weights in other files, no operators but ONNX's own, of which none runs code or reads a file.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from handler.settings import Preprocessing
from scripts.build.onnx_trial import newest_opset
from scripts.terminal import UserError

# A file of ONNX is one message of protobuf, which holds no more.
MAX_BYTES = 2**31 - 1

# What functions may become, in nodes; of a large node each begun KiB counts as one. With functions
# that each call the one before twice, a few KB can become more than any memory holds.
MAX_INLINED = 1_000_000
_NODE_BYTES = 1024

# Broadcasting is as it is today from here on.
OLDEST_OPSET = 8

_OWN_DOMAINS = {"", "ai.onnx"}
_QUANTISED = {
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
}
_TYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}
_CHANNELS = 3
_PICTURE_AXES = 4

# Before the names of what is added, so that they are no names of the file's.
_PREFIX = "classification_service/"

_HANDLERS = {"images", "logits", "features", "embedding"}

# They pass a flat row of numbers on as it is.
_SAME_NUMBERS = {"Flatten", "Reshape", "Squeeze", "Identity", "Dropout"}

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}

# What they give has no bounds: where it lies between 0 and 1 that is chance.
_LINEAR = {"Gemm", "MatMul", "Add", "Conv"}


@dataclass(frozen=True)
class Input:
    """What a model takes.

    Attributes:
        name: of the graph's input.
        dtype: float32, float16 or uint8.
        layouts: "NCHW", "NHWC", or both where its shape does not say.
        side: of the square picture, in pixels; None where any will do.
    """

    name: str
    dtype: str
    layouts: tuple[str, ...]
    side: int | None

    def of(self, images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.generic]:
        """The model's own input.

        Args:
            images: uint8 (N, 3, crop, crop).
            preprocessing: of which channels, mean and std count.
        """
        mean, std = (
            np.array(v, np.float32).reshape(_CHANNELS, 1, 1)
            for v in (preprocessing.mean, preprocessing.std)
        )
        values = images[:, ::-1] if preprocessing.channels == "bgr" else images
        if self.dtype != "uint8":
            values = ((values.astype(np.float32) / 255 - mean) / std).astype(self.dtype)
        return values if self.layouts == ("NCHW",) else values.transpose(0, 2, 3, 1)


@dataclass(frozen=True)
class Head:
    """The last layer, where it is linear and its input is a mean of features.

    Attributes:
        pooled: the tensor that it takes, (N, channels).
        features: the tensor of whose means that is made; empty where it is not known.
        weights: float32 (classes, channels).
        bias: float32 (classes,).
        channels_last: whether `features` is (N, height, width, channels).
    """

    pooled: str
    features: str
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    channels_last: bool = False


@dataclass(frozen=True)
class Output:
    """Where a model's logits are.

    Attributes:
        tensor: in the graph.
        name: of the graph's output that they are, or that is made of them.
        activation: the operator between the two, which is left out; empty for none.
        probabilities: they are no logits, but probabilities, made by other operators.
        single: there is one, for two classes.
    """

    tensor: str
    name: str
    activation: str = ""
    probabilities: bool = False
    single: bool = False


@dataclass
class Model:
    """A file that was read and found harmless.

    Attributes:
        file: its name.
        proto: its content; functions are inlined.
        input: what it takes.
    """

    file: str
    proto: ModelProto
    input: Input
    producers: dict[str, NodeProto] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.proto.graph
        self.producers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    @property
    def half(self) -> bool:
        """Whether some of it computes in half precision."""
        casts = {_casts_to(node) for node in _nodes(self.proto)}
        return self.input.dtype == "float16" or TensorProto.FLOAT16 in casts


# --- Reading ---


def read(path: Path) -> Model:
    """Reads a file and checks it; raises `UserError` with what is wrong and how to go on."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(
                f"{path} has {size / 1e9:.1f} GB. One file of ONNX holds 2 GB at most, and here a "
                "model must be one file. Use a smaller one, or save it in float16."
            )
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The model {path} cannot be read: {error.strerror}.") from error
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own kinds
        raise UserError(f"{path} is no ONNX file, or is cut off.") from error
    if not proto.graph.node or not proto.graph.output:
        raise UserError(f"{path} is no ONNX file, or its graph is empty.")
    _check_external(proto, path)
    _check_operators(proto, path)
    _check_opset(proto, path)
    proto = _inlined(proto, path)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # its own kinds, and protobuf's
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no valid ONNX model: {first}.") from error
    return Model(path.name, proto, _input(proto, path))


def _graphs(proto: ModelProto) -> Iterator[GraphProto]:
    """The graph and all within it."""
    yield proto.graph
    yield from _graphs_within(proto.graph.node)
    for function in proto.functions:
        yield from _graphs_within(function.node)


def _graphs_within(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    waiting = list(nodes)
    while waiting:
        for attribute in waiting.pop().attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield graph
                waiting.extend(graph.node)


def _nodes(proto: ModelProto) -> Iterator[NodeProto]:
    yield from _all_nodes(proto.graph.node)
    for function in proto.functions:
        yield from _all_nodes(function.node)


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    for graph in _graphs(proto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _check_external(proto: ModelProto, path: Path) -> None:
    for tensor in _tensors(proto):
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            where = next((e.value for e in tensor.external_data if e.key == "location"), "?")
            raise UserError(
                f"{path} keeps its weights in another file ({where[:100]!r}). Here a model must be "
                "one file. To make it one, load it where you trust it and save it again: "
                "onnx.save(onnx.load('model.onnx'), 'one.onnx')"
            )


def _check_operators(proto: ModelProto, path: Path) -> None:
    """A file's own functions are made of others; whatever else is not ONNX's needs a library."""
    known = {(function.domain, function.name) for function in proto.functions}
    operators = {(node.domain, node.op_type) for node in _nodes(proto)} - known
    quantised = sorted(name for _, name in operators if name in _QUANTISED or "QLinear" in name)
    if quantised:
        raise UserError(
            f"{path} is in 8 bits already ({', '.join(quantised[:3])}). What that gives depends on "
            "the processor, and cannot be compared with float32 here. Bring the float32 model: "
            "PRECISION=int8 makes 8 bits of it, and measures what that costs."
        )
    custom = sorted(f"{domain}.{name}" for domain, name in operators if domain not in _OWN_DOMAINS)
    if custom:
        raise UserError(
            f"{path} has operators that are not ONNX's own, and would need a library: "
            f"{', '.join(custom[:3])[:200]}. Export it with standard operators only."
        )


def _check_opset(proto: ModelProto, path: Path) -> None:
    versions = [i.version for i in proto.opset_import if i.domain in _OWN_DOMAINS]
    newest, found = newest_opset(), max(versions, default=0)
    if not OLDEST_OPSET <= found <= newest:
        raise UserError(
            f"{path} is written in version {found} of ONNX's operators (opset). ONNX Runtime here "
            f"knows {OLDEST_OPSET} to {newest}. Export it again with opset_version=20."
        )


def _inlined(proto: ModelProto, path: Path) -> ModelProto:
    if not proto.functions:
        return proto
    _check_functions(proto, path)
    try:
        return inliner.inline_local_functions(proto)
    except Exception as error:  # too many functions, say, or calls too deep
        raise UserError(f"{path} has functions that cannot be resolved.") from error


def _check_functions(proto: ModelProto, path: Path) -> None:
    """Counts what functions would become, before they do."""
    bodies: dict[tuple[str, ...], list[NodeProto]] = {}
    for function in proto.functions:
        body = bodies.setdefault((function.domain, function.name, function.overload), [])
        body.extend(_all_nodes(function.node))
    calls = {
        name: {_called(node) for node in body} & bodies.keys() for name, body in bodies.items()
    }
    own = list(_all_nodes(proto.graph.node))
    calling = [node for node in chain(own, *bodies.values()) if _called(node) in bodies]
    passed = [a for node in calling for a in node.attribute]
    passed += [a for function in proto.functions for a in function.attribute_proto]
    if any(a.HasField("g") or a.graphs for a in passed):
        raise UserError(
            f"{path} has functions that take graphs as attributes. Export it without functions."
        )
    largest = max((a.ByteSize() for a in passed), default=0)
    sizes: dict[tuple[str, ...], int] = {}
    try:
        for name in TopologicalSorter(calls).static_order():
            size = sum(sizes.get(_called(node)) or _size(node, largest) for node in bodies[name])
            # Not exactly beyond the bound: the numbers would have a digit a call.
            sizes[name] = min(size, MAX_INLINED + 1)
    except CycleError as error:
        raise UserError(
            f"{path} has functions that call themselves, which ONNX forbids. Export it again."
        ) from error
    if sum(sizes.get(_called(node), 0) for node in own) > MAX_INLINED:
        raise UserError(
            f"{path} has functions that call one another so often that more than "
            f"{MAX_INLINED:,} nodes would come of them. Export it without functions."
        )


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """They and those of the graphs within them."""
    nodes = list(nodes)
    yield from nodes
    for graph in _graphs_within(nodes):
        yield from graph.node


def _called(node: NodeProto) -> tuple[str, ...]:
    return node.domain, node.op_type, node.overload


def _size(node: NodeProto, largest: int) -> int:
    """In nodes, where each attribute that is a function's argument may be the largest of all."""
    arguments = sum(bool(attribute.ref_attr_name) for attribute in node.attribute)
    size: int = node.ByteSize() + arguments * largest
    return 1 + size // _NODE_BYTES


def _input(proto: ModelProto, path: Path) -> Input:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs[:5])
        raise UserError(f"{path} must have one input, the pictures. It has {len(inputs)}: {names}.")
    (value,) = inputs
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        known = kind.elem_type in TensorProto.DataType.values()
        number = kind.elem_type
        name = TensorProto.DataType.Name(number) if known else f"a type that is none ({number})"
        raise UserError(f"{path} takes {name}. It must take {', '.join(_TYPES.values())}.")
    # Some exporters write -1 for a size that is not fixed; of none that is said 0 is read.
    sizes = [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim]
    sizes = sizes or [None] * _PICTURE_AXES
    shown = " x ".join("?" if size is None else str(size) for size in sizes)
    if len(sizes) != _PICTURE_AXES:
        raise UserError(
            f"{path} takes a tensor of {shown}. It must take pictures: N x 3 x height x width, or "
            "N x height x width x 3."
        )
    layouts = _layouts(sizes)
    if not layouts:
        raise UserError(
            f"{path} takes a tensor of {shown}, in which no axis has 3 channels. Here pictures are "
            "red, green and blue, grey ones too."
        )
    sides = {size for size in (sizes[2:] if layouts[0] == "NCHW" else sizes[1:3]) if size}
    if len(sides) > 1:
        raise UserError(f"{path} takes pictures of {shown}. Here they must be squares.")
    return Input(value.name, _TYPES[kind.elem_type], layouts, next(iter(sides), None))


def _layouts(sizes: list[int | None]) -> tuple[str, ...]:
    first, last = sizes[1] == _CHANNELS, sizes[3] == _CHANNELS
    if first != last:
        return ("NCHW",) if first else ("NHWC",)
    if first or (sizes[1] is None and sizes[3] is None):
        return ("NCHW", "NHWC")
    if sizes[1] is None or sizes[3] is None:
        return ("NCHW",) if sizes[1] is None else ("NHWC",)
    return ()


# --- What its output is ---


def outputs(model: Model) -> int | None:
    """Return the number of values of a model's only output, if the file says it."""
    if len(model.proto.graph.output) != 1:
        return None
    sizes = [d.dim_value for d in model.proto.graph.output[0].type.tensor_type.shape.dim[1:]]
    return int(np.prod(sizes)) if sizes and all(size > 0 for size in sizes) else None


def output(
    model: Model,
    given: Mapping[str, NDArray[np.generic]],
    classes: int,
    *,
    several: bool = False,
) -> Output:
    """Finds the logits.

    Args:
        model: as read.
        given: what the model gave for some pictures, by output, with an axis of pictures first.
        classes: how many are named.
        several: whether a picture can have several labels.

    Raises:
        UserError: no output has a number a class, or several have; or it ends in the other
            activation, or in one that is not known.
    """
    sizes = {name: [1, *values.shape[1:]] for name, values in given.items()}
    wanted = {classes}
    if classes == 2 and not several:  # noqa: PLR2004
        wanted.add(1)  # it tells two apart
    fitting = [n for n, s in sizes.items() if len(s) > 1 and int(np.prod(s)) in wanted]
    if len(fitting) != 1:
        shown = ", ".join(f"{n} {' x '.join(map(str, s))}" for n, s in list(sizes.items())[:5])
        number = "no" if not fitting else "more than one"
        raise UserError(
            f"{model.file} has {number} output with a number for each of the {classes} classes "
            f"that CLASSES names. It has: {shown}."
        )
    (name,) = fitting
    values = given[name].astype(np.float64).reshape(len(given[name]), -1)
    single = values.shape[1] < classes
    node = _last(model, name)
    last = node.op_type if node is not None else ""
    if last == "Sigmoid" and not several and not single:
        raise UserError(
            f"{model.file} ends in a sigmoid: it gives each class a probability of its own, for "
            "several labels a picture. Say so: ACTIVATION=sigmoid"
        )
    if last in {"Softmax", "LogSoftmax"} and several:
        raise UserError(
            f"{model.file} ends in a softmax: its probabilities are of one class of all. Leave "
            "ACTIVATION=sigmoid out."
        )
    if node is not None and last in {"Softmax", "Sigmoid"}:
        return Output(node.input[0], name, last, single=single)
    # Half precision makes a little more than 1 of them.
    within = bool(((values >= 0) & (values < 1 + 1e-3)).all())
    sum_to_one = bool((np.abs(values.sum(1) - 1) < 1e-3).all())  # noqa: PLR2004
    probabilities = within and sum_to_one and not single and not several
    if within and not probabilities and last not in _LINEAR:
        raise UserError(
            f"{model.file} gives numbers from 0 to 1 only, so most likely probabilities, and its "
            f"graph does not show what made them: it ends in {last or 'its input'}. Export it "
            "without a sigmoid or softmax, or with that as its last operator."
        )
    tensor = _through(model, name, {"Identity"})
    return Output(tensor, name, probabilities=probabilities, single=single)


def _last(model: Model, name: str) -> NodeProto | None:
    """The last operator that does more than pass numbers on, in whatever precision."""
    node = model.producers.get(_through(model, name, _SAME_NUMBERS))
    while node is not None and _casts_to(node) in _FLOATS:
        node = model.producers.get(_through(model, node.input[0], _SAME_NUMBERS))
    return node


def _casts_to(node: NodeProto) -> int | None:
    """The type that a cast gives; None for other operators."""
    return next((a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"), None)


def _through(model: Model, name: str, operators: set[str]) -> str:
    """Return the tensor from which operators without effect made another.

    A cast to float32 may have an effect: whoever passes it compares the numbers afterwards.
    """
    while (node := model.producers.get(name)) is not None and (
        node.op_type in operators or _casts_to(node) == TensorProto.FLOAT
    ):
        name = node.input[0]
    return name


def head(model: Model, found: Output) -> Head | None:
    """The last layer, as far as the graph shows it; None where it is no linear one in float32."""
    tensor = _through(model, found.tensor, _SAME_NUMBERS)
    node = model.producers.get(tensor)
    bias: NDArray[np.float32] | None = None
    if node is not None and node.op_type == "Add":
        sides = [i for i in node.input if _constant(model, i) is None]
        constants = [c for i in node.input if (c := _constant(model, i)) is not None]
        if len(sides) != 1 or len(constants) != 1:
            return None
        side = _through(model, sides[0], _SAME_NUMBERS)
        bias, node = constants[0].reshape(-1), model.producers.get(side)
    if node is None or node.op_type not in {"Gemm", "MatMul"}:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if (
        attributes.get("alpha", 1) != 1
        or attributes.get("beta", 1) != 1
        or attributes.get("transA")
    ):
        return None
    weights = _constant(model, node.input[1])
    if len(node.input) > 2 and node.input[2]:  # noqa: PLR2004  # Gemm's own bias
        bias = _constant(model, node.input[2])
    if weights is None or weights.ndim != 2:  # noqa: PLR2004
        return None
    weights = weights if attributes.get("transB") else weights.T
    if bias is None or bias.size != len(weights):
        bias = np.zeros(len(weights), np.float32)
    pool = model.producers.get(_through(model, node.input[0], _SAME_NUMBERS))
    features = pool.input[0] if pool is not None and _is_mean(pool) else ""
    return Head(node.input[0], features, np.ascontiguousarray(weights), bias.reshape(-1))


def _constant(model: Model, name: str) -> NDArray[np.float32] | None:
    tensor = model.constants.get(_through(model, name, {"Identity"}))
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return None
    values: NDArray[np.float32] = numpy_helper.to_array(tensor)
    return values


def _is_mean(node: NodeProto) -> bool:
    """That it is one over all positions is seen where it runs."""
    return node.op_type in {"GlobalAveragePool", "ReduceMean", "AveragePool"}


# --- What the engine takes ---


def with_free_batch(model: Model, batch: int | None) -> ModelProto:
    """The model for any number of pictures, or for exactly so many."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.ClearField("value_info")
    for value in proto.graph.input:
        if value.name == model.input.name and value.type.tensor_type.shape.dim:
            _set_batch(value, batch)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def _set_batch(value: onnx.ValueInfoProto, batch: int | None) -> None:
    axis = value.type.tensor_type.shape.dim[0]
    axis.Clear()
    if batch is None:
        axis.dim_param = "N"
    else:
        axis.dim_value = batch


def rewritten(
    model: Model,
    preprocessing: Preprocessing,
    found: Output,
    last: Head | None,
    batch: int | None,
) -> ModelProto:
    """The model with normalisation inside and the handler's names.

    Args:
        model: as read, with one layout.
        preprocessing: of which crop, mean and std count.
        found: its logits.
        last: its last layer, if pooled features are to be given out.
        batch: see `with_free_batch`.

    Returns:
        a graph from `images`, uint8 (N, 3, crop, crop), to `logits`, float32 (N, classes), and
        where there are any to `features`, float32 (N, channels, height, width), and `embedding`,
        float32 (N, channels).
    """
    proto = with_free_batch(model, batch)
    outputs = {"logits": found.tensor}
    if last is not None:
        outputs |= {"embedding": last.pooled} | (
            {"features": last.features} if last.features else {}
        )
    _make_way(proto)
    graph = proto.graph
    given = dataclasses.replace(model.input, name=_other(model.input.name))
    before = list(_prepared(given, preprocessing, graph))
    after = list(_answered(found, graph))
    if last is not None:
        after.append(_node("Identity", [_other(last.pooled)], ["embedding"]))
    if last is not None and last.features:
        operator, turn = (
            ("Transpose", {"perm": [0, 3, 1, 2]}) if last.channels_last else ("Identity", {})
        )
        after.append(_node(operator, [_other(last.features)], ["features"], **turn))
    constants = {tensor.name for tensor in graph.initializer}
    crop = preprocessing.crop
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, [batch or "N", _CHANNELS, crop, crop]
    )
    kept = [value for value in graph.input if value.name in constants]
    promised = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    for name, values in (
        ("node", [*before, *graph.node, *after]),
        ("input", [images, *kept]),
        ("output", promised),
    ):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(name)
        getattr(graph, name).extend(copies)
    for part in (proto, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return proto


def _node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    name = f"{_PREFIX}{outputs[0].removeprefix(_PREFIX)}"
    return helper.make_node(operator, inputs, outputs, name, **attributes)


def _add_constant(graph: GraphProto, name: str, values: NDArray[np.generic]) -> str:
    graph.initializer.append(numpy_helper.from_array(values, _PREFIX + name))
    return _PREFIX + name


def _prepared(given: Input, preprocessing: Preprocessing, graph: GraphProto) -> Iterator[NodeProto]:
    """From `images` to the model's own input, in the steps of torchvision's transforms."""
    tensor = "images"

    def step(operator: str, name: str, *others: str, **attributes: Any) -> NodeProto:
        nonlocal tensor
        before, tensor = tensor, _PREFIX + name
        return _node(operator, [before, *others], [tensor], **attributes)

    if preprocessing.channels == "bgr":
        order = _add_constant(graph, "bgr", np.array([2, 1, 0], np.int64))
        yield step("Gather", "reversed", order, axis=1)
    if given.dtype != "uint8":
        yield step("Cast", "float", to=TensorProto.FLOAT)
        yield step("Div", "scaled", _add_constant(graph, "255", np.array(255, np.float32)))
        for operator, name in (("Sub", "mean"), ("Div", "std")):
            values = np.array(getattr(preprocessing, name), np.float32).reshape(1, _CHANNELS, 1, 1)
            yield step(operator, f"by_{name}", _add_constant(graph, name, values))
    if given.dtype == "float16":
        yield step("Cast", "half", to=TensorProto.FLOAT16)
    if given.layouts == ("NHWC",):
        yield step("Transpose", "turned", perm=[0, 2, 3, 1])
    yield _node("Identity", [tensor], [given.name])


def _answered(found: Output, graph: GraphProto) -> Iterator[NodeProto]:
    """From where the logits are to `logits`."""
    tensor = _other(found.tensor)

    def step(operator: str, name: str, *others: str, **attributes: Any) -> NodeProto:
        nonlocal tensor
        before, tensor = tensor, _PREFIX + name
        return _node(operator, [before, *others], [tensor], **attributes)

    yield step("Cast", "logits_float", to=TensorProto.FLOAT)
    yield step("Flatten", "logits_flat", axis=1)
    if found.probabilities:
        least = _add_constant(graph, "least", np.array(1e-37, np.float32))
        yield step("Max", "positive", least)
        yield step("Log", "log")
    if found.single:
        one, zero = tensor, _PREFIX + "zero"
        yield _node("Sub", [one, one], [zero])
        yield _node("Concat", [zero, one], [_PREFIX + "two"], axis=1)
        tensor = _PREFIX + "two"
    yield _node("Identity", [tensor], ["logits"])


def _other(name: str) -> str:
    """What a tensor of the file is called beside the handler's."""
    return f"{_PREFIX}its_{name}" if name in _HANDLERS else name


def _make_way(proto: ModelProto) -> None:
    """Renames what in the file has the names that the handler looks for."""
    for graph in _graphs(proto):
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [_other(name) for name in names]
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = _other(value.name)
