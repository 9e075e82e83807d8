"""Results and errors as clients read them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handler import results
from handler.archive import Archive
from handler.decoding.pillow import DecodedImage
from handler.errors import AnswerTooLarge, NotAnImage, RequestError
from handler.inference.activation import softmax
from handler.labels import Label
from handler.protocols.forms import Form
from handler.protocols.huggingface import HuggingFace
from handler.protocols.kserve_v1 import KServeV1
from handler.protocols.kserve_v2 import KServeV2, OutputTensor
from handler.request import (
    Body,
    Options,
    Protocol,
    Purpose,
    Request,
    RequestImage,
    Response,
    json_response,
)
from scripts.serve import server
from scripts.terminal import UserError
from tests.unit import parts

LABELS = [Label(f"n{i}", f"name_{i}") for i in range(4)]
ARCHIVE = parts.archive(LABELS)
UNTRAINED = parts.archive(LABELS, trained=False)
PROBABILITIES = np.array([0.1, 0.6, 0.05, 0.25], np.float32)


def test_the_result_serves_both_tutorials_clients() -> None:
    result = results.classification(PROBABILITIES, LABELS, Options(topk=2, threshold=0.1))
    assert result == {
        "success": True,
        "class_id": "n1",
        "class_name": "name_1",
        "probability": 0.6,
        "recognized": True,
        "predictions": [
            {"label": "name_1", "probability": 0.6, "class_id": "n1", "class_index": 1},
            {"label": "name_3", "probability": 0.25, "class_id": "n3", "class_index": 3},
        ],
    }


def test_below_the_threshold_nothing_is_recognized_but_predictions_are_listed() -> None:
    result = results.classification(PROBABILITIES, LABELS, Options(topk=1, threshold=0.7))
    assert (result["recognized"], result["class_id"], result["class_name"]) == (False, None, None)
    assert result["predictions"][0]["label"] == "name_1"
    assert result["success"] is True


def test_equal_predictions_are_in_the_models_order() -> None:
    everything = Options(topk=100, threshold=0)
    for probabilities, order in ((PROBABILITIES, [1, 3, 0, 2]), (np.full(4, 0.25), [0, 1, 2, 3])):
        result = results.classification(probabilities.astype(np.float32), LABELS, everything)
        assert [row["class_index"] for row in result["predictions"]] == order


def test_softmax_survives_large_logits() -> None:
    probabilities = softmax(np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32))
    assert probabilities.sum(axis=1) == pytest.approx([1, 1])
    assert probabilities[0, 0] == 1


GOOD = results.classification(PROBABILITIES, LABELS, Options(topk=1, threshold=0))
BAD = {
    "success": False,
    "code": 400,
    "type": "NotAnImage",
    "message": "what to do",
    # KServe's clients look here.
    "error": "what to do",
}
FAILED = NotAnImage("what to do")
ALL = ("class_id", "class_name", "probability", "recognized", "result")


def request(
    outcomes: list[Body | RequestError],
    protocol: type[Protocol] = Form,
    outputs: Sequence[OutputTensor] | None = None,
    **attributes: object,
) -> Request:
    """Of images that came to these results or errors."""
    images = [
        RequestImage("id", name, error=outcome)
        if isinstance(outcome, RequestError)
        else RequestImage("id", name, result=outcome)
        for name, outcome in zip("abcdefgh", outcomes, strict=False)
    ]
    made = Request("id", {}, {}, Options(topk=1, threshold=0), images=images, protocol=protocol())
    if isinstance(made.protocol, KServeV2):
        made.protocol.client_id = "42"
        made.protocol.outputs = outputs or [OutputTensor(name) for name in ALL]
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def format_response(of: Request, archive: Archive = ARCHIVE) -> Response:
    assert of.protocol is not None
    return of.protocol.format(of, archive)


def collected(of: Request) -> Any:
    return json.loads(format_response(of).body)


def test_several_images_are_listed_by_name_and_fail_alone() -> None:
    answer = format_response(request([GOOD, FAILED]), UNTRAINED)
    body = json.loads(answer.body)
    assert body["success"] is False
    assert "untrained random weights" in body["warning"]
    assert [(r["name"], r["success"]) for r in body["results"]] == [("a", True), ("b", False)]
    assert answer.status == 200


def test_kserve_v1_and_hugging_face_list_predictions_or_explanations() -> None:
    both = request([GOOD, FAILED], KServeV1)
    assert collected(both) == {"predictions": [GOOD, BAD]}
    asked = request([explanation()], KServeV1, purpose=Purpose.EXPLAIN)
    assert collected(asked) == {"explanations": [explanation()]}
    assert collected(request([GOOD], HuggingFace)) == [{"label": "name_1", "score": 0.6}]


def test_kserve_v2_returns_the_requested_tensors_of_one_length() -> None:
    body = collected(request([GOOD, FAILED], KServeV2))
    outputs = {tensor["name"]: tensor for tensor in body.pop("outputs")}
    assert body == {"id": "42", "model_name": "m", "model_version": "1"}
    assert tuple(outputs) == ALL
    assert all(tensor["shape"] == [2] == [len(tensor["data"])] for tensor in outputs.values())
    assert outputs["class_id"]["data"] == ["n1", ""]
    probability = {"name": "probability", "datatype": "FP32", "shape": [2], "data": [0.6, 0.0]}
    assert outputs["probability"] == probability
    assert [json.loads(text) for text in outputs["result"]["data"]] == [GOOD, BAD]
    asked = [OutputTensor("result"), OutputTensor("class_id")]
    body = collected(request([GOOD], KServeV2, outputs=asked))
    assert [tensor["name"] for tensor in body["outputs"]] == ["result", "class_id"]


def test_kserve_v2_returns_binary_tensors_on_request() -> None:
    outputs = [OutputTensor(name, binary=name != "result") for name in ALL]
    asked = request([GOOD, FAILED], KServeV2, outputs=outputs)
    answer = format_response(asked)
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert answer.content_type == "application/octet-stream"
    tensors = {t["name"]: t for t in json.loads(answer.body[:length])["outputs"]}
    sizes = [t["parameters"]["binary_data_size"] for n, t in tensors.items() if n != "result"]
    assert sizes == [10, 14, 8, 2]
    assert [name for name, tensor in tensors.items() if "data" in tensor] == ["result"]
    expected = b"\2\0\0\0n1\0\0\0\0" + b"\6\0\0\0name_1\0\0\0\0"
    expected += np.array([0.6, 0], "<f4").tobytes() + b"\1\0"
    assert answer.body[length:] == expected


def explanation() -> Body:
    photo = DecodedImage(np.zeros((3, 4, 4), np.uint8), (30, 20), (5.5, 0, 25.5, 20), None)
    activation = np.array([[0.25, -1 / 3], [0, 1e-9]], np.float32)
    return results.explanation(photo, activation, LABELS[1], class_index=1, probability=0.6)


def test_an_explanation_has_the_map_and_the_crop_of_the_model() -> None:
    assert explanation() == {
        "success": True,
        "class_id": "n1",
        "class_name": "name_1",
        "class_index": 1,
        "probability": 0.6,
        "map": [[0.25, -0.333333], [0.0, 0.0]],
        "image": {"width": 30, "height": 20},
        "crop": {"left": 5.5, "top": 0, "right": 25.5, "bottom": 20},
    }


def test_a_class_name_cannot_inject_headers_of_a_heat_map() -> None:
    result = {
        "class_id": "n\r\nX: y",
        "class_name": "\u732b \"'",
        "class_index": 1,
        "probability": 0.6,
    }
    headers = results.heat_map_response(b"png", result).headers
    assert headers["X-Class-Id"] == "n%0D%0AX: y"
    assert headers["X-Class-Name"] == "%E7%8C%AB %22'"
    assert headers["X-Probability"] == "0.6000000"


def test_nan_is_never_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_response({"probability": float("nan")})


# --- The largest response ---


def test_a_larger_response_is_rejected_with_advice() -> None:
    fits = Response(200, bytes(results.MAX_RESPONSE_BYTES), "text/plain")
    results.check_response_size(fits)
    with pytest.raises(AnswerTooLarge, match=r"6,553,501 bytes; at most 6,553,500.*smaller topk"):
        results.check_response_size(replace(fits, body=fits.body + b"1"))


def test_results_that_cannot_fit_are_rejected_before_they_are_made() -> None:
    images: list[Body | RequestError] = [GOOD] * 8
    many = request(images, options=Options(topk=100_000, threshold=0))
    with pytest.raises(AnswerTooLarge, match="more than"):
        results.check_result_count(many, 20_000, multilabel=False)
    results.check_result_count(many, 1_000, multilabel=False)
    few = request(images, options=Options(topk=10, threshold=0))
    results.check_result_count(few, 20_000, multilabel=False)


def test_no_prediction_is_shorter_than_assumed() -> None:
    result = results.classification(np.ones(1, np.float32), [Label("", "")], Options(1, 0))
    text = json.dumps(result["predictions"][0], separators=(",", ":")) + ","
    assert len(text) == results._MIN_PREDICTION_BYTES


def test_workers_have_the_limit_of_the_frontends_configuration(tmp_path: Path) -> None:
    limit = server._read_number("max_response_size", Path("config.properties"))
    assert int(limit) == results.MAX_RESPONSE_BYTES
    config = tmp_path / "config.properties"
    config.write_text("max_response_size=6553500\n# max_response_size=7\nmax_response_size=1000\n")
    assert server._read_number("max_response_size", config) == "1000"
    with pytest.raises(UserError, match="has no max_request_size"):
        server._read_number("max_request_size", config)
