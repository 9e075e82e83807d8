"""KServe V2 (the Open Inference Protocol): what is its own in requests and answers.

Tensors come and go as JSON, or in binary behind it: then a header gives the JSON's length, each
tensor its number of bytes, and an element of datatype BYTES its length before it, four bytes little
end first (Triton's "binary tensor data" extension, which its clients use unless told otherwise).
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import BadRequest, TooManyImages
from handler.exchange import EMBEDDING, Body, OutputTensor, Request

BINARY_HEADER = "inference-header-content-length"

# Of an answer, in order, with their datatypes. An explanation lacks some, and labels are only those
# of a model that gives several.
_OUTPUTS = {
    "class_id": "BYTES",
    "class_name": "BYTES",
    "probability": "FP32",
    "recognized": "BOOL",
    "labels": "BYTES",
    "result": "BYTES",
}
_NOT_EXPLAINED = {"recognized", "labels"}

_DATATYPES = ["BYTES", "UINT8"]

_LENGTH = struct.Struct("<I")

# Longer ids are refused, not cut: they must be found again.
_LONGEST_ID = 200

# More dimensions than any tensor of pictures has.
_MOST_DIMENSIONS = 8
_BATCH_DIMENSIONS = 2
_UNKNOWN_LENGTH = -1

_ACCEPTED = (
    'Each of "inputs" must be a tensor of pictures as files: of datatype BYTES, an element a '
    "picture (in JSON as base64), or of UINT8 and shape [bytes] or [pictures, bytes]."
)


class BinaryData:
    """What follows a request's JSON; the tensors take it in their order."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._left = memoryview(data)

    def take(self, size: object) -> memoryview:
        """The next `size` bytes, as a tensor's `binary_data_size` says."""
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(self._left):
            raise BadRequest(
                '"binary_data_size" must be the number of the tensor\'s bytes behind the JSON, of '
                f"which {len(self._left)} are left. They begin where the header "
                "Inference-Header-Content-Length says."
            )
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def check_used(self) -> None:
        """Raises `BadRequest` where there is more than the tensors took."""
        if self._left:
            raise BadRequest(
                f"{len(self._left)} bytes behind the JSON belong to no tensor. Each tensor's "
                '"parameters" must hold its "binary_data_size".'
            )


# --- Requests ---


def read_request_id(document: Mapping[str, Any]) -> str | None:
    """The client's own id for the request, as text; None where there is none."""
    match document.get("id"):
        case None:
            return None
        case bool():
            pass
        case str() | int() as given if len(str(given)) <= _LONGEST_ID:
            return str(given)
    raise BadRequest(f'"id" must be a text of at most {_LONGEST_ID} characters, or a whole number.')


def read_outputs(
    document: Mapping[str, Any], *, explained: bool, multilabel: bool = False
) -> list[OutputTensor]:
    """The tensors to answer with: those that are asked for, in that order, or all."""
    missing = _NOT_EXPLAINED if explained else set() if multilabel else {"labels"}
    available = [name for name in _OUTPUTS if name not in missing]
    binary = _flag(_parameters(document), "binary_data_output", default=False)
    all_of_them = [OutputTensor(name, binary) for name in available]
    if not explained:  # only where they are asked for: they are long
        available.append(EMBEDDING)
    requested = document.get("outputs")
    if requested is None or requested == []:
        return all_of_them
    if not isinstance(requested, list) or not all(isinstance(output, dict) for output in requested):
        raise BadRequest('"outputs" must be a list of objects, such as {"name": "result"}.')
    most = len(all_of_them) + any(output.get("name") == EMBEDDING for output in requested)
    if len(requested) > most:
        raise BadRequest(f'"outputs" asks for {len(requested)} tensors; there are {most}.')
    outputs = []
    for output in requested:
        name = output.get("name")
        if name not in available:
            raise BadRequest(f'"outputs" asks for what is not there: {", ".join(available)} are.')
        parameters = _parameters(output)
        for other in ("classification", "shared_memory_region"):
            if other in parameters:
                raise BadRequest(f'The parameter "{other}" of an output is not supported.')
        outputs.append(OutputTensor(name, _flag(parameters, "binary_data", default=binary)))
    return outputs


def read_tensor(
    tensor: object, binary: BinaryData, max_images: int
) -> tuple[str, Sequence[bytes | object]]:
    """One of a request's tensors.

    Args:
        tensor: as in the JSON.
        binary: what is left behind the JSON.
        max_images: the most pictures that it may hold.

    Returns:
        its name, and its pictures: bytes, or what stands for them in the JSON.
    """
    if not isinstance(tensor, dict) or tensor.get("datatype") not in _DATATYPES:
        raise BadRequest(_ACCEPTED)
    name = tensor.get("name")
    name = name if isinstance(name, str) else "input"
    if len(name) > _LONGEST_ID:  # each picture's own name would begin with it
        raise BadRequest(f'A tensor\'s "name" may have {_LONGEST_ID} characters.')
    size = _parameters(tensor).get("binary_data_size")
    shape = _shape(tensor)
    if tensor["datatype"] == "BYTES":
        if size is None:
            elements: Sequence[object] = _values(tensor)
        else:
            elements = _split(binary.take(size), max_images)
        _check_shape(shape, len(elements))
        if len(elements) > max_images:
            raise _too_many(max_images)
        return name, elements
    data = _octets(_values(tensor)) if size is None else bytes(binary.take(size))
    _check_shape(shape, len(data))
    return name, _rows(data, shape, max_images)


