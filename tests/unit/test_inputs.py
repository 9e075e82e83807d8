"""Reading requests as TorchServe's frontend delivers them."""

import base64
import gzip
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from handler import protocols
from handler.errors import (
    BadRequest,
    InvalidOption,
    MissingImage,
    RepeatedPart,
    RequestError,
    TooLarge,
    TooManyImages,
    UnsupportedFormat,
)
from handler.labels import Label
from handler.protocols.kserve_v1 import KServeV1
from handler.request import Options, Purpose, Request
from handler.settings import MAX_REQUEST_BYTES, Settings
from tests.images import encode
from tests.unit import parts

DEFAULTS = Options(topk=5, threshold=0.1)
SETTINGS = Settings(topk=5, threshold=0.1, max_images=4)
LABELS = [
    *(Label("n0", "tench"), Label("n1", "tabby cat"), Label("n2", "tub")),
    *(Label("n3-of-a-long-name-of-its-own", "crane"), Label("n4", "crane")),
]
ARCHIVE = parts.archive(LABELS, SETTINGS, features="f", embedding=8)
FILE = {"content-type": "image/jpeg"}
URLENCODED = "application/x-www-form-urlencoded"
DESCRIBE = {"describe": "True", "Accept": "*/*"}
EXPLAIN = {"explain": "True"}
# What Chromium sends.
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}
# TorchServe does not pass the method on, but adds a length to a request without one.
GET = {"Host": "x", "content-length": "0"}
CONTENT = bytes(range(251)) * 2


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


X = in_base64(b"x")


def encoded(kind: str) -> bytes:
    return encode(Image.radial_gradient("L").resize((40, 30)).convert("RGB"), kind)


KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEG_FILE = encoded("JPEG")
JPEG_TEXT = in_base64(JPEG_FILE)


def as_sent(document: object) -> list[dict[str, object]]:
    """Return a JSON body as TorchServe may pass it on: as bytes, or decoded."""
    return [{"body": bytearray(json.dumps(document).encode())}, {"body": document}]


def read(row: Mapping[str, object], headers: Mapping[str, object] | None = None) -> Request:
    request = Request("id", row, headers or {}, DEFAULTS)
    protocols.parse(request, ARCHIVE)
    return request


def contents(request: Request) -> list[tuple[str, object]]:
    """Return the name of each image, and its bytes or the type of its error."""
    return [
        (image.name, type(image.error) if image.error else image.data) for image in request.images
    ]


# --- Bodies and forms ---


