"""The whole handler between TorchServe's own protocol and a real engine with a tiny model.

A batch goes in as TorchServe's worker reads it from the frontend, and what comes out is read as the
frontend reads it: what is wrong with one request must be answered in its place, its neighbours must
get what they get alone, and the stream must stay whole.
"""

import base64
import io
import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service

from handler import densenet_handler, images, inputs, responses
from handler.densenet_handler import DenseNetHandler
from handler.exchange import Request
from handler.explain import CLASSIFIER
from handler.labels import CLASS_INDEX
from handler.settings import MODEL_CARD, ModelCard, Preprocessing

TAG_ICC = 34675

CLASSES = 5_000
SIDE = 8
CELLS = 2


def write_model(folder: Path) -> None:
    """Means of the colours in each of 2 x 2 cells, and a linear layer: a model with a map."""
    weights = np.random.default_rng(0).normal(0, 0.02, (3, CLASSES)).astype(np.float32)
    np.save(folder / CLASSIFIER, weights.T)
    kernel = [SIDE // CELLS] * 2
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node(
            "AveragePool", ["floats"], ["features"], kernel_shape=kernel, strides=kernel
        ),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("MatMul", ["means", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3, CELLS, CELLS]),
        ],
        [numpy_helper.from_array(weights, "weights")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "model.onnx")
    index = {str(i): [f"n{i}", f"class number {i}"] for i in range(CLASSES)}
    (folder / CLASS_INDEX).write_text(json.dumps(index))
    card = ModelCard(
        architecture="tiny",
        classes=CLASSES,
        trained=True,
        weights_file="none",
        weights_sha256="0" * 64,
        inputs_sha256="0" * 64,
        preprocessing=Preprocessing(resize=SIDE, crop=SIDE),
        features="features",
    )
    (folder / MODEL_CARD).write_text(card.to_json())


@dataclass(frozen=True)
class Sent:
    """A request from the frontend: headers, and parts with their name, content type and value."""

    parts: tuple[tuple[str, str, Any], ...]
    headers: tuple[tuple[str, str], ...] = ()

    def encoded(self, index: int) -> dict[str, Any]:
        """As `ts.protocol.otf_message_handler` reads it from the socket."""
        return {
            "requestId": f"id-{index}".encode(),
            "headers": [
                {"name": name.encode("utf-8", "replace"), "value": value.encode("utf-8", "replace")}
                for name, value in self.headers
            ],
            "parameters": [
                {"name": name, "contentType": content_type, "value": value}
                for name, content_type, value in self.parts
            ],
        }


@dataclass(frozen=True)
class Answer:
    status: int
    phrase: str
    content_type: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.body, parse_constant=refuse)


def decoded(message: bytes) -> list[Answer]:
    """Reads a batch's answers as TorchServe's `ModelResponseDecoder` does."""
    stream = io.BytesIO(message)

    def number() -> int:
        (value,) = struct.unpack("!i", stream.read(4))
        return int(value)

    def text(length: int) -> str:
        assert 0 <= length <= responses.MAX_ANSWER_BYTES
        content = stream.read(length)
        assert len(content) == length
        return content.decode()

    assert number() == 200, "the whole batch failed"
    text(number())
    answers: list[Answer] = []
    while (length := number()) != -1:
        assert text(length) == f"id-{len(answers)}"
        content_type, status, phrase = text(number()), number(), text(number())
        headers = {text(number()): text(number()) for _ in range(number())}
        length = number()
        assert length <= responses.MAX_ANSWER_BYTES
        answers.append(Answer(status, phrase, content_type, headers, stream.read(length)))
    assert not stream.read()
    return answers


Serve = Callable[..., list[Answer]]


