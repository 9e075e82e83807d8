"""KServe V2: tensors as JSON and in binary, requested outputs, ids."""

import base64
import json
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import protocols
from handler.errors import BadRequest, ClientError, TooManyImages
from handler.protocols.kserve_v2 import KServeV2, OutputTensor
from handler.request import Options, Request
from handler.settings import Settings
from tests.unit import parts

SETTINGS = Settings(max_images=4)
OPTIONS = Options(SETTINGS.topk, SETTINGS.threshold)
ARCHIVE = parts.archive(settings=SETTINGS, features="f", embedding=8)
ONE = base64.b64encode(b"1").decode()
NAMES = ["class_id", "class_name", "probability", "recognized", "result"]


def read(
    document: Mapping[str, Any], tail: bytes | None = None, length: str = "", explain: bool = False
) -> Request:
    """Parse a request as it arrives: JSON, or JSON and the tensors' data after it."""
    body = json.dumps(document).encode()
    headers = {"explain": str(explain)}
    if tail is None:
        headers["Content-Type"] = "application/json"
    else:
        headers["inference-header-content-length"] = length or str(len(body))
    request = Request("id", {"body": bytearray(body + (tail or b""))}, headers, OPTIONS)
    protocols.parse(request, ARCHIVE)
    return request


def contents(request: Request) -> list[bytes | bytearray]:
    assert isinstance(request.protocol, KServeV2)
    assert not [image.error for image in request.images if image.error]
    return [image.data for image in request.images]


def tensor(datatype: str = "BYTES", **values: Any) -> dict[str, Any]:
    return {"name": "t", "datatype": datatype, **values}


def binary(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def sized(size: object, shape: object = -1, datatype: str = "BYTES") -> dict[str, Any]:
    return {"inputs": [tensor(datatype, shape=shape, parameters={"binary_data_size": size})]}


# --- Tensors ---

BAD_SIZES: list[object] = [-1, [], "7", 1.5, True]
BAD_SHAPES: list[object] = [[2], [0], ["1"], [True], [1.0], [-2], {}, [1] * 9]


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ({"shape": [1], "data": [ONE]}, 1),
        ({"shape": [2, 1], "data": [[ONE], [ONE]]}, 2),
        ({"shape": [1, 2], "data": [ONE, ONE]}, 2),
        ({"shape": [-1], "data": [ONE, ONE]}, 2),
        ({"data": [ONE]}, 1),
        ({"shape": -1, "data": ONE}, 1),  # KServe's own example for TorchServe
    ],
)
def test_each_element_of_a_bytes_tensor_is_an_image(values: dict[str, Any], images: int) -> None:
    assert contents(read({"inputs": [tensor(**values)]})) == [b"1"] * images


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"shape": [3], "data": [1, 2, 3]}, [b"\1\2\3"]),
        ({"shape": [1, 3], "data": [[1, 2, 3]]}, [b"\1\2\3"]),
        ({"shape": [2, 2], "data": [1, 2, 3, 4]}, [b"\1\2", b"\3\4"]),
        ({"shape": [-1, 2], "data": [1, 2, 3, 4]}, [b"\1\2", b"\3\4"]),
        ({"shape": [-1], "data": [1, 2]}, [b"\1\2"]),
        ({"data": [1, 2]}, [b"\1\2"]),
    ],
)
def test_each_row_of_a_uint8_tensor_is_an_image_in_json_and_binary(
    values: dict[str, Any], expected: list[bytes]
) -> None:
    assert contents(read({"inputs": [tensor("UINT8", **values)]})) == expected
    data = b"".join(expected)
    document = sized(len(data), values.get("shape", -1), "UINT8")
    assert contents(read(document, data)) == expected


def test_bytes_in_binary_follow_the_json_in_the_tensors_order() -> None:
    first, second = binary(b"cat", b""), binary(b"dog")
    document = {
        "inputs": [
            *sized(len(first), [2])["inputs"],
            tensor(shape=[1], data=[ONE]),
            *sized(len(second), [1, 1])["inputs"],
        ]
    }
    assert contents(read(document, first + second)) == [b"cat", b"", b"1", b"dog"]


@pytest.mark.parametrize(
    ("document", "tail", "message"),
    [
        (sized(8), binary(b"cat"), "of which 7 are left"),
        (sized(6), binary(b"cat"), "cut off"),
        (sized(3), b"\1\0\0", "cut off"),
        *((sized(size), b"x", "binary_data_size") for size in BAD_SIZES),
        (sized(7, [2]), binary(b"cat"), "shape"),
        (sized(0), b"left", "4 bytes behind the JSON belong to no tensor"),
        ({"inputs": [tensor(data=[ONE])]}, b"left", "belong to no tensor"),
        ({"image": ONE}, b"left", "belong to no tensor"),
    ],
)
def test_binary_data_that_contradict_the_json_are_rejected(
    document: dict[str, Any], tail: bytes, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        read(document, tail)


def test_a_wrong_length_of_the_json_is_rejected() -> None:
    for length in ("-1", "x", "999999", "\u0663", "9" * 5000):
        with pytest.raises(BadRequest, match="Inference-Header-Content-Length must"):
            read({"inputs": []}, b"", length)
    for length in ("0", "5"):
        with pytest.raises(BadRequest, match="not valid JSON"):
            read({"inputs": []}, b"", length)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *((tensor(shape=shape, data=[ONE]), "shape") for shape in BAD_SHAPES),
        (tensor(shape=[1], data=[ONE, ONE]), "shape"),
        (tensor("UINT8", shape=[3], data=[1, 2]), r'"shape" .* says 3 element'),
        (tensor("UINT8", shape=[2, 2, 1], data=[1, 2, 3, 4]), "must be a tensor"),
        (tensor("UINT8", shape=[0, 4], data=[]), "must be a tensor"),
        (tensor("UINT8", shape=[-1, 2], data=[1, 2, 3]), "must be a tensor"),
        (tensor("FP32", shape=[1], data=[1.0]), "must be a tensor"),
        (tensor("UINT8", shape=[2], data=[1, 256]), "from 0 to 255"),
        (tensor("UINT8", shape=[1], data=["x"]), "from 0 to 255"),
        (tensor(shape=[1]), '"data" must be a list'),
        (tensor(shape=[1], data={}), '"data" must be a list'),
        # Each image is named after it.
        (tensor(data=[ONE]) | {"name": "x" * 201}, "may have 200 characters"),
    ],
)
def test_a_malformed_tensor_is_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read({"inputs": [values]})