@pytest.mark.parametrize(
    ("row", "headers", "images"),
    [
        *(({name: bytearray(b"x")}, {}, [name]) for name in ("body", "data", "file", "image")),
        *(
            ({name: b"x"}, {name: FILE}, [name])
            for name in ("photo", "topk2", "treshold", "", "\u732b")
        ),
        ({"b": b"1", "a": b"2"}, {"b": FILE, "a": FILE}, ["b", "a"]),
        ({"submit": b"Upload", "file": b"x"}, {}, ["file"]),
        ({"image": b"cat.jpg"}, {}, ["image"]),
        ({"body": "\u732b"}, {}, ["body"]),  # TorchServe decoded it
        ({"body": b"x"}, BROWSER, ["body"]),
        ({"body": b"x"}, {"explain": "False"}, ["body"]),
        # An upload of an empty file, which a GET is not.
        ({"body": b""}, {**GET, "Content-Length": "0"}, ["body"]),
        ({"body": b""}, {**GET, "Transfer-Encoding": "chunked"}, ["body"]),
        # TorchServe puts the request's header into the place of the part's own.
        *(
            ({name: CONTENT}, {name: own}, [name])
            for name in ("describe", "explain", "Accept", "Host")
            for own in ("False", FILE)
        ),
        ({"describe": b"yes", "file": b"x"}, {"describe": "False"}, ["file"]),
        # Only an explanation reads these.
        ({"file": b"x", "class_id": b"my label", "class_index": b"?"}, {}, ["file"]),
    ],
)
def test_a_file_or_a_part_of_a_usual_name_is_an_image(
    row: dict[str, object], headers: dict[str, object], images: list[str]
) -> None:
    request = read(row, headers)
    sent = [row[name] for name in images]
    data = [value.encode() if isinstance(value, str) else value for value in sent]
    assert contents(request) == list(zip(images, data, strict=True))
    assert (request.options.topk, request.options.threshold) == (5, 0.1)
    assert request.purpose is Purpose.CLASSIFY


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        *(({}, {}), ({"body": b""}, GET), ({"topk": b"3"}, {}), ({"submit": b"Upload"}, {})),
        # Only the management API may ask for a description, and only a browser gets the web UI.
        *(({"body": b""}, DESCRIBE), ({"body": b"", "customized": b"true"}, DESCRIBE)),
        ({}, {**DESCRIBE, "Content-Type": URLENCODED}),
        ({}, {**DESCRIBE, "content-type": "x/y", "Content-Type": "Multipart/form-data; boundary"}),
        ({}, BROWSER),
        *(
            ({"body": b""}, {"Accept": accept})
            for accept in (
                *("*/*", "application/json", "text/html;q=0", "text/html; Q=0.0, */*"),
                "application/json, text/html;q=0.5",
            )
        ),
    ],
)
def test_a_request_without_an_image_gets_an_example(
    row: dict[str, object], headers: dict[str, object]
) -> None:
    with pytest.raises(MissingImage, match="curl"):
        read(row, headers)


def test_an_empty_request_gets_the_web_ui_or_a_description() -> None:
    assert read({}, DESCRIBE).purpose is Purpose.DESCRIBE
    for row in ({"body": b""}, {"body": bytearray()}, {"body": b"", "topk": "3"}):
        for headers in (BROWSER, BROWSER | EXPLAIN):
            assert read(row, headers).purpose is Purpose.WEB_UI


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_without_a_file_name_is_recognized_by_its_content(kind: str) -> None:
    content = encoded(kind)
    text = in_base64(content).encode()
    for part in (content, text, b"data:;base64," + text):
        row = {"topk": b"3", "photo": bytearray(part), "token": b"BM" + b"a" * 200}
        request = read(row, {"Content-Type": "multipart/form-data; boundary=x"})
        assert contents(request) == [("photo", content)]


@pytest.mark.parametrize("value", ["BMW f\u00fcr alle", "II*", "abcd" * 100, "/9j/" + "A" * 60])
def test_a_text_field_is_not_an_image(value: str) -> None:
    row = {"comment": bytearray(value.encode()), "file": bytearray(b"x")}
    assert contents(read(row, {"file": FILE})) == [("file", b"x")]


@pytest.mark.parametrize("kind", KINDS)
def test_base64_in_place_of_a_file_is_decoded(kind: str) -> None:
    content = encoded(kind)
    text = in_base64(content)
    for sent in (
        *(text, text.rstrip("="), "data:image/x;base64," + text),
        base64.urlsafe_b64encode(content).decode(),
        base64.encodebytes(content).decode(),
        "data:image/x;base64," + quote(text, safe=""),
        str(text.encode()),  # Python's b'...'
    ):
        assert contents(read({"body": sent})) == [("body", content)]
        for name, headers in (("body", {}), ("image", {}), ("a", {"a": FILE})):
            assert contents(read({name: bytearray(sent.encode())}, headers)) == [(name, content)]


def test_damaged_base64_of_an_image_is_reported() -> None:
    (image,) = read({"body": in_base64(JPEG_FILE) + "%"}).images
    assert isinstance(image.error, BadRequest)
    assert "base64" in str(image.error)


