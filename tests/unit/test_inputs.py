"""Reading requests as TorchServe's frontend delivers them."""

import base64
import json
import re
import time
from collections.abc import Mapping
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import inputs, responses
from handler.errors import (
    BadRequest,
    ClientError,
    InvalidOption,
    MissingImage,
    NotAnImage,
    RepeatedPart,
    TooManyImages,
)
from handler.exchange import Options, Protocol, Purpose, Request
from handler.labels import Label
from handler.settings import Settings

DEFAULTS = Options(topk=5, threshold=0.1)
SETTINGS = Settings(topk=5, threshold=0.1, max_images=4)
FILE = {"content-type": "image/jpeg"}
URLENCODED = "application/x-www-form-urlencoded"
LABELS = [Label("n0", "tench"), Label("n1", "tabby"), Label("n2", "tub")]


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_sent(document: object) -> list[dict[str, object]]:
    """A JSON body as TorchServe may hand it over: as bytes, or decoded."""
    return [{"body": bytearray(json.dumps(document).encode())}, {"body": document}]


def read(row: Mapping[str, object], headers: Mapping[str, object] | None = None) -> Request:
    request = Request("id", row, headers or {}, DEFAULTS)
    inputs.read(request, SETTINGS, LABELS)
    return request


def contents(request: Request) -> list[tuple[str, object]]:
    """Of each image its name, and its bytes or what is wrong with it."""
    return [
        (image.name, type(image.error) if image.error else image.data) for image in request.images
    ]


@pytest.mark.parametrize("name", ["body", "data", "file", "image"])
def test_the_usual_names_hold_an_image_even_where_nothing_says_it_is_a_file(name: str) -> None:
    request = read({name: bytearray(b"bytes")})
    assert contents(request) == [(name, b"bytes")]
    assert (request.options, request.purpose) == (DEFAULTS, Purpose.CLASSIFY)


@pytest.mark.parametrize("name", ["photo", "topk2", "", "\u732b"])
def test_a_file_of_any_name_is_an_image(name: str) -> None:
    request = read({name: bytearray(b"bytes")}, {name: FILE})
    assert contents(request) == [(name, b"bytes")]
    assert (request.options, request.purpose) == (DEFAULTS, Purpose.CLASSIFY)


def test_options_come_as_form_fields() -> None:
    request = read({"file": b"x", "topk": bytearray(b"3"), "threshold": "0.5"})
    assert request.options == Options(topk=3, threshold=0.5)
    assert contents(request) == [("file", b"x")]


def test_a_form_may_hold_several_images() -> None:
    request = read({"first": b"1", "second": b"2"}, {"first": FILE, "second": FILE})
    assert contents(request) == [("first", b"1"), ("second", b"2")]


def test_text_that_torchserve_decoded_is_bytes_again() -> None:
    assert contents(read({"body": "hello"})) == [("body", b"hello")]


def test_a_field_that_is_not_for_us_is_ignored() -> None:
    assert contents(read({"submit": b"Upload", "file": b"x"})) == [("file", b"x")]


def test_more_images_than_allowed_are_refused() -> None:
    row = {str(i): b"x" for i in range(5)}
    with pytest.raises(TooManyImages, match="5 images; at most 4"):
        read(row, dict.fromkeys(row, FILE))


@pytest.mark.parametrize("row", [{}, {"body": b""}, {"topk": b"3"}, {"submit": b"Upload"}])
def test_a_request_without_an_image_says_how_to_send_one(row: dict[str, object]) -> None:
    with pytest.raises(MissingImage, match="curl"):
        read(row)


@pytest.mark.parametrize(
    "value", ["0", "-1", "1.5", "many", "", "\u2460", b"\xff", "1_0", "\u0663", "+3", "3.0", "0x3"]
)
def test_a_bad_topk_is_named(value: object) -> None:
    with pytest.raises(InvalidOption, match="topk must be a whole number") as error:
        read({"file": b"x", "topk": value})
    assert str(error.value).isascii()


@pytest.mark.parametrize(
    "value", ["-0.1", "1.01", "nan", "inf", "half", "", "0_1", "\u0660.5", "0,5", "1e", "."]
)
def test_a_bad_threshold_is_named(value: str) -> None:
    with pytest.raises(InvalidOption, match="threshold must be a number from 0 to 1"):
        read({"file": b"x", "threshold": value})


def test_a_long_bad_value_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidOption) as error:
        read({"file": b"x", "topk": "9" * 5000 + "x"})
    assert len(str(error.value)) < 200


