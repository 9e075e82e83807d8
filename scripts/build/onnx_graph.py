"""Find the logits and the last layer of an ONNX model, and rewrite its graph for the engine."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from handler.settings import Preprocessing
from scripts.build.onnx_model import CHANNELS, Input, Model, cast_type, parts
from scripts.terminal import UserError

# Begins the names of all that is added, so that they differ from the file's own names.
_PREFIX = "classification_service/"

# The names that the engine uses.
_RESERVED = {"images", "logits", "features", "embedding"}

# Operators that change the shape of a row of numbers at most.
_RESHAPING = {"Flatten", "Reshape", "Squeeze", "Identity", "Dropout"}

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}

# Operators whose results are unbounded: if they lie between 0 and 1, that is chance.
_LINEAR = {"Gemm", "MatMul", "Add", "Conv"}

# Operators that may be a mean over all positions; `convert` compares numbers to be sure.
_MEANS = {"GlobalAveragePool", "ReduceMean", "AveragePool"}


@dataclass(frozen=True)
class Head:
    """A linear last layer.

    Attributes:
        pooled: the tensor that it takes, (N, channels).
        features: the tensor whose means are `pooled`; empty if there is none.
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
    """The logits of a model.

    Attributes:
        tensor: the logits, within the graph.
        name: the graph's output that equals them or is computed from them.
        activation: the operator between the two, which is left out; empty for none.
        probabilities: whether `tensor` holds probabilities, of which the logarithm is taken.
        single: whether it is one value for two classes.
    """

    tensor: str
    name: str
    activation: str = ""
    probabilities: bool = False
    single: bool = False


def find_logits(
    model: Model, given: Mapping[str, NDArray[np.generic]], classes: int, *, multilabel: bool
) -> Output:
    """Find the logits, given each output of the model for some images, (N, ...)."""
    sizes = {name: [1, *values.shape[1:]] for name, values in given.items()}
    # One value, as of binary classifiers.
    wanted = {1, 2} if classes == 2 and not multilabel else {classes}
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
    node = _last_operator(model, name)
    last = node.op_type if node is not None else ""
    if last == "Sigmoid" and not multilabel and not single:
        raise UserError(
            f"{model.file} ends in a sigmoid: it gives each class a probability of its own, as "
            "multi-label models do. Build it with ACTIVATION=sigmoid"
        )
    if last in {"Softmax", "LogSoftmax"} and multilabel:
        raise UserError(
            f"{model.file} ends in a softmax: its probabilities are of one class of all. Leave "
            "ACTIVATION=sigmoid out."
        )
    if node is not None and last in {"Softmax", "Sigmoid"}:
        return Output(node.input[0], name, last, single=single)
    # Half precision rounds some to a little more than 1.
    within = bool(((values >= 0) & (values < 1 + 1e-3)).all())
    sum_to_one = bool((np.abs(values.sum(1) - 1) < 1e-3).all())
    probabilities = within and sum_to_one and not single and not multilabel
    if within and not probabilities and last not in _LINEAR:
        raise UserError(
            f"{model.file} gives numbers from 0 to 1 only, so most likely probabilities, and its "
            f"graph does not show what made them: it ends in {last or 'its input'}. Export it "
            "without a sigmoid or softmax, or with that as its last operator."
        )
    tensor = _source(model, name, {"Identity"})
    return Output(tensor, name, probabilities=probabilities, single=single)


def _last_operator(model: Model, name: str) -> NodeProto | None:
    """Return the last operator that does more than reshape and cast to another precision."""
    node = model.producers.get(_source(model, name))
    while node is not None and cast_type(node) in _FLOATS:
        node = model.producers.get(_source(model, node.input[0]))
    return node


def _source(model: Model, name: str, operators: set[str] = _RESHAPING) -> str:
    """Return the tensor that a chain of `operators` and casts to float32 begins with.

    A cast can change numbers: callers compare them afterwards.
    """
    while (node := model.producers.get(name)) is not None and (
        node.op_type in operators or cast_type(node) == TensorProto.FLOAT
    ):
        name = node.input[0]
    return name


def find_head(model: Model, found: Output) -> Head | None:
    """Return the last layer; None if the graph shows no linear one in float32."""
    node = model.producers.get(_source(model, found.tensor))
    bias: NDArray[np.float32] | None = None
    if node is not None and node.op_type == "Add":
        sides = [i for i in node.input if _constant(model, i) is None]
        constants = [c for i in node.input if (c := _constant(model, i)) is not None]
        if len(sides) != 1 or len(constants) != 1:
            return None
        bias, node = constants[0].reshape(-1), model.producers.get(_source(model, sides[0]))
    if node is None or node.op_type not in {"Gemm", "MatMul"}:
        return None
    weights = _constant(model, node.input[1])
    if weights is None or weights.ndim != 2:
        return None
    if len(node.input) > 2 and node.input[2]:  # Gemm's own bias
        bias = _constant(model, node.input[2])
    # A factor or a transposed input shows in the numbers, which `convert` compares.
    weights = weights if any(a.name == "transB" and a.i for a in node.attribute) else weights.T
    if bias is None or bias.size != len(weights):
        bias = np.zeros(len(weights), np.float32)
    pool = model.producers.get(_source(model, node.input[0]))
    features = pool.input[0] if pool is not None and pool.op_type in _MEANS else ""
    return Head(node.input[0], features, np.ascontiguousarray(weights), bias.reshape(-1))