ADDRESSES = ["https://a.example/c.jpg", "s3://a/c.jpg", "FILE:///etc/passwd", "blob:http://a/1"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_rejected_and_nothing_is_downloaded(address: str) -> None:
    tensor = {"name": "a", "shape": [1], "datatype": "BYTES", "data": [address]}
    rows: list[dict[str, object]] = [
        {name: bytearray(address.encode())} for name in ("body", "image")
    ]
    for document in (
        *({"image": address}, {"url": address, "topk": 3}, {"image_url": {"url": address}}),
        *({"instances": [{"url": address}]}, {"images": [address]}, {"inputs": [tensor]}),
        {"inputs": address},
    ):
        rows += as_sent(document)
    for row in rows:
        error = read(row).images[0].error
        assert isinstance(error, BadRequest)
        assert "downloads nothing" in str(error)
    with pytest.raises(BadRequest, match="downloads nothing"):
        read({"url": bytearray(address.encode())})


def test_an_address_in_addition_to_an_image_is_ignored() -> None:
    assert contents(read({"file": b"x", "source": b"https://a.example"})) == [("file", b"x")]
    for row in as_sent({"image": X, "source": "https://a.example"}):
        assert contents(read(row)) == [("image", b"x")]


# --- Compressed bodies ---

COMPRESSED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    # Without zlib's two bytes in front and its checksum at the end, as some servers send it.
    "Deflate": lambda content: zlib.compress(content)[2:-4],
    "identity": bytes,
}


def several_members(content: bytes) -> bytes:
    """As bgzip and some parallel compressors write; RFC 1952 allows it."""
    return b"".join(gzip.compress(content[i : i + 100]) for i in range(0, len(content), 100))


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_a_compressed_body_is_decompressed(encoding: str) -> None:
    for content in (JPEG_FILE, json.dumps({"image": in_base64(JPEG_FILE)}).encode()):
        compress = COMPRESSED[encoding]
        for how in (compress, several_members if compress is gzip.compress else compress):
            request = read({"body": bytearray(how(content))}, {"Content-Encoding": encoding})
            assert [image.data for image in request.images] == [JPEG_FILE]


