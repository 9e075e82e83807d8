"""The whole handler between TorchServe's own protocol and a real engine with a tiny model.

A batch goes in as TorchServe's worker reads it from the frontend, and what comes out is read as the
frontend reads it: an error of one request stays in its place, the others get the responses that
they get alone, and the stream stays complete.
"""

import base64
import io
import itertools
import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

from handler import pipeline, protocols, results
from handler.densenet_handler import DenseNetHandler
from handler.inference.engines import Extra, Outputs
from handler.inference.explain import CLASSIFIER
from handler.labels import CLASS_INDEX
from handler.protocols.forms import Form
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from tests.images import encode

TAG_ICC = 34675

CLASSES = 5_000
SIDE = 8
CELLS = 2


def write_model(folder: Path) -> None:
    """Write a model with a class activation map: mean colors of 2 x 2 cells, a linear layer."""
    weights = np.random.default_rng(0).normal(0, 0.02, (3, CLASSES)).astype(np.float32)
    np.save(folder / CLASSIFIER, weights.T)
    kernel = [SIDE // CELLS] * 2
    make, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        make("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        make("AveragePool", ["floats"], ["features"], kernel_shape=kernel, strides=kernel),
        make("GlobalAveragePool", ["features"], ["pooled"]),
        make("Flatten", ["pooled"], ["means"]),
        make("MatMul", ["means", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("images", TensorProto.UINT8, ["n", 3, SIDE, SIDE])],
        [
            value("logits", TensorProto.FLOAT, ["n", CLASSES]),
            value("features", TensorProto.FLOAT, ["n", 3, CELLS, CELLS]),
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
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        def fail(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.body, parse_constant=fail)


def decoded(message: bytes) -> list[Answer]:
    """Read the responses to a batch as TorchServe's `ModelResponseDecoder` does."""
    stream = io.BytesIO(message)

    def number() -> int:
        (value,) = struct.unpack("!i", stream.read(4))
        return int(value)

    def text(length: int) -> str:
        assert 0 <= length <= results.MAX_RESPONSE_BYTES
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
        assert length <= results.MAX_RESPONSE_BYTES
        answers.append(Answer(status, phrase, content_type, headers, stream.read(length)))
    assert not stream.read()
    return answers


Serve = Callable[..., list[Answer]]


def started(folder: Path) -> tuple[DenseNetHandler, Service]:
    """The handler as TorchServe's worker loads it from an archive's files."""
    model = {"modelName": "tiny", "modelVersion": "1.0", "serializedFile": "model.onnx"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe leaves the file open
        metrics = MetricsCacheYamlImpl(config_file_path="deploy/torchserve/metrics.yaml")
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
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield started(folder)
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def handler(handler_and_service: tuple[DenseNetHandler, Service]) -> DenseNetHandler:
    return handler_and_service[0]


@pytest.fixture(scope="module")
def serve(handler_and_service: tuple[DenseNetHandler, Service]) -> Serve:
    return partial(served, handler_and_service[1])


def served(service: Service, *requests: Sent) -> list[Answer]:
    """Return the responses to a batch of requests."""
    batch = [request.encoded(index) for index, request in enumerate(requests)]
    answers = decoded(bytes(service.predict(batch)))
    assert len(answers) == len(requests)
    return answers


COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10)]
IMAGES = [encode(Image.new("RGB", (10, 12), color)) for color in COLORS]
RED = IMAGES[0]
B64 = base64.b64encode(RED).decode()


def raw(content: bytes, **headers: str) -> Sent:
    return Sent((("body", "image/png", bytearray(content)),), tuple(headers.items()))


def as_json(document: object, *, explain: bool = False) -> Sent:
    """JSON as TorchServe hands it over when it parses it itself."""
    headers = (("Content-Type", "application/json"), ("explain", str(explain)))
    return Sent((("body", "application/json", document),), headers)


def tensor(more: dict[str, object] | None = None, **values: object) -> Sent:
    return as_json({"inputs": [{"datatype": "BYTES", "data": [B64], **values}], **(more or {})})


EXPLAINED = raw(RED, explain="True", Accept="application/json")
GOOD = [*map(raw, IMAGES), EXPLAINED]


@pytest.fixture(scope="module")
def alone(serve: Serve) -> list[Any]:
    """Return the response that each of the good requests gets alone."""
    answers = [serve(request)[0] for request in GOOD]
    assert {answer.status for answer in answers} == {200}
    bodies = [answer.json for answer in answers]
    assert len({body["class_id"] for body in bodies[:4]}) == 4
    return bodies


@pytest.fixture(scope="module")
def between(serve: Serve, alone: list[Any]) -> Callable[[Sent], Answer]:
    """Send a request between good ones, which must get their own responses; its place moves."""
    places = itertools.cycle(range(len(GOOD) + 1))

    def between(request: Sent) -> Answer:
        place = next(places)
        answers = serve(*GOOD[:place], request, *GOOD[place:])
        answer = answers.pop(place)
        assert [each.json for each in answers] == alone
        return answer

    return between


# --- Error isolation ---


DEEP: list[Any] = []
for _ in range(987):
    DEEP = [DEEP]
HOSTILE = [
    # Half a character, which is no text.
    (400, as_json("\ud800")),
    (400, Sent((("file", "text/plain", "\ud800"),))),
    (400, as_json({"image": "\ud800"})),
    (422, as_json({"image": B64, "topk": "\ud800"})),
    (422, as_json({"image": B64, "tresh\ud800old": 1})),
    (422, as_json({"image": B64, "class_id": "\ud800"}, explain=True)),
    (200, tensor({"id": "\ud800"})),
    # Lists in lists, which Python's recursion does not reach the bottom of.
    (422, as_json({"image": "AA==", "topk": DEEP})),
    (422, as_json({"image": B64, "parameters": {"threshold": DEEP}})),
    (400, as_json({"instances": DEEP})),
    (200, tensor(name=DEEP)),
    (400, tensor(shape=DEEP)),
    (400, tensor(data=DEEP)),
    # Other types, and numbers that Python does not read.
    (400, tensor(datatype=[])),
    (422, as_json({"image": B64, "topk": 10**4000})),
    (422, as_json({"image": B64, "topk": float("nan"), "threshold": float("inf")})),
    *((200, raw(RED, **{"Content-Length": length})) for length in ("9" * 5000, "\u0663")),
    (200, raw(RED, **{"X-Request-Id": "\u732b\n"})),
    (200, Sent((("file", "application/json", {"a": 1}), ("other", "x/y", b"x")))),
    # No image, a damaged one, and an empty one.
    *((400, raw(content)) for content in (b"text", RED[:40], b"")),
    (400, raw(b"text", explain="True")),
    (200, as_json({"instances": [B64, "%"]}, explain=True)),
]


@pytest.mark.parametrize(("status", "request_"), HOSTILE)
def test_a_hostile_request_changes_no_other_response(
    between: Callable[[Sent], Answer], status: int, request_: Sent
) -> None:
    answer = between(request_)
    assert answer.status == status, answer.body
    assert answer.json


@pytest.mark.parametrize("profile", ["a text", 7, b"no profile", b"x" * 100_000])
def test_a_malformed_color_profile_changes_no_other_response(
    between: Callable[[Sent], Answer], profile: object
) -> None:
    tags = ImageFileDirectory_v2()
    tags[TAG_ICC] = profile
    content = encode(Image.new("RGB", (10, 12)), "TIFF", tiffinfo=tags)
    answer = between(raw(content, explain="True"))
    assert (answer.content_type == "image/png") is (answer.status == 200)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (protocols, "parse", RecursionError),
        (pipeline, "decode", MemoryError),
        (results, "check_result_count", ValueError),
        (results, "classification", KeyError),
        (Form, "format", OSError),
        (results, "check_response_size", MemoryError),
    ],
)
def test_an_exception_in_any_stage_is_a_500_of_one_request(  # fixtures
    serve: Serve,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: Any,
    name: str,
    fault: type[Exception],
) -> None:
    """It fails on the second of four calls, whatever the fault is."""
    real, calls = getattr(module, name), itertools.count()

    def broken(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise fault("the secret of the house")
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, broken)
    answers = serve(*GOOD[:4])
    assert [answer.status for answer in answers] == [200, 500, 200, 200]
    assert answers[1].json["type"] == "InternalError"
    assert "under id id-1" in answers[1].json["message"]
    assert b"secret" not in answers[1].body
    assert [answers[i].json for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]
    assert "Failed on request id-1" in caplog.text
    assert "the secret of the house" in caplog.text


def test_no_batch_of_the_engine_is_larger_than_max_batch(
    serve: Serve, handler: DenseNetHandler, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def run(pixels: np.ndarray, extra: Extra | None = None) -> Outputs:
        sizes.append(len(pixels))
        return real(pixels, extra)

    real = handler.pipeline.engine.run
    monkeypatch.setattr(handler.pipeline.engine, "run", run)
    archive = handler.pipeline.archive
    smaller = replace(archive, settings=replace(archive.settings, max_batch=3))
    monkeypatch.setattr(handler.pipeline, "archive", smaller)
    assert [answer.json for answer in serve(*GOOD[:4])] == alone[:4]
    assert sizes == [3, 1]


@pytest.mark.parametrize("logit", [None, np.nan, np.inf, -np.inf])
def test_an_image_that_the_engine_fails_on_fails_alone(
    serve: Serve,
    handler: DenseNetHandler,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    logit: float | None,
) -> None:
    """It raises on the green image, or gives a logit that is not finite."""

    def broken(pixels: np.ndarray, extra: Extra | None = None) -> Outputs:
        is_green = pixels[:, 1].mean(axis=(1, 2)) > pixels[:, 0].mean(axis=(1, 2)) + 100
        if logit is None and is_green.any():
            raise RuntimeError("cuda")
        outputs = real(pixels, extra)
        outputs.logits[is_green, 7] = logit
        return outputs

    real = handler.pipeline.engine.run
    monkeypatch.setattr(handler.pipeline.engine, "run", broken)
    three = {"instances": [base64.b64encode(content).decode() for content in IMAGES[:3]]}
    *single, several = serve(*GOOD[:4], as_json(three))
    assert [answer.status for answer in single] == [200, 500, 200, 200]
    assert single[1].json["type"] == "InternalError"
    assert [single[i].json for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]
    results = several.json["predictions"]
    assert [result.get("code", 200) for result in results] == [200, 500, 200]
    assert [results[0], results[2]] == [alone[0], alone[2]]


def test_the_web_ui_needs_neither_decoder_nor_model(
    serve: Serve,
    handler: DenseNetHandler,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "densenet.requests")
    page = Sent((("body", "", b""),), (("Accept", "text/html,*/*;q=0.8"),))
    first, image, second = serve(page, GOOD[0], page)
    assert (first.status, first.content_type) == (200, "text/html; charset=utf-8")
    assert first.body.startswith(b"<!doctype html>")
    assert (first, image.json) == (second, alone[0])
    assert json.loads(caplog.records[-1].message)["batch_images"] == 1
    monkeypatch.setattr(handler.pipeline.engine, "run", None)
    assert serve(page, page) == [first, second]


def test_the_request_log_has_each_status_and_outcome_and_may_fail(
    serve: Serve,
    handler: DenseNetHandler,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "densenet.requests")
    low = Sent((("file", "image/png", RED), ("threshold", "", b"1")))
    deep = as_json({"image": B64, "topk": []})
    serve(GOOD[0], low, EXPLAINED, raw(b"text"), deep, as_json({"instances": [B64, "%"]}))
    lines = [json.loads(r.message) for r in caplog.records if r.name == "densenet.requests"]
    assert [(line["status"], line["outcomes"]) for line in lines] == [
        (200, ["recognized"]),
        (200, ["unrecognized"]),
        (200, ["explained"]),
        (400, ["NotAnImage"]),
        (422, ["InvalidOption"]),
        (200, ["recognized", "BadRequest"]),
    ]
    monkeypatch.setattr(handler.metrics, "_count", None)
    assert [answer.json for answer in serve(*GOOD)] == alone


# --- The largest response ---


LONG_NAME = "x" * 4_000_000


@pytest.mark.parametrize(
    "request_",
    [
        as_json({"instances": [B64] * 16, "topk": 100_000}),  # 7 MB
        as_json({"inputs": [{"datatype": "BYTES", "data": [B64] * 16}], "topk": 100_000}),
        # KServe's `result` is JSON within JSON, which makes it larger.
        as_json({"inputs": [{"datatype": "BYTES", "data": [B64] * 14}], "topk": 5_000}),
        Sent(((LONG_NAME, "x/y", RED), (f"{LONG_NAME}2", "x/y", RED))),
    ],
    ids=["KServe V1", "KServe V2", "JSON within JSON", "long names"],
)
def test_no_response_above_the_frontends_limit_is_sent(
    between: Callable[[Sent], Answer], request_: Sent
) -> None:
    answer = between(request_)
    assert (answer.status, answer.json["type"]) == (413, "AnswerTooLarge")
    assert len(answer.body) < 1_000
    fits = between(as_json({"instances": [B64] * 10, "topk": 5_000}))
    assert len(fits.json["predictions"][9]["predictions"]) == 5_000


# --- Anything at all ---

KEYS = """
    image b64 instances inputs outputs data datatype shape parameters topk threshold class_id
    class_index id name embedding
"""
NAMES = "body data file image topk threshold class_index class_id explain embedding"
HEADERS = """
    Content-Type content-length Content-Length describe explain Accept X-Request-Id body file
    Inference-Header-Content-Length Transfer-Encoding
"""
VALUES = """
    True False text/html application/json;q=0.5 image/png 0 5 9999 multipart/form-data;boundary=x
    application/json text/plain application/x-www-form-urlencoded
"""
scalars = (
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    st.sampled_from([B64, "\ud800", "n1", "class_id", "BYTES", "UINT8", "result", 10**400]),
)
documents = st.recursive(
    st.one_of(scalars),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS.split()) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=15,
)
contents = st.sampled_from([RED, RED[:40], bytearray(IMAGES[1]), b"", b"3", b"{", b"cat.jpg"])
parts = st.tuples(
    st.sampled_from(NAMES.split()) | st.text(st.characters(codec="utf-8"), max_size=6),
    st.sampled_from(["", "image/png", "text/plain", "application/json"]),
    contents | st.binary(max_size=30) | st.text(max_size=10) | documents,
)
headers = st.dictionaries(
    st.sampled_from(HEADERS.split()),
    st.sampled_from(VALUES.split()) | st.text(max_size=10),
    max_size=5,
)
anything = st.builds(
    lambda parts, headers: Sent(tuple(parts), tuple(headers.items())),
    st.lists(parts, max_size=4),
    headers,
) | st.builds(as_json, documents, explain=st.booleans())


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(request=anything)
def test_no_request_whatsoever_changes_another_response(
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