def test_the_management_api_asks_for_a_description() -> None:
    assert read({}, {"describe": "True", "Accept": "*/*"}).purpose is Purpose.DESCRIBE


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": b""}, {}),
        ({"body": b"", "customized": b"true"}, {}),
        ({}, {"Content-Type": "application/x-www-form-urlencoded"}),
        ({}, {"content-type": "x/y", "Content-Type": "Multipart/form-data; boundary=x"}),
    ],
)
def test_a_client_of_the_inference_api_gets_no_description(
    row: dict[str, object], headers: dict[str, object]
) -> None:
    with pytest.raises(MissingImage):
        read(row, {"describe": "True", **headers})


def read_explanation(
    row: Mapping[str, object], headers: Mapping[str, object] | None = None
) -> Request:
    request = read(row, {"explain": "True", **(headers or {})})
    assert request.purpose is Purpose.EXPLAIN
    return request


def test_an_explanation_is_asked_for_by_header() -> None:
    request = read_explanation({"body": b"x"})
    assert contents(request) == [("body", b"x")]
    assert request.class_index is None
    assert request.as_picture
    assert read({"body": b"x"}, {"explain": "False"}).purpose is Purpose.CLASSIFY


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
    [
        ("*/*", True),
        ("image/png", True),
        ("application/json", False),
        ("application/json, text/plain, */*", False),
        ("application/json;q=0.5, image/png;q=0.4", False),
        ("application/json;q=0.4, image/*;q=0.5", True),
        ("application/json;q=0", True),
        ("application/json;q=0.1, */*", True),
        ("application/*", False),
        ("", True),
    ],
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
    assert len(read_explanation(row, {**headers, "accept": "application/json"}).images) == 2


# What Chromium sends.
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


@pytest.mark.parametrize("row", [{"body": b""}, {"body": bytearray()}, {"body": b"", "topk": "3"}])
def test_a_browser_that_sends_nothing_gets_the_page(row: dict[str, object]) -> None:
    for headers in (BROWSER, {**BROWSER, "explain": "True"}):
        assert read(row, headers).purpose is Purpose.PAGE


def test_only_a_browser_that_sends_nothing_gets_the_page() -> None:
    assert contents(read({"body": b"x"}, BROWSER)) == [("body", b"x")]
    for row, accept in (
        ({"body": b""}, "*/*"),
        ({"body": b""}, "application/json"),
        ({"body": b""}, "text/html;q=0"),
        ({"body": b""}, "text/html; Q=0.0, */*"),
        ({"body": b""}, "application/json, text/html;q=0.5"),
        ({}, BROWSER["Accept"]),
    ):
        with pytest.raises(MissingImage):
            read(row, {"Accept": accept})


@pytest.mark.parametrize("name", ["describe", "explain", "Accept", "Host"])
def test_a_file_named_as_a_header_is_an_image(name: str) -> None:
    """TorchServe puts the request's header into the place of the part's own."""
    picture = bytes(range(256)) * 2
    for own in ("False", FILE):
        assert contents(read({name: picture}, {name: own})) == [(name, picture)]
    fields = read({name: b"yes", "file": b"x"}, {name: "False"})
    assert contents(fields) == [("file", b"x")]


# Of HTTP's methods TorchServe passes on none, but to a request without a length it adds one.
FROM_A_GET = {"Host": "x", "content-length": "0"}


def test_a_file_without_bytes_is_an_empty_image_and_a_get_is_none() -> None:
    for headers in ({"Content-Length": "0"}, {"Transfer-Encoding": "chunked"}):
        assert contents(read({"body": b""}, {**FROM_A_GET, **headers})) == [("body", b"")]
    with pytest.raises(MissingImage):
        read({"body": b""}, FROM_A_GET)


@pytest.mark.parametrize("form", ["multipart/form-data; boundary=x", URLENCODED])
def test_a_field_in_a_files_place_is_told_of_curls_at_sign(form: str) -> None:
    (image,) = read({"image": b"cat.jpg"}, {"Content-Type": form}).images
    assert isinstance(image.error, NotAnImage)
    assert "curl -F image=@cat.jpg" in str(image.error)
    assert contents(read({"image": b"cat.jpg"})) == [("image", b"cat.jpg")]