@pytest.mark.parametrize(
    ("body", "encoding", "error"),
    [
        (JPEG_FILE, "br", UnsupportedFormat),
        (JPEG_FILE, "gzip, deflate", UnsupportedFormat),
        (JPEG_FILE, "gzip", BadRequest),
        (gzip.compress(JPEG_FILE)[:-1], "gzip", BadRequest),
        (gzip.compress(JPEG_FILE) + b"x", "gzip", BadRequest),
        (gzip.compress(b"") * 2_001, "gzip", BadRequest),
        ("decoded", "gzip", BadRequest),
        (gzip.compress(bytes(MAX_REQUEST_BYTES + 1)), "gzip", TooLarge),
    ],
)
def test_a_body_that_cannot_be_decompressed_is_rejected(
    body: object, encoding: str, error: type[RequestError]
) -> None:
    with pytest.raises(error):
        read({"body": body}, {"content-encoding": encoding})
    form = {"Content-Encoding": encoding, "Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(UnsupportedFormat, match=f"Content-Encoding says '{encoding}'"):
        read({"\x1f": b"?"}, form)


def test_another_kind_of_multipart_body_is_rejected_by_name() -> None:
    headers = {"Content-Type": "Multipart/Mixed; boundary=x"}
    with pytest.raises(UnsupportedFormat, match=r"'multipart/mixed'.* only multipart/form-data"):
        read({"body": b"--x\r\nContent-Type: image/jpeg\r\n\r\n" + JPEG_FILE}, headers)


def test_more_images_than_allowed_are_rejected() -> None:
    row = {str(i): b"x" for i in range(5)}
    with pytest.raises(TooManyImages, match="5 images; at most 4"):
        read(row, dict.fromkeys(row, FILE))


# --- Options ---


def test_options_come_in_the_gateways_query_header_and_fields_override_it() -> None:
    row = {"file": b"x", "threshold": bytearray(b"0.2")}
    assert read(row, {"X-Query": "topk=3&threshold=1&submit="}).options == Options(3, 0.2)
    assert read({"body": b"x"}, {"x-query": "class_name=tabby%20cat", **EXPLAIN}).class_index == 1
    for value, wanted in ((b"true", True), (b"1", True), (b"False", False), (b"0", False)):
        assert read({"file": b"x", "embedding": value}).options.embedding is wanted
    for query, message in (("top_k=3", "did you mean topk"), ("a=1&" * 101, "more than 100")):
        with pytest.raises(InvalidOption, match=message):
            read({"body": b"x"}, {"x-query": query})


NUMBERS = (
    *("0", "-1", "1.5", "many", "", "\u2460", b"\xff", "1_0", "\u0663", "+3", "0x3"),
    "9" * 5000 + "x",
)
FRACTIONS = ("-0.1", "1.01", "nan", "inf", "half", "", "0_1", "\u0660.5", "0,5", "1e", ".")
INDEX = "class_index must be a whole number from 0 to 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"topk": value}, "topk must be a whole number of 1 or more") for value in NUMBERS),
        *(({"threshold": value}, "threshold must be a number from 0 to 1") for value in FRACTIONS),
        *(({"class_index": value}, INDEX) for value in ("9", "-1", "1.0", "", "9" * 5000)),
        ({"embedding": b"yes please"}, "embedding must be true or false, got 'yes please'"),
        ({"class_id": "n9"}, "class_id 'n9' is no class of this model"),
        ({"class_name": "cat"}, "class_name 'cat' is no class of this model.$"),
        ({"class_id": "tench"}, "It is the name of one: use class_name instead"),
        ({"class_name": "n1"}, "'n1' is no class .* It is the id of one: use class_id instead"),
        ({"class_id": "2"}, "It is the index of one: use class_index instead"),
        ({"class_name": "2"}, "It is the index of one: use class_index instead"),
        ({"class_index": "tench"}, f"{INDEX}, got 'tench'. It is the name of one: use class_name"),
        ({"class_name": "crane"}, "2 classes: use class_id instead, 'n3-of-a-long.*', 'n4'"),
        ({"class_name": "tench", "class_id": "n1"}, "name different classes"),
        ({"class_id": "\u732b" * 500}, "is no class"),
        ({"class_id": "n1", "class_index": "2"}, "name different classes"),
    ],
)
def test_an_invalid_option_is_reported_in_few_ascii_characters(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidOption, match=message) as error:
        read({"file": b"x", **options}, EXPLAIN)
    assert str(error.value).isascii()
    assert len(str(error.value)) < 300


NESTED: list[object] = []
for _ in range(987):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("topk", "named"),
    [(True, "true"), (None, "null"), (2.5, "'2.5'"), (NESTED, "a list"), ({"a": NESTED}, "an obj")],
)
def test_an_option_of_another_json_type_is_rejected(topk: object, named: str) -> None:
    with pytest.raises(InvalidOption, match=f"got {named}"):
        read({"body": {"image": X, "topk": topk}})


@pytest.mark.parametrize(("topk", "read_as"), [(3.0, 3), ("3", 3), (" 3\n", 3), (10**400, 10**400)])
def test_a_whole_number_is_read_in_any_of_jsons_ways(topk: object, read_as: int) -> None:
    assert read({"body": {"image": X, "topk": topk}}).options == Options(read_as, 0.1)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("treshold", "threshold"), ("Threshold", "threshold"), ("topK", "topk")),
        *(("top_k", "topk"), ("classindex", "class_index"), ("embeding", "embedding")),
    ],
)
def test_a_misspelled_option_is_rejected_with_the_nearest_name(name: str, meant: str) -> None:
    rows: list[dict[str, object]] = [{"file": b"x", name: b"1"}]
    rows += as_sent({"instances": [X], name: 1})
    for row in [*rows, *as_sent({"image": X, "parameters": {name: 1}})]:
        with pytest.raises(InvalidOption, match=f"did you mean {meant}"):
            read(row)