def _parameters(of: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = of.get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f'The parameter "{name}" must be true or false.')
    return value


def _shape(tensor: Mapping[str, Any]) -> list[int]:
    """Empty where it is not said; -1 stands for what the client did not count."""
    shape = tensor.get("shape", [])
    if shape == _UNKNOWN_LENGTH:  # as KServe's own examples have it
        return []
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(length) is int and length >= _UNKNOWN_LENGTH for length in shape)
    ):
        raise BadRequest('"shape" must be a list of whole numbers, such as [1].')
    return shape


def _check_shape(shape: list[int], elements: int) -> None:
    if shape and _UNKNOWN_LENGTH not in shape and math.prod(shape) != elements:
        raise BadRequest(
            f'The "shape" of a tensor says {_product(shape)} element(s), its data have {elements}.'
        )


def _product(shape: list[int]) -> str:
    return " x ".join(str(length)[:20] for length in shape)


def _values(tensor: Mapping[str, Any]) -> list[Any]:
    """A tensor's elements: flat, nested as its shape is, or a single one without a list."""
    data = tensor.get("data")
    if isinstance(data, str):
        return [data]
    if not isinstance(data, list):
        raise BadRequest('"data" must be a list, or follow the JSON with a "binary_data_size".')
    for _ in range(_MOST_DIMENSIONS):
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
    """The pictures of a UINT8 tensor, whose shape fits its data as far as it says anything."""
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
    if rows > max_images:
        raise _too_many(max_images)
    return [data[i * length : (i + 1) * length] for i in range(rows)]


def _split(data: memoryview, max_images: int) -> list[bytes]:
    """The elements of a BYTES tensor in binary."""
    elements: list[bytes] = []
    while data:
        length = _LENGTH.unpack(data[: _LENGTH.size])[0] if len(data) >= _LENGTH.size else math.inf
        if length > len(data) - _LENGTH.size:
            raise BadRequest(
                "A BYTES tensor in binary is cut off: each element needs its length before it, "
                "four bytes, little end first."
            )
        if len(elements) == max_images:
            raise _too_many(max_images)
        end = _LENGTH.size + int(length)
        elements.append(bytes(data[_LENGTH.size : end]))
        data = data[end:]
    return elements


def _too_many(max_images: int) -> TooManyImages:
    return TooManyImages(
        f"A tensor holds more than {max_images} images, which is the most that a request may have. "
        "Send the others in another request."
    )


# --- Answers ---


def answer(request: Request, results: Sequence[Body], model: tuple[str, str]) -> tuple[Body, bytes]:
    """The tensors that a request wants, with one element per image, and the bytes behind the JSON.

    `result` holds each whole result as JSON text, `labels` the part that has all labels. What an
    image that failed lacks is empty, zero or false.
    """
    outputs: list[Body] = []
    binary = b""
    for wanted in request.outputs:
        if wanted.name == EMBEDDING:
            vectors = _embeddings(request)
            output: Body = {"name": EMBEDDING, "datatype": "FP32", "shape": list(vectors.shape)}
            if wanted.binary:
                output["parameters"] = {"binary_data_size": vectors.nbytes}
                binary += vectors.tobytes()
            else:
                output["data"] = [float(text) for text in map(str, vectors.ravel())]
            outputs.append(output)
            continue
        datatype, values = _OUTPUTS[wanted.name], _column(wanted.name, results)
        output = {"name": wanted.name, "datatype": datatype, "shape": [len(results)]}
        if wanted.binary:
            data = _in_binary(datatype, values)
            output["parameters"] = {"binary_data_size": len(data)}
            binary += data
        else:
            output["data"] = values
        outputs.append(output)
    name, version = model
    body: Body = {"model_name": name, "model_version": version, "outputs": outputs}
    return ({"id": request.client_id, **body} if request.client_id is not None else body), binary


def _embeddings(request: Request) -> NDArray[np.float32]:
    """float32 (images, channels), little end first; of an image that failed zeros."""
    found = [image.embedding for image in request.images]
    channels = next((len(vector) for vector in found if vector is not None), 0)
    rows = [np.zeros(channels, "<f4") if vector is None else vector for vector in found]
    return np.stack(rows).astype("<f4")


def _column(name: str, results: Sequence[Body]) -> list[Any]:
    match name:
        case "result":
            return [json.dumps(result, allow_nan=False) for result in results]
        case "labels":
            return [json.dumps(result.get(name, []), allow_nan=False) for result in results]
        case "probability":
            return [result.get(name, 0.0) for result in results]
        case "recognized":
            return [result.get(name, False) for result in results]
        case _:
            return [result.get(name) or "" for result in results]


def _in_binary(datatype: str, values: list[Any]) -> bytes:
    match datatype:
        case "FP32":
            return np.array(values, "<f4").tobytes()
        case "BOOL":
            return bytes(values)
        case _:
            texts = [value.encode("utf-8", "replace") for value in values]
            return b"".join(_LENGTH.pack(len(text)) + text for text in texts)