def test_json_that_curl_announces_as_a_form_is_told_of_the_header() -> None:
    row = {'{"image":"AAAA': b'"}'}
    with pytest.raises(BadRequest, match="Content-Type: application/json"):
        read(row, {"Content-Type": URLENCODED})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("treshold", "threshold"),
        ("Threshold", "threshold"),
        ("topK", "topk"),
        ("top_k", "topk"),
        ("class-id", "class_id"),
        ("classindex", "class_index"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_nearest_name(name: str, meant: str) -> None:
    rows: list[dict[str, object]] = [{"file": b"x", name: b"1"}]
    rows += as_sent({"instances": [in_base64(b"x")], name: 1})
    rows += as_sent({"image": in_base64(b"x"), "parameters": {name: 1}})
    for row in rows:
        with pytest.raises(InvalidOption, match=f"did you mean {meant}"):
            read(row)
    assert contents(read({name: b"x"}, {name: FILE})) == [(name, b"x")]


OTHER_PEOPLES = """
    submit csrf_token csrfmiddlewaretoken token class label name id k tags type task content_type
    binary_data binary_data_size binary_data_output sequence_id priority timeout model_name
"""


@pytest.mark.parametrize("name", OTHER_PEOPLES.split())
def test_other_peoples_fields_are_let_be(name: str) -> None:
    assert contents(read({"file": b"x", name: b"1"})) == [("file", b"x")]
    for row in as_sent({"image": in_base64(b"x"), name: "1", "parameters": {name: "1"}}):
        assert contents(read(row)) == [("image", b"x")]


def test_a_million_names_are_not_looked_at() -> None:
    names = {f"topc{i}": b"" for i in range(1_000_000)}
    started = time.process_time()
    read({"file": b"x", **dict.fromkeys(map(str, range(100))), **names})
    assert time.process_time() - started < 5


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


Part = tuple[str, str | None, bytes]


def written(parts: list[Part], lines: str, boundary: str) -> bytes:
    """A form, each part with a client's own header lines."""
    body = b""
    for name, file_name, content in parts:
        disposition = f'form-data; name="{name}"'
        if file_name is not None:
            disposition += lines.format(name=file_name, quoted=quote(file_name))
        elif "8bit" in lines:
            disposition += (
                "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit"
            )
        head = f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n"
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


# What is between the name and the content of a file, as each of them writes it.
CLIENTS = {
    "curl": (
        '; filename="{name}"\r\nContent-Type: image/jpeg',
        "-" * 24 + "c92f55c8247d224b000000",
    ),
    "requests": ('; filename="{name}"', "c" * 32),
    "httpx": ('; filename="{name}"\r\nContent-Type: image/jpeg', "c" * 32),
    "Chromium": (
        '; filename="{name}"\r\nContent-Type: image/jpeg',
        "----WebKitFormBoundary7MA4YWxkTrZu0gW",
    ),
    "Go": ('; filename="{name}"\r\nContent-Type: application/octet-stream', "c" * 60),
    "Apache HttpClient": (
        '; filename="{name}"\r\nContent-Type: image/jpeg\r\nContent-Transfer-Encoding: binary',
        "c" * 36 + "8bit",
    ),
    "OkHttp": (
        '; filename="{name}"\r\nContent-Type: image/jpeg\r\nContent-Length: 1234567',
        "c" * 36,
    ),
    ".NET": (
        "; filename*=utf-8''{quoted}; filename={quoted}\r\nContent-Type: image/jpeg",
        "c" * 36,
    ),
}


def sent(client: str, parts: list[Part]) -> tuple[dict[str, object], dict[str, object]]:
    """Row and headers of a form; of parts of one name the last."""
    lines, boundary = CLIENTS[client]
    body = written(parts, lines, boundary)
    headers: dict[str, object] = {
        "Content-Type": f"multipart/form-data; boundary={boundary}",
        "Content-Length": str(len(body)),
    }
    for name, file_name, _ in parts:
        named = re.search("Content-Type: (.*?)(\r|$)", lines)
        own = named[1] if named else "application/octet-stream"
        headers[name] = {"content-type": "" if file_name is None else own}
    return {name: bytearray(content) for name, _, content in parts}, headers


FIELDS: list[Part] = [("topk", None, b"3"), ("threshold", None, b"0.5")]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("file_name", ["cat.jpg", "", "x" * 255, "\u732b" * 45 + ".jpg"])
@pytest.mark.parametrize("files", [1, 4])
def test_no_clients_form_is_taken_for_one_with_lost_parts(
    client: str, file_name: str, files: int
) -> None:
    parts: list[Part] = [(f"file{i}", file_name, bytes(50_000)) for i in range(files)]
    assert len(read(*sent(client, [*FIELDS, *parts])).images) == files


@pytest.mark.parametrize("client", CLIENTS)
def test_the_longest_name_of_one_file_is_not_taken_for_a_lost_part(client: str) -> None:
    parts: list[Part] = [("file", "\u732b" * 85, bytes(500)), ("other", "1.jpg", bytes(500))]
    assert len(read(*sent(client, parts)).images) == 2


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("others", [0, 3])
def test_lost_parts_above_the_bound_that_the_readme_names_are_noticed(
    client: str, others: int
) -> None:
    """1.4 kB, and 0.8 kB more for each further file."""
    least = 1_400 + 800 * others
    parts: list[Part] = [(f"other{i}", "1.jpg", bytes(3_000)) for i in range(others)]
    twice: list[Part] = [("file", "1.jpg", bytes(least)), ("file", "2.jpg", bytes(100))]
    with pytest.raises(RepeatedPart):
        read(*sent(client, parts + twice))


# --- JSON ---


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_json_holds_an_image_in_base64_and_options(prefix: str) -> None:
    for row in as_sent({"image": prefix + in_base64(b"bytes"), "topk": 3, "threshold": 0.5}):
        request = read(row)
        assert contents(request) == [("image", b"bytes")]
        assert request.options == Options(3, 0.5)


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
        assert request.protocol is Protocol.KSERVE_V1
        assert contents(request) == [("instances[0]", b"x"), ("instances[1]", b"x")]
        assert request.options == Options(2, 0.1)


def test_kserve_v2_inputs() -> None:
    tensor = {"name": "photo", "shape": [2], "datatype": "BYTES", "data": [in_base64(b"x")] * 2}
    for row in as_sent({"id": "42", "inputs": [tensor], "parameters": {"threshold": 0.9}}):
        request = read(row)
        assert request.protocol is Protocol.KSERVE_V2
        assert request.client_id == "42"
        assert contents(request) == [("photo[0]", b"x"), ("photo[1]", b"x")]
        assert request.options == Options(5, 0.9)


def test_an_image_that_is_no_base64_fails_alone() -> None:
    for row in as_sent({"instances": [{"b64": "%%%"}, {"b64": in_base64(b"x")}, {"b64": 5}, {}]}):
        found = [content for _, content in contents(read(row))]
        assert found == [BadRequest, b"x", BadRequest, BadRequest]


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


NESTED: list[object] = []
for _ in range(987):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("topk", "named"),
    [
        (True, "true"),
        (None, "null"),
        (NESTED, "a list"),
        ({"a": NESTED}, "an object"),
        (2.5, "'2.5'"),
    ],
)
def test_an_option_of_another_type_is_refused(topk: object, named: str) -> None:
    with pytest.raises(InvalidOption, match=f"got {named}"):
        read({"body": {"image": in_base64(b"x"), "topk": topk}})


