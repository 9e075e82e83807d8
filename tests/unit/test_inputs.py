"""Reading requests as TorchServe's frontend delivers them."""

import base64
import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import responses
from handler.errors import (
    BadRequest,
    ClientError,
    InvalidOption,
    MissingImage,
    RepeatedPart,
    TooManyImages,
)
from handler.inputs import (
    DescribeRequest,
    ExplainRequest,
    Form,
    ImagePart,
    ImagesRequest,
    Options,
    PageRequest,
    read_request,
)
from handler.labels import Label
from handler.settings import Settings

DEFAULTS = Options(topk=5, threshold=0.1)
SETTINGS = Settings(topk=5, threshold=0.1, max_images=4)
FILE = {"content-type": "image/jpeg"}
LABELS = [Label("n0", "tench"), Label("n1", "tabby"), Label("n2", "tub")]


def read(row: Mapping[str, object], headers: Mapping[str, object] | None = None) -> ImagesRequest:
    request = read_request(row, headers or {}, SETTINGS, LABELS)
    assert isinstance(request, ImagesRequest)
    return request


@pytest.mark.parametrize("name", ["body", "data", "file", "image"])
def test_the_usual_names_hold_an_image_even_where_nothing_says_it_is_a_file(name: str) -> None:
    request = read({name: bytearray(b"bytes")})
    assert request == ImagesRequest([ImagePart(name, bytearray(b"bytes"))], DEFAULTS)


@pytest.mark.parametrize("name", ["photo", "topk2", "", "\u732b"])
def test_a_file_of_any_name_is_an_image(name: str) -> None:
    request = read({name: bytearray(b"bytes")}, {name: FILE})
    assert request == ImagesRequest([ImagePart(name, bytearray(b"bytes"))], DEFAULTS)


def test_options_come_as_form_fields() -> None:
    request = read({"file": b"x", "topk": bytearray(b"3"), "threshold": "0.5"})
    assert request.options == Options(topk=3, threshold=0.5)
    assert [part.name for part in request.images] == ["file"]


def test_a_form_may_hold_several_images() -> None:
    request = read({"first": b"1", "second": b"2"}, {"first": FILE, "second": FILE})
    assert request.images == [ImagePart("first", b"1"), ImagePart("second", b"2")]


def test_text_that_torchserve_decoded_is_bytes_again() -> None:
    assert read({"body": "hello"}).images == [ImagePart("body", b"hello")]


def test_a_field_that_is_not_for_us_is_ignored() -> None:
    assert [part.name for part in read({"submit": b"Upload", "file": b"x"}).images] == ["file"]


def test_more_images_than_allowed_are_refused() -> None:
    row = {str(i): b"x" for i in range(5)}
    with pytest.raises(TooManyImages, match="5 images; at most 4"):
        read(row, dict.fromkeys(row, FILE))


@pytest.mark.parametrize("row", [{}, {"body": b""}, {"topk": b"3"}, {"submit": b"Upload"}])
def test_a_request_without_an_image_says_how_to_send_one(row: dict[str, object]) -> None:
    with pytest.raises(MissingImage, match="curl"):
        read(row)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "\u2460", b"\xff"])
def test_a_bad_topk_is_named(value: object) -> None:
    with pytest.raises(InvalidOption, match="topk must be a whole number") as error:
        read({"file": b"x", "topk": value})
    assert str(error.value).isascii()


@pytest.mark.parametrize("value", ["-0.1", "1.01", "nan", "inf", "half", ""])
def test_a_bad_threshold_is_named(value: str) -> None:
    with pytest.raises(InvalidOption, match="threshold must be a number from 0 to 1"):
        read({"file": b"x", "threshold": value})


def test_a_long_bad_value_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidOption) as error:
        read({"file": b"x", "topk": "9" * 5000 + "x"})
    assert len(str(error.value)) < 200


def test_a_description_is_asked_for_by_header() -> None:
    assert read_request({"body": b""}, {"describe": "True"}, SETTINGS, LABELS) == DescribeRequest()


def read_explanation(
    row: Mapping[str, object], headers: Mapping[str, object] | None = None
) -> ExplainRequest:
    request = read_request(row, {"explain": "True", **(headers or {})}, SETTINGS, LABELS)
    assert isinstance(request, ExplainRequest)
    return request


def test_an_explanation_is_asked_for_by_header() -> None:
    request = read_explanation({"body": b"x"})
    assert request.asked.images == [ImagePart("body", b"x")]
    assert request.class_index is None
    assert request.as_picture
    assert read({"body": b"x"}, {"explain": "False"}).images == [ImagePart("body", b"x")]


@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({"class_index": b"2"}, 2),
        ({"class_index": "0"}, 0),
        ({"class_id": bytearray(b"n1")}, 1),
        ({"class_id": "n1", "class_index": "1"}, 1),
    ],
)
def test_a_class_to_explain_is_named_by_index_or_id(options: dict[str, object], index: int) -> None:
    assert read_explanation({"file": b"x", **options}).class_index == index


