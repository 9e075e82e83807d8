"""Read an ONNX file and reject what cannot be served safely.

The file is not trusted. Its size is checked before it is read, and nothing outside of it is read:
no external weights, and no operators but ONNX's own, of which none runs code or reads a file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, inliner

from handler.settings import Preprocessing
from scripts.build.messages import first_line, listed, read_bytes
from scripts.build.onnx_trial import newest_opset
from scripts.terminal import UserError

# A file of ONNX is one message of protobuf, which holds no more.
MAX_BYTES = 2**31 - 1

# Limit of the graph's nodes after functions are inlined; a large node counts as one per KiB. With
# functions that each call the one before twice, a few KB can become more than any memory holds.
MAX_INLINED_NODES = 1_000_000
_NODE_BYTES = 1024

# Since this version broadcasting works as it does today.
MIN_OPSET = 8

CHANNELS = 3
_IMAGE_AXES = 4

_OWN_DOMAINS = {"", "ai.onnx"}
_QUANTIZED = re.compile("QLinear|[Qq]uantizeLinear|(Conv|MatMul)Integer")
_TYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}


_T = TypeVar("_T")


@dataclass(frozen=True)
class Input:
    """The input of a model.

    Attributes:
        dtype: float32, float16 or uint8.
        layouts: "NCHW", "NHWC", or both if its shape fits both.
        side: of the square image, in pixels; None for any.
    """

    name: str
    dtype: str
    layouts: tuple[str, ...]
    side: int | None

    def prepare(
        self, images: NDArray[np.uint8], preprocessing: Preprocessing
    ) -> NDArray[np.generic]:
        """Return decoded images, uint8 (N, 3, crop, crop), as the model takes them."""
        mean, std = (
            np.array(v, np.float32).reshape(CHANNELS, 1, 1)
            for v in (preprocessing.mean, preprocessing.std)
        )
        values = images[:, ::-1] if preprocessing.channels == "bgr" else images
        if self.dtype != "uint8":
            values = ((values.astype(np.float32) / 255 - mean) / std).astype(self.dtype)
        return values if self.layouts == ("NCHW",) else values.transpose(0, 2, 3, 1)


@dataclass
class Model:
    """A model that was read and passed all checks.

    Attributes:
        file: its name, for messages.
        proto: its content; functions are inlined.
        producers: the node that makes each tensor.
        constants: tensors with fixed values, by name.
    """

    file: str
    proto: ModelProto
    input: Input
    producers: dict[str, NodeProto] = field(init=False)
    constants: dict[str, TensorProto] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.proto.graph
        self.producers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    @property
    def half(self) -> bool:
        """Return whether some of it computes in half precision."""
        casts = {cast_type(node) for node in parts(NodeProto, self.proto.graph)}
        return self.input.dtype == "float16" or TensorProto.FLOAT16 in casts

    @property
    def outputs(self) -> int | None:
        """Return the number of values of its only output, if the file states it."""
        if len(self.proto.graph.output) != 1:
            return None
        sizes = [d.dim_value for d in self.proto.graph.output[0].type.tensor_type.shape.dim[1:]]
        return int(np.prod(sizes)) if sizes and all(size > 0 for size in sizes) else None


def cast_type(node: NodeProto) -> int | None:
    """Return the type that a Cast node casts to; None for other operators."""
    return next((a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"), None)


def read(path: Path) -> Model:
    """Read a file and check it; raise `UserError` for one that cannot be served."""
    size = path.stat().st_size if path.is_file() else 0
    if size > MAX_BYTES:
        raise UserError(
            f"{path} has {size / 1e9:.1f} GB. One file of ONNX holds 2 GB at most, and here a "
            "model must be one file. Use a smaller one, or save it in float16."
        )
    content = read_bytes(path, "model")
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own kinds
        raise UserError(f"{path} is no ONNX file, or is cut off.") from error
    if not proto.graph.node or not proto.graph.output:
        raise UserError(f"{path} is no ONNX file, or its graph is empty.")
    _check_external(proto, path)
    _check_operators(proto, path)
    _check_opset(proto, path)
    if proto.functions:
        _check_functions(proto, path)
        try:
            proto = inliner.inline_local_functions(proto)
        except Exception as error:  # for example too many functions, or calls too deep
            raise UserError(f"{path} has functions that cannot be resolved.") from error
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # its own kinds, and protobuf's
        raise UserError(f"{path} is no valid ONNX model: {first_line(error)}.") from error
    return Model(path.name, proto, _input(proto, path))


def parts(kind: type[_T], *messages: Any) -> Iterator[_T]:
    """Find all nodes, graphs or tensors in messages, such as in the branches of an If."""
    waiting = list(messages)
    while waiting:
        message = waiting.pop()
        if isinstance(message, kind):
            yield message
        # A tensor holds no further ones, and to list its fields would copy its values.
        for field_, value in () if isinstance(message, TensorProto) else message.ListFields():
            if field_.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)


def _check_external(proto: ModelProto, path: Path) -> None:
    """Reject weights in other files."""
    for tensor in parts(TensorProto, proto.graph, *proto.functions):
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            location = next((e.value for e in tensor.external_data if e.key == "location"), "?")
            raise UserError(
                f"{path} keeps its weights in another file ({location[:100]!r}). Here a model must "
                "be one file. To make it one, load it where you trust it and save it again: "
                "onnx.save(onnx.load('model.onnx'), 'one.onnx')"
            )


def _check_operators(proto: ModelProto, path: Path) -> None:
    """Reject quantized models, and operators that are neither ONNX's nor the file's functions."""
    functions = {(function.domain, function.name) for function in proto.functions}
    nodes = parts(NodeProto, proto.graph, *proto.functions)
    used = {(node.domain, node.op_type) for node in nodes} - functions
    quantized = sorted(name for _, name in used if _QUANTIZED.search(name))
    if quantized:
        raise UserError(
            f"{path} is quantized to 8 bits already ({listed(quantized)}). Its results "
            "depend on the processor, and cannot be compared with float32 here. Bring the float32 "
            "model: PRECISION=int8 quantizes it, and measures what that costs."
        )
    custom = sorted(f"{domain}.{name}" for domain, name in used if domain not in _OWN_DOMAINS)
    if custom:
        raise UserError(
            f"{path} has operators that are not ONNX's own, and would need a library: "
            f"{', '.join(custom[:3])[:200]}. Export it with standard operators only."
        )


def _check_opset(proto: ModelProto, path: Path) -> None:
    versions = [i.version for i in proto.opset_import if i.domain in _OWN_DOMAINS]
    newest, found = newest_opset(), max(versions, default=0)
    if not MIN_OPSET <= found <= newest:
        raise UserError(
            f"{path} is written in version {found} of ONNX's operators (opset). ONNX Runtime here "
            f"supports {MIN_OPSET} to {newest}. Export it again with opset_version=20."
        )


def _check_functions(proto: ModelProto, path: Path) -> None:
    """Reject functions that would become too many nodes, before they are inlined."""
    bodies: dict[tuple[str, ...], list[NodeProto]] = {}
    for function in proto.functions:
        body = bodies.setdefault((function.domain, function.name, function.overload), [])
        body.extend(parts(NodeProto, function))
    calls = {name: bodies.keys() & map(_called, body) for name, body in bodies.items()}
    own = list(parts(NodeProto, proto.graph))
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
            # Capped at the limit: doubled per call, the numbers would have thousands of digits.
            sizes[name] = min(size, MAX_INLINED_NODES + 1)
    except CycleError as error:
        raise UserError(
            f"{path} has functions that call themselves, which ONNX forbids. Export it again."
        ) from error
    if sum(sizes.get(_called(node), 0) for node in own) > MAX_INLINED_NODES:
        raise UserError(
            f"{path} has functions that call one another so often that more than "
            f"{MAX_INLINED_NODES:,} nodes would come of them. Export it without functions."
        )


def _called(node: NodeProto) -> tuple[str, ...]:
    return node.domain, node.op_type, node.overload


def _size(node: NodeProto, largest: int) -> int:
    """Return a size in nodes; each argument of the function may be as large as the largest."""
    arguments = sum(bool(attribute.ref_attr_name) for attribute in node.attribute)
    size: int = node.ByteSize() + arguments * largest
    return 1 + size // _NODE_BYTES


def _input(proto: ModelProto, path: Path) -> Input:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs[:5])
        raise UserError(f"{path} must have one input, the images. It has {len(inputs)}: {names}.")
    (value,) = inputs
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        types = {number: name for name, number in TensorProto.DataType.items()}
        name = types.get(kind.elem_type, f"a type that is none ({kind.elem_type})")
        raise UserError(f"{path} takes {name}. It must take {', '.join(_TYPES.values())}.")
    # Some exporters write -1 for a size that is not fixed; protobuf's default is 0.
    sizes = [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim]
    sizes = sizes or [None] * _IMAGE_AXES
    shown = " x ".join("?" if size is None else str(size) for size in sizes)
    if len(sizes) != _IMAGE_AXES:
        raise UserError(
            f"{path} takes a tensor of {shown}. It must take images: N x 3 x height x width, or "
            "N x height x width x 3."
        )
    channels = {"NCHW": sizes[1], "NHWC": sizes[3]}
    layouts = [layout for layout, size in channels.items() if size == CHANNELS]
    layouts = layouts or [layout for layout, size in channels.items() if size is None]
    if not layouts:
        raise UserError(
            f"{path} takes a tensor of {shown}, in which no axis has 3 channels. Here images are "
            "red, green and blue, gray ones too."
        )
    sides = {size for size in (sizes[2:] if layouts[0] == "NCHW" else sizes[1:3]) if size}
    if len(sides) > 1:
        raise UserError(f"{path} takes images of {shown}. Here they must be squares.")
    return Input(value.name, _TYPES[kind.elem_type], tuple(layouts), next(iter(sides), None))