OTHER_PEOPLES = """
    submit csrf_token csrfmiddlewaretoken token class label name id k tags type task content_type
    binary_data binary_data_size binary_data_output sequence_id priority timeout model_name
"""


@pytest.mark.parametrize("name", OTHER_PEOPLES.split())
def test_fields_of_other_programs_are_ignored(name: str) -> None:
    assert contents(read({"file": b"x", name: b"1"})) == [("file", b"x")]
    for row in as_sent({"image": X, name: "1", "parameters": {name: "1"}}):
        assert contents(read(row)) == [("image", b"x")]


def test_only_the_first_of_very_many_names_are_compared_with_the_options() -> None:
    """20 MB hold a million names, each of which takes 20 microseconds."""
    others = dict.fromkeys(map(str, range(100)), b"")
    assert len(read({"file": b"x", **others, "top_k": b"3"}).images) == 1
    with pytest.raises(InvalidOption):
        read({"file": b"x", "top_k": b"3", **others})


# --- Explanations ---


@pytest.mark.parametrize(
    ("fields", "index"),
    [
        ({}, None),
        *(({"class_index": b"2"}, 2), ({"class_index": "0"}, 0), ({"class_id": b"n1"}, 1)),
        ({"class_id": "n1", "class_index": "1", "class_name": b"tabby cat"}, 1),
        ({"class_name": "Tabby_Cat"}, 1),
        ({"class_id": "n3-of-a-long-name-of-its-own"}, 3),
    ],
)
def test_the_class_to_explain_is_named_by_index_id_or_name(
    fields: dict[str, object], index: int | None
) -> None:
    request = read({"file": b"x", **fields}, EXPLAIN)
    assert request.purpose is Purpose.EXPLAIN
    assert (request.class_index, len(request.images)) == (index, 1)
    for named in ({"class_index": 2}, {"parameters": {"class_id": "n2"}}):
        for row in as_sent({"instances": [X], **named}):
            assert read(row, EXPLAIN).class_index == 2


@pytest.mark.parametrize(
    ("accept", "heat_map"),
    [
        *(("", True), ("*/*", True), ("image/png", True), ("application/json;q=0", True)),
        *(("application/json", False), ("application/*", False)),
        ("application/json, text/plain, */*", False),
        ("application/json;q=0.5, image/png;q=0.4", False),
        ("application/json;q=0.4, image/*;q=0.5", True),
        ("application/json;q=0.1, */*", True),
    ],
)
def test_the_accept_header_chooses_between_heat_map_and_numbers(
    *, accept: str, heat_map: bool
) -> None:
    headers = EXPLAIN | ({"Accept": accept} if accept else {})
    assert read({"body": b"x"}, headers).heat_map is heat_map


def test_several_images_are_explained_in_numbers_only() -> None:
    row, headers = {"a": b"1", "b": b"2"}, {**EXPLAIN, "a": FILE, "b": FILE}
    with pytest.raises(BadRequest, match="Accept: application/json"):
        read(row, headers)
    assert len(read(row, {**headers, "accept": "application/json"}).images) == 2
    for kserve in as_sent({"instances": [X, X]}):
        assert not read(kserve, EXPLAIN).heat_map


# --- Parts of one name ---

Part = tuple[str, str | None, bytes]

# What each client writes between the name and the content of a file, and its boundary.
NAME = '; filename="{name}"'
JPEG = "\r\nContent-Type: image/jpeg"
CLIENTS = {
    "curl": (NAME + JPEG, "-" * 24 + "c92f55c8247d224b000000"),
    "requests": (NAME, "c" * 32),
    "Chromium": (NAME + JPEG, "----WebKitFormBoundary7MA4YWxkTrZu0gW"),
    "Go": (NAME + "\r\nContent-Type: application/octet-stream", "c" * 60),
    "Apache HttpClient": (NAME + JPEG + "\r\nContent-Transfer-Encoding: binary", "c" * 36),
    "OkHttp": (NAME + JPEG + "\r\nContent-Length: 1234567", "c" * 36),
    ".NET": ("; filename*=utf-8''{quoted}; filename={quoted}" + JPEG, "c" * 36),
}
FIELDS: list[Part] = [("topk", None, b"3"), ("threshold", None, b"0.5")]