@pytest.mark.parametrize(("topk", "read_as"), [(3.0, 3), ("3", 3), (" 3\n", 3), (10**400, 10**400)])
def test_a_whole_number_is_read_in_any_of_jsons_ways(topk: object, read_as: int) -> None:
    request = read({"body": {"image": in_base64(b"x"), "topk": topk}})
    assert request.options == Options(read_as, 0.1)


def test_json_announced_as_text_is_json() -> None:
    """As a browser's `fetch` sends a string; TorchServe makes a text of it."""
    document = json.dumps({"image": in_base64(b"x"), "topk": 3})
    for body in (document, " " + document, document.encode(), bytearray(document.encode())):
        request = read({"body": body}, {"Content-Type": "text/plain;charset=UTF-8"})
        assert contents(request) == [("image", b"x")]
        assert request.options == Options(3, 0.1)
    with pytest.raises(BadRequest, match="not valid JSON"):
        read({"body": "{"}, {"Content-Type": "text/plain"})
    with pytest.raises(BadRequest, match="must be an object"):
        read({"body": "\ud800"}, {"Content-Type": "application/json"})


PICTURE = bytes(range(251))


@pytest.mark.parametrize(
    "text",
    [
        base64.urlsafe_b64encode(PICTURE).decode(),
        base64.b64encode(PICTURE).decode().rstrip("="),
        base64.encodebytes(PICTURE).decode(),
        base64.encodebytes(PICTURE).decode().replace("\n", "\r\n\t "),
        "data:image/jpeg;charset=x;base64," + in_base64(PICTURE),
        "DATA:IMAGE/PNG;BASE64," + in_base64(PICTURE),
        "data:image/svg+xml;name=a b;base64, " + in_base64(PICTURE),
    ],
)
def test_every_spelling_of_base64_is_read(text: str) -> None:
    for row in as_sent({"image": text}):
        assert contents(read(row)) == [("image", PICTURE)]


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "AAAAA",
        "AA=",
        "A===",
        "AA==AA==",
        "AA.A",
        "%2B%2B",
        "\ud800",
        "\uff21AAA",
        "data:,AAAA",
    ],
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    for row in as_sent({"image": text}):
        assert contents(read(row)) == [("image", BadRequest)]


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
        request = read(row, headers)
    except ClientError as refusal:
        answer = responses.encode(responses.error(refusal))
    else:
        if request.purpose in {Purpose.DESCRIBE, Purpose.PAGE}:
            return
        assert request.class_index is None or 0 <= request.class_index < len(LABELS)
        assert 1 <= len(request.images) <= SETTINGS.max_images
        assert request.options.topk >= 1
        assert 0 <= request.options.threshold <= 1
        return
    assert 400 <= answer.status < 500
    assert json.loads(answer.body)["message"]