def started(folder: Path) -> tuple[DenseNetHandler, Service]:
    """The handler as TorchServe's worker loads it from an archive's files."""
    model = {"modelName": "tiny", "modelVersion": "1.0", "serializedFile": "model.onnx"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves the file open
        metrics = MetricsCacheYamlImpl(config_file_path="metrics.yaml")
        metrics.initialize_cache()
    made = DenseNetHandler()
    service = Service(
        "tiny", str(folder), {"model": model}, made.handle, None, 8, metrics_cache=metrics
    )
    made.initialize(service.context)
    service.set_cl_socket(None)
    return made, service


@pytest.fixture(scope="module")
def handler_and_service(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[DenseNetHandler, Service]]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_model(folder)
    level = logging.getLogger().level
    yield started(folder)
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def handler(handler_and_service: tuple[DenseNetHandler, Service]) -> DenseNetHandler:
    return handler_and_service[0]


@pytest.fixture(scope="module")
def serve(handler_and_service: tuple[DenseNetHandler, Service]) -> Serve:
    return partial(served, handler_and_service[1])


def served(service: Service, *requests: Sent) -> list[Answer]:
    """What a batch of requests is answered."""
    batch = [request.encoded(index) for index, request in enumerate(requests)]
    answers = decoded(bytes(service.predict(batch)))
    assert len(answers) == len(requests)
    return answers


def picture(colour: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (10, 12), colour).save(content, "PNG")
    return content.getvalue()


COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10)]
PICTURES = [picture(colour) for colour in COLOURS]
RED = PICTURES[0]


def raw(content: bytes, **headers: str) -> Sent:
    return Sent((("body", "image/png", bytearray(content)),), tuple(headers.items()))


def as_json(document: object, *, explain: bool = False) -> Sent:
    """JSON as TorchServe hands it over when it parses it itself."""
    headers = (("Content-Type", "application/json"), ("explain", str(explain)))
    return Sent((("body", "application/json", document),), headers)


EXPLAINED = Sent(raw(RED).parts, (("explain", "True"), ("Accept", "application/json")))
GOOD = [*map(raw, PICTURES), EXPLAINED]


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def alone(serve: Serve) -> list[Any]:
    """What each of the good requests is answered alone."""
    answers = [serve(request)[0] for request in GOOD]
    assert {answer.status for answer in answers} == {200}
    bodies = [answer.json for answer in answers]
    assert len({body["class_id"] for body in bodies[:4]}) == 4
    return bodies


@pytest.fixture(scope="module")
def between(serve: Serve, alone: list[Any]) -> Callable[[Sent], Answer]:
    """Sends a request between good ones, which must get their own right answers."""

    def between(request: Sent) -> Answer:
        *before, answer, after, last = serve(*GOOD[:3], request, *GOOD[3:])
        assert [each.json for each in (*before, after, last)] == alone
        return answer

    return between


# --- What one request raises stays in its place ---