def sent(client: str, parts: list[Part]) -> tuple[dict[str, object], dict[str, object]]:
    """Return row and headers of a client's form; TorchServe keeps the last part of each name."""
    lines, boundary = CLIENTS[client]
    typed = re.search("Content-Type: (.*?)(\r|$)", lines)
    own = typed[1] if typed else "application/octet-stream"
    headers: dict[str, object] = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    length = len(f"--{boundary}--\r\n")
    for name, file_name, content in parts:
        line = "" if file_name is None else lines.format(name=file_name, quoted=quote(file_name))
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{line}\r\n\r\n\r\n'
        length += len(head.encode()) + len(content)
        headers[name] = {"content-type": "" if file_name is None else own}
    headers["Content-Length"] = str(length)
    return {name: bytearray(content) for name, _, content in parts}, headers


@pytest.mark.parametrize("client", CLIENTS)
def test_parts_that_share_a_name_are_rejected_in_a_form_of_any_client(client: str) -> None:
    """If they have 1.4 kB, and 0.8 kB more for each further file; no other form is rejected."""
    for others in (0, 3):
        parts: list[Part] = [(f"other{i}", "1.jpg", bytes(3_000)) for i in range(others)]
        parts.append(("file", "1.jpg", bytes(1_400 + 800 * others)))
        with pytest.raises(RepeatedPart, match="a name of its own"):
            read(*sent(client, [*parts, ("file", "2.jpg", bytes(100))]))
    for file_name in ("cat.jpg", "", "x" * 255, "\u732b" * 45 + ".jpg"):
        for files in (1, 4):
            parts = [(f"file{i}", file_name, bytes(50_000)) for i in range(files)]
            assert len(read(*sent(client, [*FIELDS, *parts])).images) == files
    parts = [("file", "\u732b" * 85, bytes(500)), ("other", "1.jpg", bytes(500))]
    assert len(read(*sent(client, parts)).images) == 2


# --- JSON ---


@pytest.mark.parametrize(
    "text",
    [
        *(
            prefix + in_base64(CONTENT)
            for prefix in ("", "data:image/png;base64,", "data:;base64,")
        ),
        base64.urlsafe_b64encode(CONTENT).decode(),
        in_base64(CONTENT).rstrip("="),
        base64.encodebytes(CONTENT).decode().replace("\n", "\r\n\t "),
        "data:image/jpeg;charset=x;base64," + in_base64(CONTENT),
        "DATA:IMAGE/PNG;BASE64," + in_base64(CONTENT),
        "data:image/svg+xml;name=a b;base64, " + in_base64(CONTENT),
        "data:image/png;base64," + quote(in_base64(CONTENT), safe=""),
        f"b'{in_base64(CONTENT)}'\n",
        f'b"{in_base64(CONTENT)}"',
    ],
)
def test_json_holds_options_and_an_image_in_any_spelling_of_base64(text: str) -> None:
    for row in as_sent({"image": text, "topk": 3, "threshold": 0.5}):
        request = read(row)
        assert contents(request) == [("image", CONTENT)]
        assert request.options == Options(3, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        *("A", "AAAAA", "AA=", "A===", "AA==AA==", "AA.A", "%2B%2B", "\ud800", "\uff21AAA"),
        *("data:,AAAA", 5),
    ],
)
def test_invalid_base64_fails_that_image_only(text: object) -> None:
    for row in as_sent({"instances": [{"b64": text}, {"b64": X}, {}]}):
        assert [found for _, found in contents(read(row))] == [BadRequest, b"x", BadRequest]
    if isinstance(text, str):
        for row in as_sent({"image": text}):
            assert contents(read(row)) == [("image", BadRequest)]


