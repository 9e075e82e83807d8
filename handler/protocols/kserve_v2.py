"""KServe V2, the Open Inference Protocol: tensors of images in, tensors of results out.

Tensors are JSON, or binary data after it (Triton's "binary tensor data" extension, the default of
its clients). With binary data, a header contains the JSON's length, each tensor its number of
bytes, and each element of datatype BYTES begins with its length as four little-endian bytes.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.archive import Archive
from handler.errors import BadRequest, TooManyImages
from handler.protocols.json_body import (
    BINARY_HEADER,
    BinaryData,
    JsonBody,
    check_count,
    json_image,
)
from handler.request import Body, Protocol, Purpose, Request, Response, json_response
from handler.results import embedding_to_json, result_of

# The outputs, in order, with their datatypes. Explanations lack those of `_NOT_EXPLAINED`; only
# multi-label models have `labels`.
_OUTPUTS = {
    "class_id": "BYTES",
    "class_name": "BYTES",
    "probability": "FP32",
    "recognized": "BOOL",
    "labels": "BYTES",
    "result": "BYTES",
}
_NOT_EXPLAINED = {"recognized", "labels"}
_EMPTY = {"BYTES": "", "FP32": 0.0, "BOOL": False}
_EMBEDDING = "embedding"

_DATATYPES = ["BYTES", "UINT8"]

_LENGTH = struct.Struct("<I")

# Longer ids are rejected and not truncated, since clients match the response by its id.
_MAX_ID_LENGTH = 200

# More dimensions than any tensor of images has.
_MAX_DIMENSIONS = 8
_BATCH_DIMENSIONS = 2
_UNKNOWN_LENGTH = -1

_ACCEPTED = (
    'Each of "inputs" must be a tensor of image files: of datatype BYTES, one element per '
    "image (in JSON as base64), or of UINT8 and shape [bytes] or [images, bytes]."
)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the response, in JSON or in binary after it."""

    name: str
    binary: bool = False


class KServeV2(Protocol):
    """`{"inputs": [tensors]}` -> `{"outputs": [tensors]}`.

    Attributes:
        client_id: the client's own id for the request, if any.
        outputs: the tensors of the response, in order.
    """

    def __init__(self) -> None:
        self.client_id: str | None = None
        self.outputs: Sequence[OutputTensor] = ()

    def parse(self, request: Request, body: JsonBody | None, archive: Archive) -> None:
        assert body is not None
        body.parse_options(request)
        self.client_id = parse_request_id(body.document)
        self.outputs = parse_outputs(
            body.document,
            explained=request.purpose is Purpose.EXPLAIN,
            multilabel=archive.card.multilabel,
        )
        self.needs_embedding = any(output.name == _EMBEDDING for output in self.outputs)
        tensors, max_images = body.list("inputs"), archive.settings.max_images
        check_count(len(tensors), max_images)
        for tensor in tensors:
            name, values = parse_tensor(tensor, body.binary, max_images)
            request.images += [
                json_image(request, f"{name}[{i}]", value) for i, value in enumerate(values)
            ]
            check_count(len(request.images), max_images)

    def format(self, request: Request, archive: Archive) -> Response:
        results = [result_of(image) for image in request.images]
        outputs, binary = _format_outputs(request, results, self.outputs)
        response = json_response(
            {
                **({} if self.client_id is None else {"id": self.client_id}),
                "model_name": archive.name,
                "model_version": archive.version,
                "outputs": outputs,
                **archive.warning,
            }
        )
        if not binary:
            return response
        headers = {BINARY_HEADER.title(): str(len(response.body))}
        content = response.body + binary
        return Response(HTTPStatus.OK, content, "application/octet-stream", headers)


# --- Requests ---


def parse_request_id(document: Mapping[str, Any]) -> str | None:
    """Return the client's own id for the request, as text; None if there is none."""
    given = document.get("id")
    if given is None:
        return None
    if isinstance(given, bool | float | list | dict) or len(str(given)) > _MAX_ID_LENGTH:
        raise BadRequest(
            f'"id" must be a text of at most {_MAX_ID_LENGTH} characters, or a whole number.'
        )
    return str(given)