def test_more_images_than_allowed_are_rejected_in_every_kind_of_tensor() -> None:
    # What follows the fifth is not parsed: 20 MB hold millions of empty elements.
    many = binary(*[b""] * 5) + b"\xff"
    for document, tail, message in (
        ({"inputs": [tensor(data=[ONE] * 5)]}, None, "tensor holds more than 4"),
        ({"inputs": [tensor(data=[ONE] * 3), tensor(data=[ONE] * 2)]}, None, "holds 5 images"),
        ({"inputs": [tensor(data=[ONE])] * 5}, None, "holds 5 images"),
        ({"inputs": [tensor("UINT8", shape=[5, 1], data=[1] * 5)]}, None, "tensor holds more"),
        (sized(len(many)), many, "tensor holds more"),
    ):
        with pytest.raises(TooManyImages, match=message):
            read(document, tail)


# --- Outputs and ids ---

ALL = [OutputTensor(name) for name in NAMES]
EVERYTHING = {"parameters": {"binary_data_output": True}}
IN_BINARY = {"name": "class_id", "parameters": {"binary_data": True}}


@pytest.mark.parametrize(
    ("document", "outputs"),
    [
        ({"outputs": []}, ALL),
        (
            {"outputs": [{"name": "result"}, IN_BINARY]},
            [OutputTensor("result"), OutputTensor("class_id", binary=True)],
        ),
        (EVERYTHING, [OutputTensor(name, binary=True) for name in NAMES]),
        (EVERYTHING | {"outputs": [{"name": "result"}]}, [OutputTensor("result", binary=True)]),
    ],
)
def test_requested_outputs_come_in_their_order_and_all_by_default(
    document: dict[str, Any], outputs: list[OutputTensor]
) -> None:
    request = read({"inputs": [tensor(data=[ONE])], **document})
    assert isinstance(request.protocol, KServeV2)
    assert request.protocol.outputs == outputs


def test_an_explanation_has_no_output_recognized() -> None:
    request = read({"inputs": [tensor(data=[ONE])]}, explain=True)
    assert isinstance(request.protocol, KServeV2)
    assert request.protocol.outputs == [one for one in ALL if one.name != "recognized"]
    with pytest.raises(BadRequest, match="class_id, class_name, probability, result are"):
        read({"inputs": [tensor(data=[ONE])], "outputs": [{"name": "recognized"}]}, explain=True)


@pytest.mark.parametrize(
    "asked",
    [
        *(5, ["result"], [{"name": "logits"}], [{}], [{"name": ["result"]}]),
        [{"name": "result"}] * 6,
        [{"name": "result", "parameters": {"binary_data": 1}}],
        [{"name": "result", "parameters": {"classification": 3}}],
        [{"name": "result", "parameters": {"shared_memory_region": "x"}}],
    ],
)
def test_unknown_outputs_are_rejected(asked: object) -> None:
    with pytest.raises(BadRequest, match=r"output|binary_data"):
        read({"inputs": [tensor(data=[ONE])], "outputs": asked})


@pytest.mark.parametrize(
    ("given", "echoed"), [("my-id", "my-id"), (42, "42"), (None, None), ("x" * 200, "x" * 200)]
)
def test_an_id_comes_back_as_text(given: object, echoed: str | None) -> None:
    request = read({"id": given, "inputs": [tensor(data=[ONE])]})
    assert isinstance(request.protocol, KServeV2)
    assert request.protocol.client_id == echoed


@pytest.mark.parametrize("given", ["x" * 201, 10**200, True, 1.5, [1], {}])
def test_an_id_that_cannot_be_returned_is_rejected(given: object) -> None:
    with pytest.raises(BadRequest, match='"id" must be'):
        read({"id": given, "inputs": [tensor(data=[ONE])]})


# --- Anything at all ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)
tensors = st.fixed_dictionaries(
    {"datatype": st.sampled_from(["BYTES", "UINT8"]) | anything},
    optional={
        "name": anything,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | anything,
        "data": st.just([ONE]) | anything,
        "parameters": st.dictionaries(st.just("binary_data_size"), anything),
    },
)


@given(inputs=st.lists(tensors | anything, max_size=3), tail=st.none() | st.binary(max_size=30))
def test_any_tensor_is_read_or_rejected_as_the_clients_mistake(
    inputs: list[object], tail: bytes | None
) -> None:
    try:
        request = read({"inputs": inputs}, tail)
    except ClientError:
        return
    assert 1 <= len(request.images) <= SETTINGS.max_images
