"""KServe V2: tensors as JSON and in binary, requested outputs, ids."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import inputs
from handler.errors import BadRequest, ClientError, TooManyImages
from handler.exchange import Options, OutputTensor, Protocol, Request
from handler.labels import Label
from handler.settings import Settings

SETTINGS = Settings(max_images=4)
OPTIONS = Options(SETTINGS.topk, SETTINGS.threshold)
LABELS = [Label("n0", "tench")]
ONE = base64.b64encode(b"1").decode()


def read(
    document: Mapping[str, Any],
    tail: bytes | None = None,
    length: str | None = None,
    *,
    explain: bool = False,
) -> Request:
    """A request as it arrives: JSON, or JSON and the tensors' data behind it."""
    body = json.dumps(document).encode()
    headers = {"explain": str(explain), "Content-Type": "application/json"}
    if tail is not None:
        headers = {
            "explain": str(explain),
            "inference-header-content-length": str(len(body)) if length is None else length,
        }
    request = Request("id", {"body": bytearray(body + (tail or b""))}, headers, OPTIONS)
    inputs.read(request, SETTINGS, LABELS)
    return request


def contents(request: Request) -> list[bytes | bytearray]:
    assert not [image.error for image in request.images if image.error]
    return [image.data for image in request.images]


def tensor(datatype: str = "BYTES", **values: Any) -> dict[str, Any]:
    return {"name": "t", "datatype": datatype, **values}


def binary(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


# --- Tensors ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"shape": [1], "data": [ONE]}, [b"1"]),
        ({"shape": [2, 1], "data": [[ONE], [ONE]]}, [b"1", b"1"]),
        ({"shape": [1, 2], "data": [ONE, ONE]}, [b"1", b"1"]),
        ({"shape": [-1], "data": [ONE, ONE]}, [b"1", b"1"]),
        ({"data": [ONE]}, [b"1"]),
        # KServe's own example for TorchServe.
        ({"shape": -1, "data": ONE}, [b"1"]),
    ],
)
def test_bytes_in_json(values: dict[str, Any], expected: list[bytes]) -> None:
    request = read({"inputs": [tensor(**values)]})
    assert request.protocol is Protocol.KSERVE_V2
    assert contents(request) == expected


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
def test_octets_of_files_in_json_and_in_binary(
    values: dict[str, Any], expected: list[bytes]
) -> None:
    assert contents(read({"inputs": [tensor("UINT8", **values)]})) == expected
    data = b"".join(expected)
    sized = {
        "shape": values.get("shape", -1),
        "parameters": {"binary_data_size": len(data)},
    }
    assert contents(read({"inputs": [tensor("UINT8", **sized)]}, data)) == expected


def test_bytes_in_binary_follow_the_json_in_the_tensors_order() -> None:
    first, second = binary(b"cat", b""), binary(b"dog")
    document = {
        "inputs": [
            tensor(shape=[2], parameters={"binary_data_size": len(first)}),
            tensor(shape=[1], data=[ONE]),
            tensor(shape=[1, 1], parameters={"binary_data_size": len(second)}),
        ]
    }
    assert contents(read(document, first + second)) == [b"cat", b"", b"1", b"dog"]


def sized(size: object, shape: object = -1, datatype: str = "BYTES") -> dict[str, Any]:
    return {"inputs": [tensor(datatype, shape=shape, parameters={"binary_data_size": size})]}


@pytest.mark.parametrize(
    ("document", "tail", "message"),
    [
        (sized(7), binary(b"cat"), "behind the JSON|cut off"),
        (sized(8), binary(b"cat"), "of which 7 are left"),
        (sized(6), binary(b"cat"), "cut off"),
        (sized(3), b"\1\0\0", "cut off"),
        (sized(-1), b"x", "binary_data_size"),
        (sized([]), b"x", "binary_data_size"),
        (sized("7"), binary(b"cat"), "binary_data_size"),
        (sized(1.5), b"x", "binary_data_size"),
        (sized(7, [2]), binary(b"cat"), "shape"),
        (sized(0), b"left", "4 bytes behind the JSON belong to no tensor"),
        ({"inputs": [tensor(data=[ONE])]}, b"left", "belong to no tensor"),
        ({"image": ONE}, b"left", "belong to no tensor"),
    ],
)
def test_binary_data_that_contradict_the_json_are_refused(
    document: dict[str, Any], tail: bytes, message: str
) -> None:
    if message.startswith("behind"):
        assert contents(read(document, tail)) == [b"cat"]
        return
    with pytest.raises(BadRequest, match=message):
        read(document, tail)


@pytest.mark.parametrize("length", ["-1", "x", "999999", "\u0663", "9" * 5000])
def test_a_wrong_length_of_the_json_is_refused(length: str) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length must be"):
        read({"inputs": []}, b"", length)


@pytest.mark.parametrize("length", ["0", "5"])
def test_json_cut_off_by_its_length_is_not_valid(length: str) -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        read({"inputs": []}, b"", length)


@pytest.mark.parametrize(
    "values",
    [
        {"shape": [2], "data": [ONE]},
        {"shape": [1], "data": [ONE, ONE]},
        {"shape": [0], "data": [ONE]},
        {"shape": ["1"], "data": [ONE]},
        {"shape": [True], "data": [ONE]},
        {"shape": [1.0], "data": [ONE]},
        {"shape": [-2], "data": [ONE]},
        {"shape": {}, "data": [ONE]},
        {"shape": [1] * 9, "data": [ONE]},
    ],
)
def test_a_shape_that_contradicts_the_data_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="shape"):
        read({"inputs": [tensor(**values)]})