@pytest.mark.parametrize(
    "document", [{"class_index": 2}, {"parameters": {"class_id": "n2"}}, {"class_id": "n2"}]
)
def test_a_class_to_explain_is_named_in_json(document: dict[str, object]) -> None:
    for row in as_sent({"instances": [in_base64(b"x")], **document}):
        assert read_explanation(row).class_index == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_index": "3"}, "class_index must be a whole number from 0 to 2, got '3'"),
        ({"class_index": "-1"}, "class_index must be"),
        ({"class_index": "1.0"}, "class_index must be"),
        ({"class_index": ""}, "class_index must be"),
        ({"class_index": "9" * 5000}, "class_index must be"),
        ({"class_id": "n3"}, "class_id 'n3' is no class of this model"),
        ({"class_id": "\u732b" * 500}, "is no class"),
        ({"class_id": "n1", "class_index": "2"}, "name different classes"),
    ],
)
def test_a_class_that_is_not_there_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOption, match=message) as error:
        read_explanation({"file": b"x", **options})
    assert str(error.value).isascii()
    assert len(str(error.value)) < 400


def test_a_prediction_does_not_care_for_a_class() -> None:
    assert len(read({"file": b"x", "class_id": b"my label", "class_index": b"?"}).images) == 1


@pytest.mark.parametrize(
    ("accept", "as_picture"),
    [("*/*", True), ("image/png", True), ("application/json", False), ("", True)],
)
def test_the_accept_header_chooses_between_picture_and_numbers(
    *, accept: str, as_picture: bool
) -> None:
    request = read_explanation({"body": b"x"}, {"Accept": accept} if accept else {})
    assert request.as_picture is as_picture


def test_kserve_is_explained_in_numbers() -> None:
    for row in as_sent({"instances": [in_base64(b"x")] * 2}):
        assert not read_explanation(row).as_picture


def test_one_picture_cannot_explain_several_images() -> None:
    row, headers = {"a": b"1", "b": b"2"}, {"a": FILE, "b": FILE}
    with pytest.raises(BadRequest, match="Accept: application/json"):
        read_explanation(row, headers)
    assert len(read_explanation(row, {**headers, "accept": "application/json"}).asked.images) == 2


# What Chromium sends.
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


@pytest.mark.parametrize("row", [{"body": b""}, {"body": bytearray()}, {"body": b"", "topk": "3"}])
def test_a_browser_that_sends_nothing_gets_the_page(row: dict[str, object]) -> None:
    for headers in (BROWSER, {**BROWSER, "explain": "True"}):
        assert read_request(row, headers, SETTINGS, LABELS) == PageRequest()


def test_only_a_browser_that_sends_nothing_gets_the_page() -> None:
    assert read({"body": b"x"}, BROWSER).images == [ImagePart("body", b"x")]
    for row, headers in (
        ({"body": b""}, {"Accept": "*/*"}),
        ({"body": b""}, {"Accept": "application/json"}),
        ({}, BROWSER),
        ({"file": b""}, {"explain": "False"}),
    ):
        request_or_error = answer_to(row, headers)
        assert request_or_error != PageRequest()


def answer_to(row: Mapping[str, object], headers: Mapping[str, object]) -> object:
    try:
        return read_request(row, headers, SETTINGS, LABELS)
    except ClientError as error:
        return error


def test_a_form_part_named_describe_is_an_image() -> None:
    headers: dict[str, object] = {"describe": {"content-type": "image/png"}}
    assert read({"describe": b"x"}, headers).images == [ImagePart("describe", b"x")]


def test_what_goes_back_to_the_client_is_bounded() -> None:
    """TorchServe ends a worker whose answer is larger than it allows."""
    long = "x" * 10_000_000
    (part,) = read({long: b"x"}, {long: FILE}).images
    tensor = {"name": long, "datatype": "BYTES", "data": [in_base64(b"x")]}
    (row, _) = as_sent({"id": long, "inputs": [tensor]})
    v2 = read(row)
    assert v2.request_id is not None
    assert max(map(len, (part.name, v2.images[0].name, v2.request_id))) < 300


# --- Parts of one name ---


def form_headers(length: int) -> dict[str, object]:
    return {
        "Content-Type": "multipart/form-data; boundary=----------------c92f55c8247d224b",
        "Content-Length": str(length),
        "a": FILE,
    }


def test_a_lost_part_of_the_same_name_is_noticed_by_the_length() -> None:
    with pytest.raises(RepeatedPart, match="a name of its own"):
        read({"a": bytes(50_000)}, form_headers(100_400))


def test_a_long_file_name_is_not_taken_for_a_lost_part() -> None:
    name_twice_encoded = 2 * 3 * 255
    assert len(read({"a": bytes(50_000)}, form_headers(50_250 + name_twice_encoded)).images) == 1


def test_a_forms_own_lines_are_not_taken_for_a_lost_part() -> None:
    assert len(read({"a": bytes(50_000)}, form_headers(50_250)).images) == 1