def parse_outputs(
    document: Mapping[str, Any], *, explained: bool, multilabel: bool = False
) -> list[OutputTensor]:
    """Return the requested tensors of the response in the requested order; by default all."""
    missing = _NOT_EXPLAINED if explained else set() if multilabel else {"labels"}
    available = [name for name in _OUTPUTS if name not in missing]
    binary = _flag(_parameters(document), "binary_data_output", default=False)
    requested = document.get("outputs")
    if requested is None or requested == []:
        return [OutputTensor(name, binary) for name in available]
    if not isinstance(requested, list) or not all(isinstance(output, dict) for output in requested):
        raise BadRequest('"outputs" must be a list of objects, such as {"name": "result"}.')
    names = [output.get("name") for output in requested]
    count = len(available) + (_EMBEDDING in names)
    if len(requested) > count:
        raise BadRequest(f'"outputs" asks for {len(requested)} tensors; there are {count}.')
    if not explained:  # only on request, since embeddings are long
        available.append(_EMBEDDING)
    outputs = []
    for name, output in zip(names, requested, strict=True):
        if name not in available:
            raise BadRequest(f'"outputs" asks for what is not there: {", ".join(available)} are.')
        parameters = _parameters(output)
        for other in ("classification", "shared_memory_region"):
            if other in parameters:
                raise BadRequest(f'The parameter "{other}" of an output is not supported.')
        outputs.append(OutputTensor(name, _flag(parameters, "binary_data", default=binary)))
    return outputs


def parse_tensor(
    tensor: object, binary: BinaryData, max_images: int
) -> tuple[str, Sequence[bytes | object]]:
    """Return the name of one of a request's tensors, and its images: bytes, or values in the JSON.

    `binary` has the data of this and the following tensors.
    """
    if not isinstance(tensor, dict) or tensor.get("datatype") not in _DATATYPES:
        raise BadRequest(_ACCEPTED)
    name = tensor.get("name")
    name = name if isinstance(name, str) else "input"
    if len(name) > _MAX_ID_LENGTH:  # it is included in each image's name
        raise BadRequest(f'A tensor\'s "name" may have {_MAX_ID_LENGTH} characters.')
    size = _parameters(tensor).get("binary_data_size")
    shape = _shape(tensor)
    elements: Sequence[object]
    if tensor["datatype"] == "UINT8":
        data = _octets(_values(tensor)) if size is None else bytes(binary.take(size))
        _check_shape(shape, len(data))
        elements = _rows(data, shape, max_images)
    else:
        elements = _values(tensor) if size is None else _split(binary.take(size), max_images)
        if len(elements) <= max_images:
            _check_shape(shape, len(elements))
    if len(elements) > max_images:
        raise TooManyImages(
            f"A tensor holds more than {max_images} images, which is the most that a request may "
            "have. Send the others in another request."
        )
    return name, elements


def _parameters(of: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = of.get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f'The parameter "{name}" must be true or false.')
    return value


def _shape(tensor: Mapping[str, Any]) -> list[int]:
    """Return the shape, with -1 for an unknown length; empty if there is none."""
    shape = tensor.get("shape", [])
    if shape == _UNKNOWN_LENGTH:  # as in KServe's examples
        return []
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(length) is int and length >= _UNKNOWN_LENGTH for length in shape)
    ):
        raise BadRequest('"shape" must be a list of whole numbers, such as [1].')
    return shape


def _check_shape(shape: list[int], elements: int) -> None:
    if shape and _UNKNOWN_LENGTH not in shape and math.prod(shape) != elements:
        product = " x ".join(str(length)[:20] for length in shape)
        raise BadRequest(
            f'The "shape" of a tensor says {product} element(s), its data have {elements}.'
        )