def nested(depth: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


B64 = in_base64(RED)
HOSTILE: dict[str, Sent] = {
    "half a character as JSON": as_json("\ud800"),
    "half a character as a text": Sent((("file", "text/plain", "\ud800"),)),
    "half a character as an image": as_json({"image": "\ud800"}),
    "half a character as an option": as_json({"image": B64, "topk": "\ud800"}),
    "half a character as a name": as_json({"image": B64, "tresh\ud800old": 1}),
    "half a character as an id": as_json(
        {"id": "\ud800", "inputs": [{"datatype": "BYTES", "data": [B64]}]}
    ),
    "half a character as a class": as_json({"image": B64, "class_id": "\ud800"}, explain=True),
    "a deep topk": as_json({"image": "AA==", "topk": nested(987)}),
    "a deep threshold": as_json({"image": B64, "parameters": {"threshold": nested(987)}}),
    "a deep name": as_json({"inputs": [{"name": nested(987), "datatype": "BYTES", "data": [B64]}]}),
    "a deep shape": as_json(
        {"inputs": [{"shape": nested(987), "datatype": "BYTES", "data": [B64]}]}
    ),
    "deep data": as_json({"inputs": [{"datatype": "BYTES", "data": nested(987)}]}),
    "a deep instance": as_json({"instances": nested(987)}),
    "a list as datatype": as_json({"inputs": [{"datatype": [], "data": [B64]}]}),
    "a long number": as_json({"image": B64, "topk": 10**4000}),
    "a number that is none": as_json(
        {"image": B64, "topk": float("nan"), "threshold": float("inf")}
    ),
    "a long length": Sent(raw(RED).parts, (("Content-Length", "9" * 5000),)),
    "a length in other digits": Sent(raw(RED).parts, (("Content-Length", "\u0663"),)),
    "an id in other letters": Sent(raw(RED).parts, (("X-Request-Id", "\u732b\n"),)),
    "JSON in a form": Sent((("file", "application/json", {"a": 1}), ("other", "x/y", b"x"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_answered_in_its_place(
    between: Callable[[Sent], Answer], name: str
) -> None:
    answer = between(HOSTILE[name])
    assert answer.status in {200, 400, 422}, answer.body
    assert answer.json


@pytest.mark.parametrize("profile", ["a text", 7, b"no profile", b"x" * 100_000])
def test_an_odd_colour_profile_is_its_pictures_own_trouble(
    between: Callable[[Sent], Answer], profile: object
) -> None:
    content = io.BytesIO()
    tags = ImageFileDirectory_v2()
    tags[TAG_ICC] = profile
    Image.new("RGB", (10, 12)).save(content, "TIFF", tiffinfo=tags)
    answer = between(Sent(raw(content.getvalue()).parts, (("explain", "True"),)))
    assert (answer.content_type == "image/png") is (answer.status == 200)


STAGES = {
    "reading": (inputs, "read"),
    "deciding": (responses, "check_topk"),
    "answering": (responses, "classification"),
    "encoding": (responses, "collect"),
    "checking": (responses, "check_size"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", [RecursionError, MemoryError, ValueError, KeyError, OSError])
def test_a_fault_in_any_stage_is_one_requests_500(  # noqa: PLR0913, PLR0917  # fixtures
    serve: Serve,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    fault: type[Exception],
) -> None:
    """It fails on the second of four calls, whatever the fault is."""
    module, name = STAGES[stage]
    as_it_is, calls = getattr(module, name), []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise fault("the secret of the house")
        return as_it_is(*arguments, **options)

    monkeypatch.setattr(module, name, broken)
    answers = serve(*GOOD[:4])
    assert [answer.status for answer in answers] == [200, 500, 200, 200]
    assert answers[1].json["type"] == "InternalError"
    assert "under id id-1" in answers[1].json["message"]
    assert b"secret" not in answers[1].body
    assert [answers[i].json for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]
    assert "Failed on request id-1" in caplog.text
    assert "the secret of the house" in caplog.text


BAD = [
    HOSTILE["half a character as JSON"],
    HOSTILE["half a character as an image"],
    HOSTILE["a deep threshold"],
    HOSTILE["deep data"],
    HOSTILE["a list as datatype"],
    raw(RED[:40]),
    raw(b""),
]
FAULTY = raw(RED, fault="yes")


@pytest.mark.parametrize(
    ("bad", "statuses"),
    [
        pytest.param(BAD, {400, 422}, id="the clients' faults"),
        pytest.param([FAULTY], {500}, id="a fault of the server's own"),
    ],
)
def test_two_hundred_requests_are_answered_beside_a_bad_one_in_each_batch(  # noqa: PLR0913, PLR0917
    serve: Serve,
    handler: DenseNetHandler,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    bad: list[Sent],
    statuses: set[int],
) -> None:
    """In batches of the configured size; the bad one's place moves."""

    def read(request: Request, *arguments: Any) -> None:
        if "fault" in request.headers:
            raise RuntimeError("unforeseen")
        as_it_is(request, *arguments)

    as_it_is = inputs.read
    monkeypatch.setattr(inputs, "read", read)
    good, step = list(range(200)), handler.batch_size - 1
    for number, start in enumerate(range(0, len(good), step)):
        of_batch = good[start : start + step]
        batch = [GOOD[i % len(GOOD)] for i in of_batch]
        place = number % (len(batch) + 1)
        answers = serve(*batch[:place], bad[number % len(bad)], *batch[place:])
        assert answers.pop(place).status in statuses
        assert [answer.status for answer in answers] == [200] * len(batch)
        assert [answer.json for answer in answers] == [alone[i % len(GOOD)] for i in of_batch]


def test_a_fault_of_the_decoder_loses_only_its_request(
    serve: Serve, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, *arguments: Any, **options: Any) -> Any:
        if data == PICTURES[1]:
            raise MemoryError
        return as_it_is(data, *arguments, **options)

    as_it_is = images.decode
    monkeypatch.setattr(densenet_handler, "decode", broken)
    answers = serve(*GOOD[:4])
    assert [answer.status for answer in answers] == [200, 500, 200, 200]
    assert [answers[i].json for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]


def is_green(pixels: np.ndarray) -> np.ndarray:
    greens: np.ndarray = pixels[:, 1].mean(axis=(1, 2)) > pixels[:, 0].mean(axis=(1, 2)) + 100
    return greens


def test_an_image_that_the_engine_fails_on_is_lost_alone(
    serve: Serve, handler: DenseNetHandler, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pixels: np.ndarray) -> np.ndarray:
        if is_green(pixels).any():
            raise RuntimeError("cuda")
        logits: np.ndarray = as_it_is(pixels)
        return logits

    as_it_is = handler.engine.logits
    monkeypatch.setattr(handler.engine, "logits", broken)
    three = {"instances": [{"b64": in_base64(content)} for content in PICTURES[:3]]}
    *single, several = serve(*GOOD[:4], as_json(three))
    assert [answer.status for answer in single] == [200, 500, 200, 200]
    assert [single[i].json for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]
    results = several.json["predictions"]
    assert [result.get("code", 200) for result in results] == [200, 500, 200]
    assert [results[0], results[2]] == [alone[0], alone[2]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_their_image_only(
    serve: Serve,
    handler: DenseNetHandler,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    def poisoned(pixels: np.ndarray) -> np.ndarray:
        logits: np.ndarray = as_it_is(pixels).copy()
        logits[is_green(pixels), 7] = value
        return logits

    as_it_is = handler.engine.logits
    monkeypatch.setattr(handler.engine, "logits", poisoned)
    answers = serve(*GOOD[:4])
    assert [answer.status for answer in answers] == [200, 500, 200, 200]
    assert answers[1].json["type"] == "InternalError"
    assert [answers[i].json for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]


def test_what_cannot_be_counted_is_answered_all_the_same(
    serve: Serve, handler: DenseNetHandler, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler.metrics, "_count", None)
    assert [answer.json for answer in serve(*GOOD)] == alone


def test_the_metrics_are_told_what_the_answers_say(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "densenet.requests")
    low = Sent((("file", "image/png", RED), ("threshold", "", b"1")))
    deep = as_json({"image": B64, "topk": []})
    several = as_json({"instances": [B64, "%"]})
    serve(HOSTILE["a long length"], low, EXPLAINED, raw(b"text"), deep, several)
    lines = [json.loads(r.message) for r in caplog.records if r.name == "densenet.requests"]
    assert [line["outcomes"] for line in lines] == [
        ["recognized"],
        ["unrecognized"],
        ["explained"],
        ["NotAnImage"],
        ["InvalidOption"],
        ["recognized", "BadRequest"],
    ]
    assert [line["status"] for line in lines] == [200, 200, 200, 400, 422, 200]


# --- The largest answer ---


def test_no_answer_above_the_frontends_limit_leaves(between: Callable[[Sent], Answer]) -> None:
    """16 images with 5,000 classes each are 7 MB."""
    for form in (
        {"instances": [B64] * 16},
        {"inputs": [{"datatype": "BYTES", "data": [B64] * 16}]},
    ):
        answer = between(as_json({**form, "topk": 100_000}))
        assert answer.status == 413
        assert answer.json["type"] == "AnswerTooLarge"
        assert "smaller topk" in answer.json["message"]
    # KServe's `result` is JSON within JSON, which makes it larger.
    document = {"inputs": [{"datatype": "BYTES", "data": [B64] * 14}], "topk": 5_000}
    assert between(as_json(document)).json["type"] == "AnswerTooLarge"
    fits = between(as_json({"instances": [B64] * 10, "topk": 5_000}))
    assert fits.status == 200
    assert len(fits.json["predictions"][9]["predictions"]) == 5_000


def test_a_long_name_does_not_make_an_answer_too_large(between: Callable[[Sent], Answer]) -> None:
    name = "x" * 4_000_000
    answer = between(Sent(((name, "x/y", RED), (f"{name}2", "x/y", RED))))
    assert (answer.status, answer.json["type"]) == (413, "AnswerTooLarge")
    assert len(answer.body) < 1_000


# --- Anything at all ---

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([B64, "\ud800", "n1", "class_id", 10**400])
)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "image",
                        "b64",
                        "instances",
                        "inputs",
                        "outputs",
                        "data",
                        "datatype",
                        "shape",
                    ),
                    *("parameters", "topk", "threshold", "class_id", "class_index", "id", "name"),
                ]
            )
            | st.text(max_size=5),
            inner | st.sampled_from(["BYTES", "UINT8", "result"]),
            max_size=6,
        )
    ),
    max_leaves=15,
)
names = st.sampled_from(
    ["body", "data", "file", "image", "topk", "threshold", "class_index", "class_id", "explain"]
) | st.text(st.characters(codec="utf-8"), max_size=6)
values = (
    st.sampled_from([RED, RED[:40], bytearray(PICTURES[1]), b"", b"3", b"{", b"cat.jpg"])
    | st.binary(max_size=30)
    | st.text(max_size=10)
    | documents
)
parts = st.tuples(
    names, st.sampled_from(["", "image/png", "text/plain", "application/json"]), values
)
header_names = st.sampled_from(
    [
        *("Content-Type", "content-length", "Content-Length", "describe", "explain", "Accept"),
        *("Inference-Header-Content-Length", "X-Request-Id", "body", "file", "Transfer-Encoding"),
    ]
)
header_values = st.sampled_from(
    [
        *("True", "False", "text/html", "application/json;q=0.5", "image/png", "0", "5", "9999"),
        *("multipart/form-data; boundary=x", "application/json", "text/plain"),
        "application/x-www-form-urlencoded",
    ]
) | st.text(max_size=10)
anything = st.builds(
    lambda parts, headers: Sent(tuple(parts), tuple(headers.items())),
    st.lists(parts, max_size=4),
    st.dictionaries(header_names, header_values, max_size=5),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(request=anything)
def test_whatever_is_sent_stays_in_its_place(
    between: Callable[[Sent], Answer], request: Sent
) -> None:
    answer = between(request)
    assert answer.status < 500, answer.body
    assert answer.phrase.isascii()
    for name, value in answer.headers.items():
        assert (name + value).isascii()
        assert (name + value).isprintable()
    if answer.content_type == "application/json" and answer.status >= 400:
        assert answer.json["error"] == answer.json["message"]
        assert answer.json["success"] is False


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(document=documents, explain=st.booleans())
def test_any_json_stays_in_its_place(
    between: Callable[[Sent], Answer], document: object, *, explain: bool
) -> None:
    assert between(as_json(document, explain=explain)).status < 500