# --- JSON ---


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_sent(document: object) -> list[dict[str, object]]:
    """A JSON body as TorchServe may hand it over: as bytes, or decoded."""
    return [{"body": bytearray(json.dumps(document).encode())}, {"body": document}]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_json_holds_an_image_in_base64_and_options(prefix: str) -> None:
    for row in as_sent({"image": prefix + in_base64(b"bytes"), "topk": 3, "threshold": 0.5}):
        request = read(row)
        assert request == ImagesRequest([ImagePart("image", b"bytes")], Options(3, 0.5))


@pytest.mark.parametrize(
    "instance",
    [
        {"b64": in_base64(b"x")},
        {"image": {"b64": in_base64(b"x")}},
        {"data": in_base64(b"x")},
        {"image_bytes": {"b64": in_base64(b"x")}},
        in_base64(b"x"),
    ],
)
def test_kserve_v1_instances(instance: object) -> None:
    for row in as_sent({"instances": [instance, instance], "parameters": {"topk": 2}}):
        request = read(row)
        assert request.form is Form.KSERVE_V1
        assert [part.data for part in request.images] == [b"x", b"x"]
        assert request.options.topk == 2


def test_kserve_v2_inputs() -> None:
    tensor = {"name": "photo", "shape": [2], "datatype": "BYTES", "data": [in_base64(b"x")] * 2}
    for row in as_sent({"id": "42", "inputs": [tensor], "parameters": {"threshold": 0.9}}):
        request = read(row)
        assert request.form is Form.KSERVE_V2
        assert request.request_id == "42"
        assert request.images == [ImagePart("photo[0]", b"x"), ImagePart("photo[1]", b"x")]
        assert request.options.threshold == 0.9


def test_an_image_that_is_no_base64_fails_alone() -> None:
    for row in as_sent({"instances": [{"b64": "%%%"}, {"b64": in_base64(b"x")}, {"b64": 5}, {}]}):
        data = [part.data for part in read(row).images]
        assert data[1] == b"x"
        assert [isinstance(d, BadRequest) for d in data] == [True, False, True, True]


@pytest.mark.parametrize(
    "document",
    [
        [],
        "text",
        5,
        {"instances": 5},
        {"inputs": {}},
        {"inputs": [5]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]},
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}]},
    ],
)
def test_json_of_another_form_is_a_bad_request(document: object) -> None:
    row = {"body": bytearray(json.dumps(document).encode())}
    with pytest.raises(BadRequest):
        read(row, {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"image": ', b"\xff\xfe{", b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000],
    ids=["brace", "cut", "not UTF-8", "deep list", "deep object", "long number"],
)
def test_what_is_not_json_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        read({"body": bytearray(body)}, {"content-type": "application/json; charset=utf-8"})


@pytest.mark.parametrize("document", [{}, {"instances": []}, {"inputs": []}, {"topk": 3}])
def test_json_without_an_image_says_how_to_send_one(document: object) -> None:
    for row in as_sent(document):
        with pytest.raises(MissingImage):
            read(row)


@pytest.mark.parametrize("topk", [True, None, [3], {"a": 1}, 2.5, 10**400])
def test_an_option_of_another_type_is_refused(topk: object) -> None:
    row = {"body": {"image": in_base64(b"x"), "topk": topk}}
    if topk == 10**400:
        assert read(row).options.topk == topk
        return
    with pytest.raises(InvalidOption):
        read(row)


# --- Anything at all ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["image", "b64", "instances", "inputs", "data", "parameters", "topk"])
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
names = st.sampled_from(
    ["body", "data", "file", "image", "topk", "threshold", "class_index", "class_id"]
) | st.text(max_size=8)
values = st.binary(max_size=50) | st.binary(max_size=50).map(bytearray) | st.text(max_size=20)


@given(
    row=st.dictionaries(names, values | anything, max_size=6),
    headers=st.dictionaries(
        st.sampled_from(["Content-Type", "content-length", "describe", "explain", "accept"])
        | names,
        st.text(max_size=30)
        | st.sampled_from(["True", "text/html"])
        | st.just("multipart/form-data; boundary=x")
        | st.just(FILE),
        max_size=6,
    ),
)
def test_whatever_arrives_is_read_or_refused(
    row: dict[str, object], headers: dict[str, object]
) -> None:
    read_or_refuse(row, headers)


@given(document=anything)
def test_any_json_is_read_or_refused(document: object) -> None:
    read_or_refuse(
        {"body": bytearray(json.dumps(document).encode())}, {"content-type": "application/json"}
    )


def read_or_refuse(row: Mapping[str, object], headers: Mapping[str, object]) -> None:
    try:
        request = read_request(row, headers, SETTINGS, LABELS)
    except ClientError as refusal:
        answer = responses.encode(responses.error(refusal))
    else:
        if isinstance(request, DescribeRequest | PageRequest):
            return
        if isinstance(request, ExplainRequest):
            assert request.class_index is None or 0 <= request.class_index < len(LABELS)
            request = request.asked
        assert 1 <= len(request.images) <= SETTINGS.max_images
        assert request.options.topk >= 1
        assert 0 <= request.options.threshold <= 1
        return
    assert 400 <= answer.status < 500
    assert json.loads(answer.body)["message"]