@pytest.mark.parametrize(
    "instance",
    [
        *(X, {"b64": X}, {"base64": X}, {"image": {"b64": X}}, {"data": X}),
        *({"image_bytes": {"b64": X}}, {"input_1": {"b64": X}}, {"a": {"a": {"a": {"b64": X}}}}),
    ],
)
def test_each_kserve_v1_instance_is_an_image(instance: object) -> None:
    for row in as_sent({"instances": [instance, instance], "parameters": {"topk": 2}}):
        request = read(row)
        assert isinstance(request.protocol, KServeV1)
        assert contents(request) == [("instances[0]", b"x"), ("instances[1]", b"x")]
        assert request.options == Options(2, 0.1)


@pytest.mark.parametrize(
    "document",
    [
        *({"image": {"b64": JPEG_TEXT}}, {"data": JPEG_TEXT}, {"base64": JPEG_TEXT}),
        *({"photo": JPEG_TEXT}, {"photo": {"content": JPEG_TEXT}}, JPEG_TEXT),
        {"inputs": JPEG_TEXT},
        {"input": f"data:image/jpeg;base64,{JPEG_TEXT}", "class": "A" * 200},
    ],
)
def test_json_holds_an_image_under_any_name_or_a_list(document: object) -> None:
    for row in as_sent(document):
        request = read(row, {"Content-Type": "application/json"})
        assert contents(request) == [("image", JPEG_FILE)]
    for row in as_sent({"images": [document, {"b64": X}, 5]}):
        assert contents(read(row))[1:] == [("images[1]", b"x"), ("images[2]", BadRequest)]


def test_an_image_nested_too_deeply_is_not_searched_for() -> None:
    document: object = {"b64": X}
    for _ in range(900):
        document = {"a": document}
    with pytest.raises(MissingImage):
        read({"body": document})


def test_json_announced_as_text_is_json() -> None:
    """As a browser's `fetch` sends a string; TorchServe decodes it to text."""
    document = json.dumps({"image": X, "topk": 3})
    for body in (document, " " + document, document.encode(), bytearray(document.encode())):
        request = read({"body": body}, {"Content-Type": "text/plain;charset=UTF-8"})
        assert contents(request) == [("image", b"x")]
        assert request.options == Options(3, 0.1)
    for body in (f'"{JPEG_TEXT}"', f' "{JPEG_TEXT}"\n'.encode()):
        assert contents(read({"body": body}, {"Content-Type": "text/plain"})) == [
            ("image", JPEG_FILE)
        ]
    with pytest.raises(BadRequest, match="not valid JSON"):
        read({"body": "{"}, {"Content-Type": "text/plain"})


AN_OBJECT = "must be an object"
A_TENSOR = 'Each of "inputs" must be a tensor'


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        *((body, BadRequest, AN_OBJECT) for body in (b"[]", b"5")),
        (b'{"instances": 5}', BadRequest, "must be a list"),
        (b'{"inputs": {}}', BadRequest, "must be a list"),
        (b'{"inputs": [5]}', BadRequest, A_TENSOR),
        *(
            (body, MissingImage, "no image")
            for body in (b"{}", b'{"instances": []}', b'{"inputs": []}', b'{"topk": 3}')
        ),
        *((body, BadRequest, "not valid JSON") for body in (b"{", b'{"image": ', b"\xff\xfe{")),
        pytest.param(b"[" * 90_000, BadRequest, "not valid JSON", id="nested lists"),
        pytest.param(b'{"a":' * 90_000, BadRequest, "not valid JSON", id="nested objects"),
        pytest.param(b"[" * 200_000, BadRequest, "more than 100,000", id="many lists"),
        pytest.param(b"1" * 10_000, BadRequest, "not valid JSON", id="long number"),
    ],
)
def test_json_of_another_form_is_rejected(
    body: Any, error: type[RequestError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read({"body": body}, {"content-type": "application/json; charset=utf-8"})