def test_a_shape_that_contradicts_a_files_octets_is_refused() -> None:
    with pytest.raises(BadRequest, match="says 3 element"):
        read({"inputs": [tensor("UINT8", shape=[3], data=[1, 2])]})


@pytest.mark.parametrize(
    "refused",
    [
        tensor("FP32", shape=[1], data=[1.0]),
        tensor("UINT8", shape=[2, 2, 1], data=[1, 2, 3, 4]),
        tensor("UINT8", shape=[2], data=[1, 256]),
        tensor("UINT8", shape=[1], data=["x"]),
        tensor("UINT8", shape=[0, 4], data=[]),
        tensor("UINT8", shape=[-1, 2], data=[1, 2, 3]),
        tensor(shape=[1]),
        tensor(shape=[1], data={}),
    ],
)
def test_a_tensor_of_another_kind_is_refused(refused: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        read({"inputs": [refused]})


def test_a_tensors_name_is_bounded() -> None:
    """Each picture is named after it."""
    with pytest.raises(BadRequest, match="may have 200 characters"):
        read({"inputs": [{**tensor(data=[ONE]), "name": "x" * 201}]})


def test_more_images_than_allowed_are_refused_in_every_kind_of_tensor() -> None:
    many = binary(*[b""] * 2_000_000)
    for document, tail in (
        ({"inputs": [tensor(data=[ONE] * 5)]}, None),
        ({"inputs": [tensor(data=[ONE] * 3), tensor(data=[ONE] * 2)]}, None),
        ({"inputs": [tensor(data=[ONE])] * 5}, None),
        ({"inputs": [tensor("UINT8", shape=[5, 1], data=[1] * 5)]}, None),
        (sized(len(many)), many),
    ):
        with pytest.raises(TooManyImages):
            read(document, tail)


# --- Outputs and ids ---


def outputs_of(document: Mapping[str, Any], *, explain: bool = False) -> Sequence[OutputTensor]:
    return read({"inputs": [tensor(data=[ONE])], **document}, explain=explain).outputs


NAMES = ["class_id", "class_name", "probability", "recognized", "result"]


def test_all_outputs_come_unless_some_are_asked_for() -> None:
    assert outputs_of({}) == [OutputTensor(name) for name in NAMES]
    assert outputs_of({"outputs": []}) == [OutputTensor(name) for name in NAMES]
    explained = [OutputTensor(name) for name in NAMES if name != "recognized"]
    assert outputs_of({}, explain=True) == explained


def test_outputs_are_asked_for_by_name_in_order_and_in_binary() -> None:
    two = [{"name": "result"}, {"name": "class_id", "parameters": {"binary_data": True}}]
    expected = [OutputTensor("result"), OutputTensor("class_id", binary=True)]
    assert outputs_of({"outputs": two}) == expected
    everything = {"parameters": {"binary_data_output": True}}
    assert outputs_of(everything) == [OutputTensor(name, binary=True) for name in NAMES]


@pytest.mark.parametrize(
    "asked",
    [
        5,
        ["result"],
        [{"name": "logits"}],
        [{}],
        [{"name": ["result"]}],
        [{"name": "result"}] * 6,
        [{"name": "result", "parameters": {"binary_data": 1}}],
        [{"name": "result", "parameters": {"classification": 3}}],
        [{"name": "result", "parameters": {"shared_memory_region": "x"}}],
    ],
)
def test_outputs_that_cannot_be_had_are_refused(asked: object) -> None:
    with pytest.raises(BadRequest):
        outputs_of({"outputs": asked})


def test_an_explanation_has_no_recognized() -> None:
    with pytest.raises(BadRequest, match="class_id, class_name, probability, result are"):
        outputs_of({"outputs": [{"name": "recognized"}]}, explain=True)


@pytest.mark.parametrize(
    ("given", "echoed"), [("my-id", "my-id"), (42, "42"), (None, None), ("x" * 200, "x" * 200)]
)
def test_an_id_comes_back_as_text(given: object, echoed: str | None) -> None:
    assert read({"id": given, "inputs": [tensor(data=[ONE])]}).client_id == echoed


@pytest.mark.parametrize("given", ["x" * 201, 10**200, True, 1.5, [1], {}])
def test_an_id_that_cannot_come_back_is_refused(given: object) -> None:
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
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "binary_data", "topk"]), anything
        ),
    },
)


@given(
    document=st.fixed_dictionaries(
        {"inputs": st.lists(tensors | anything, max_size=3)},
        optional={
            "id": anything,
            "outputs": st.lists(st.dictionaries(st.just("name"), anything) | anything, max_size=3),
            "parameters": st.dictionaries(st.just("binary_data_output"), anything) | anything,
        },
    ),
    tail=st.none() | st.binary(max_size=30),
)
def test_whatever_arrives_is_read_or_refused(document: dict[str, Any], tail: bytes | None) -> None:
    try:
        request = read(document, tail)
    except ClientError:
        return
    assert 1 <= len(request.images) <= SETTINGS.max_images
