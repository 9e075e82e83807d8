"""Small ONNX files, like those of other programs than PyTorch."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from handler.settings import Preprocessing
from scripts.samples import sample_batch

CLASSES = 5
CHANNELS = 16


@dataclass(frozen=True)
class Made:
    """Options of a model: a convolution, global average pooling, and a linear layer.

    Attributes:
        shape: of the input; text for an axis of any length.
        dtype: of the input.
        nhwc: channels come last.
        end: operators after the linear layer, such as Softmax.
        classes: outputs of the linear layer.
        names: of the input and the output.
        fixed: the batch size is part of the graph, in a reshape.
        opset: version of the operators.
        hidden: whether a linear layer and an activation come before the last layer.
        half: whether it computes in float16, between casts from and to float32.
    """

    shape: tuple[int | str, ...] = ("N", 3, 64, 64)
    dtype: int = TensorProto.FLOAT
    nhwc: bool = False
    end: tuple[str, ...] = ()
    classes: int = CLASSES
    names: tuple[str, str] = ("input", "output")
    fixed: bool = False
    opset: int = 17
    hidden: bool = False
    half: bool = False


def model(made: Made | None = None) -> ModelProto:
    """Return a model whose predictions differ between images."""
    made = made or Made()
    return _made(made, *_spread(made.classes, made.hidden))


@cache
def _spread(classes: int, hidden: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a last layer with logits of mean 0 and deviation 2 over the sample images."""
    weight = np.random.default_rng(5).normal(0, 1, (classes, CHANNELS)).astype(np.float32)
    bias = np.zeros(classes, np.float32)
    made = _made(Made(classes=classes, hidden=hidden), weight, bias)
    images = sample_batch(Preprocessing(72, 64)).astype(np.float32) / 255
    session = onnxruntime.InferenceSession(made.SerializeToString())
    logits = session.run(None, {"input": (images - np.float32(0.5)) / np.float32(0.25)})[0]
    scale = 2 / logits.std(0)
    return weight * scale[:, None], -logits.mean(0) * scale


def _made(made: Made, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> ModelProto:
    random = np.random.default_rng(4)
    half = made.dtype == TensorProto.FLOAT16
    numbers = np.float16 if half or made.half else np.float32
    constants: dict[str, Any] = {
        "kernel": random.normal(0, 0.4, (CHANNELS, 3, 5, 5)).astype(numbers),
        "weight": weight.astype(numbers),
        "bias": bias.astype(numbers),
        "row": np.array([1, CHANNELS], np.int64),
        "square": random.normal(0, 0.5, (CHANNELS, CHANNELS)).astype(numbers),
    }
    given, answer = made.names
    tensor = given
    nodes: list[NodeProto] = []

    def add(operator: str, *others: str, **attributes: Any) -> None:
        nonlocal tensor
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(operator, [tensor, *others], [output], **attributes))
        tensor = output

    if made.dtype == TensorProto.UINT8:
        add("Cast", to=TensorProto.FLOAT)
        constants["scale"] = np.array(64, np.float32)
        add("Div", "scale")
    if made.half:
        add("Cast", to=TensorProto.FLOAT16)
    if made.nhwc:
        add("Transpose", perm=[0, 3, 1, 2])
    add("Conv", "kernel", strides=[4, 4])
    add("Relu")
    add("GlobalAveragePool")
    add(*(("Reshape", "row") if made.fixed else ("Flatten",)))
    if made.hidden:
        add("Gemm", "square", transB=1)
        add("Tanh")
    add("Gemm", "weight", "bias", transB=1)
    for operator in made.end:
        add(operator)
    if made.half:
        add("Cast", to=TensorProto.FLOAT)
    nodes.append(helper.make_node("Identity", [tensor], [answer]))
    output = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(given, made.dtype, list(made.shape))],
        [helper.make_tensor_value_info(answer, output, [made.shape[0], made.classes])],
        [numpy_helper.from_array(v, name) for name, v in constants.items() if name in used],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", made.opset)], ir_version=8
    )


def quantized() -> ModelProto:
    """Return a model whose output is rounded to 8 bits."""
    proto = model()
    last = proto.graph.node.pop()
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.02, np.float32), "step"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), "zero"))
    rounded = helper.make_node("QuantizeLinear", [*last.input, "step", "zero"], ["q"])
    restored = helper.make_node("DequantizeLinear", ["q", "step", "zero"], list(last.output))
    proto.graph.node.extend([rounded, restored])
    return proto


def with_operator(domain: str, operator: str) -> ModelProto:
    """Return a model with a custom operator before its output."""
    proto = model()
    proto.graph.node[-1].op_type, proto.graph.node[-1].domain = operator, domain
    proto.opset_import.append(helper.make_opsetid(domain, 1))
    return proto


def with_data_elsewhere(location: str) -> ModelProto:
    """Return a model whose weights are in another file."""
    proto = model()
    tensor = proto.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return proto