def _constant(model: Model, name: str) -> NDArray[np.float32] | None:
    """Return the values of a float32 constant; None for other tensors."""
    tensor = model.constants.get(_source(model, name, {"Identity"}))
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return None
    values: NDArray[np.float32] = numpy_helper.to_array(tensor)
    return values


def with_batch(model: Model, batch: int | None) -> ModelProto:
    """Return a copy of the model for a batch of a fixed size, or of any size if it is None."""
    proto = copy.deepcopy(model.proto)
    proto.graph.ClearField("value_info")
    for value in proto.graph.input:
        if value.name == model.input.name and value.type.tensor_type.shape.dim:
            axis = value.type.tensor_type.shape.dim[0]
            axis.Clear()
            if batch is None:
                axis.dim_param = "N"
            else:
                axis.dim_value = batch
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def rewrite(
    model: Model,
    preprocessing: Preprocessing,
    found: Output,
    head: Head | None,
    batch: int | None,
) -> ModelProto:
    """Put normalization into the graph of a model with one layout, and name inputs and outputs.

    Returns:
        a graph from `images`, uint8 (N, 3, crop, crop), to `logits`, float32 (N, classes), and
        with a head to `embedding`, float32 (N, channels), and, if it has features, to `features`,
        float32 (N, channels, height, width). For `batch` see `with_batch`.
    """
    proto = with_batch(model, batch)
    _rename_reserved(proto)
    graph = proto.graph
    before = _input_nodes(model.input, preprocessing, graph)
    after = _output_nodes(found, graph)
    outputs = ["logits"]
    if head is not None:
        outputs.append("embedding")
        after.append(_node("Identity", [_renamed(head.pooled)], "embedding"))
    if head is not None and head.features:
        outputs.append("features")
        order = {"perm": [0, 3, 1, 2]} if head.channels_last else {}
        operator = "Transpose" if order else "Identity"
        after.append(_node(operator, [_renamed(head.features)], "features", **order))
    constants = {tensor.name for tensor in graph.initializer}
    crop = preprocessing.crop
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, [batch or "N", CHANNELS, crop, crop]
    )
    for name, values in (
        ("node", [*before, *graph.node, *after]),
        ("input", [images, *(value for value in graph.input if value.name in constants)]),
        ("output", [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]),
    ):
        copies = copy.deepcopy(values)
        graph.ClearField(name)
        getattr(graph, name).extend(copies)
    for part in (proto, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return proto


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    name = f"{_PREFIX}{output.removeprefix(_PREFIX)}"
    return helper.make_node(operator, inputs, [output], name, **attributes)


@dataclass
class _Chain:
    """Nodes that each take the output of the one before, and constants of the graph."""

    graph: GraphProto
    tensor: str
    nodes: list[NodeProto] = field(default_factory=list)

    def add(self, operator: str, name: str, *others: str, **attributes: Any) -> None:
        before, self.tensor = self.tensor, _PREFIX + name
        self.nodes.append(_node(operator, [before, *others], self.tensor, **attributes))

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        self.graph.initializer.append(numpy_helper.from_array(values, _PREFIX + name))
        return _PREFIX + name

    def finish(self, output: str) -> list[NodeProto]:
        return [*self.nodes, _node("Identity", [self.tensor], output)]


def _input_nodes(taken: Input, preprocessing: Preprocessing, graph: GraphProto) -> list[NodeProto]:
    """Return the nodes from `images` to the model's own input, as torchvision's transforms do."""
    nodes = _Chain(graph, "images")
    if preprocessing.channels == "bgr":
        order = nodes.constant("bgr", np.array([2, 1, 0], np.int64))
        nodes.add("Gather", "reversed", order, axis=1)
    if taken.dtype != "uint8":
        nodes.add("Cast", "float", to=TensorProto.FLOAT)
        nodes.add("Div", "scaled", nodes.constant("255", np.array(255, np.float32)))
        for operator, name in (("Sub", "mean"), ("Div", "std")):
            values = np.array(getattr(preprocessing, name), np.float32).reshape(1, CHANNELS, 1, 1)
            nodes.add(operator, f"by_{name}", nodes.constant(name, values))
    if taken.dtype == "float16":
        nodes.add("Cast", "half", to=TensorProto.FLOAT16)
    if taken.layouts == ("NHWC",):
        nodes.add("Transpose", "turned", perm=[0, 2, 3, 1])
    return nodes.finish(_renamed(taken.name))


def _output_nodes(found: Output, graph: GraphProto) -> list[NodeProto]:
    """Return the nodes from the model's own logits to `logits`."""
    nodes = _Chain(graph, _renamed(found.tensor))
    nodes.add("Cast", "logits_float", to=TensorProto.FLOAT)
    nodes.add("Flatten", "logits_flat", axis=1)
    if found.probabilities:
        nodes.add("Max", "positive", nodes.constant("least", np.array(1e-37, np.float32)))
        nodes.add("Log", "log")
    if found.single:
        one = nodes.tensor
        nodes.add("Sub", "zero", one)
        nodes.add("Concat", "two", one, axis=1)
    return nodes.finish("logits")


def _renamed(name: str) -> str:
    """Return the name that a tensor of the file gets; only reserved names change."""
    return f"{_PREFIX}its_{name}" if name in _RESERVED else name


def _rename_reserved(proto: ModelProto) -> None:
    for graph in parts(GraphProto, proto.graph):
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [_renamed(name) for name in names]
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = _renamed(value.name)