def _values(tensor: Mapping[str, Any]) -> list[Any]:
    """Return the elements as a flat list; the data may be flat, nested, or a single text."""
    data = tensor.get("data")
    if isinstance(data, str):
        return [data]
    if not isinstance(data, list):
        raise BadRequest('"data" must be a list, or follow the JSON with a "binary_data_size".')
    for _ in range(_MAX_DIMENSIONS):
        if not data or not all(isinstance(row, list) for row in data):
            break
        data = [item for row in data for item in row]
    return data


def _octets(values: list[Any]) -> bytes:
    try:
        return bytes(values)
    except (TypeError, ValueError) as error:
        raise BadRequest("A UINT8 tensor's data must be whole numbers from 0 to 255.") from error


def _rows(data: bytes, shape: list[int], max_images: int) -> list[bytes]:
    """Return the images of a UINT8 tensor, at most one more than `max_images`."""
    if len(shape) > _BATCH_DIMENSIONS:
        raise BadRequest(_ACCEPTED)
    if len(shape) < _BATCH_DIMENSIONS or shape[0] == 1:
        return [data]
    rows, length = shape
    if rows == _UNKNOWN_LENGTH and length > 0:
        rows = len(data) // length
    elif rows > 0 and length == _UNKNOWN_LENGTH:
        length = len(data) // rows
    if rows < 1 or rows * length != len(data):
        raise BadRequest(_ACCEPTED)
    return [data[i * length : (i + 1) * length] for i in range(min(rows, max_images + 1))]


def _split(data: memoryview, max_images: int) -> list[bytes]:
    """Return the elements of a binary BYTES tensor, at most one more than `max_images`."""
    elements: list[bytes] = []
    while data and len(elements) <= max_images:
        length = _LENGTH.unpack(data[: _LENGTH.size])[0] if len(data) >= _LENGTH.size else math.inf
        if length > len(data) - _LENGTH.size:
            raise BadRequest(
                "A BYTES tensor in binary is cut off: each element needs its length before it, "
                "four bytes, in little-endian order."
            )
        end = _LENGTH.size + int(length)
        elements.append(bytes(data[_LENGTH.size : end]))
        data = data[end:]
    return elements


# --- Responses ---


def _format_outputs(
    request: Request, results: Sequence[Body], outputs: Sequence[OutputTensor]
) -> tuple[list[Body], bytes]:
    """Return the tensors, with one element per image, and the bytes after the JSON.

    `result` contains each complete result as JSON text, `labels` its list of labels. The elements
    of an image that failed are empty, zero or false.
    """
    tensors: list[Body] = []
    binary = b""
    for output in outputs:
        shape = [len(results)]
        if output.name == _EMBEDDING:
            vectors = _embeddings(request)
            datatype, shape, values = "FP32", list(vectors.shape), embedding_to_json(vectors)
        else:
            datatype = _OUTPUTS[output.name]
            values = [_element(output.name, result) for result in results]
        tensor: Body = {"name": output.name, "datatype": datatype, "shape": shape}
        if output.binary:
            content = _in_binary(datatype, values)
            tensor["parameters"] = {"binary_data_size": len(content)}
            binary += content
        else:
            tensor["data"] = values
        tensors.append(tensor)
    return tensors, binary


def _embeddings(request: Request) -> NDArray[np.float32]:
    """Return float32 (images, channels); zeros for an image that failed."""
    found = [image.extra_output for image in request.images]
    channels = next((len(vector) for vector in found if vector is not None), 0)
    return np.stack([np.zeros(channels, np.float32) if v is None else v for v in found])


def _element(name: str, result: Body) -> Any:
    if name == "result":
        return json.dumps(result, allow_nan=False)
    if name == "labels":
        return json.dumps(result.get(name, []), allow_nan=False)
    return result.get(name) or _EMPTY[_OUTPUTS[name]]


def _in_binary(datatype: str, values: list[Any]) -> bytes:
    if datatype == "FP32":
        return np.array(values, "<f4").tobytes()
    if datatype == "BOOL":
        return bytes(values)
    texts = [value.encode("utf-8", "replace") for value in values]
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)
