"""Results and errors as clients read them."""

import json

import numpy as np
import pytest

from handler import responses
from handler.errors import NotAnImage
from handler.images import Photo
from handler.inputs import Form, ImagePart, ImagesRequest, Options
from handler.labels import Label

LABELS = [Label(f"n{i}", f"name_{i}") for i in range(4)]
MODEL = ("densenet121", "1.0")
PROBABILITIES = np.array([0.1, 0.6, 0.05, 0.25], np.float32)


def test_the_result_serves_both_tutorials_clients() -> None:
    result = responses.classification(PROBABILITIES, LABELS, Options(topk=2, threshold=0.1))
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


def test_below_the_threshold_nothing_is_recognised_but_guesses_are_listed() -> None:
    result = responses.classification(PROBABILITIES, LABELS, Options(topk=1, threshold=0.7))
    assert (result["recognized"], result["class_id"], result["class_name"]) == (False, None, None)
    assert result["predictions"][0]["label"] == "name_1"
    assert result["success"] is True


def test_topk_beyond_the_classes_gives_all_of_them() -> None:
    result = responses.classification(PROBABILITIES, LABELS, Options(topk=100, threshold=0))
    assert [row["class_index"] for row in result["predictions"]] == [1, 3, 0, 2]


def test_equal_probabilities_keep_the_order_of_the_classes() -> None:
    even = np.full(4, 0.25, np.float32)
    result = responses.classification(even, LABELS, Options(topk=4, threshold=0))
    assert [row["class_index"] for row in result["predictions"]] == [0, 1, 2, 3]


def test_softmax_survives_large_logits() -> None:
    probabilities = responses.softmax(np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32))
    assert probabilities.sum(axis=1) == pytest.approx([1, 1])
    assert probabilities[0, 0] == 1


def test_an_error_carries_status_type_and_message() -> None:
    answer = responses.encode(responses.error(NotAnImage("what to do")))
    assert answer.status == 400
    assert json.loads(answer.body) == {
        "success": False,
        "code": 400,
        "type": "NotAnImage",
        "message": "what to do",
    }


def test_several_images_are_listed_by_name_and_fail_alone() -> None:
    good = responses.classification(PROBABILITIES, LABELS, Options(topk=1, threshold=0))
    body = responses.collect(request(), [good, responses.error(NotAnImage("no"))], MODEL)
    assert body["success"] is False
    assert [(r["name"], r["success"]) for r in body["results"]] == [("a", True), ("b", False)]
    assert responses.encode(body).status == 200


def request(form: Form = Form.PLAIN, names: str = "ab") -> ImagesRequest:
    images = [ImagePart(name, b"") for name in names]
    return ImagesRequest(images, Options(topk=1, threshold=0), form, request_id="42")


def test_kserve_v1_lists_predictions() -> None:
    good = responses.classification(PROBABILITIES, LABELS, Options(topk=1, threshold=0))
    bad = responses.error(NotAnImage("no"))
    v1 = request(Form.KSERVE_V1)
    assert responses.collect(v1, [good, bad], MODEL) == {"predictions": [good, bad]}
    one = request(Form.KSERVE_V1, "a")
    assert responses.collect(one, [good], MODEL) == {"predictions": [good]}


def test_kserve_v2_gives_tensors_of_one_length() -> None:
    good = responses.classification(PROBABILITIES, LABELS, Options(topk=1, threshold=0))
    bad = responses.error(NotAnImage("no"))
    body = responses.collect(request(Form.KSERVE_V2), [good, bad], MODEL)
    assert (body["id"], body["model_name"], body["model_version"]) == ("42", "densenet121", "1.0")
    outputs = {tensor["name"]: tensor for tensor in body["outputs"]}
    assert all(tensor["shape"] == [2] == [len(tensor["data"])] for tensor in outputs.values())
    assert outputs["class_id"]["data"] == ["n1", ""]
    assert outputs["probability"] == {
        "name": "probability",
        "datatype": "FP32",
        "shape": [2],
        "data": [0.6, 0.0],
    }
    assert [json.loads(text) for text in outputs["result"]["data"]] == [good, bad]


def explanation(label: Label = LABELS[1]) -> responses.Body:
    photo = Photo(np.zeros((3, 4, 4), np.uint8), (30, 20), (5.5, 0, 25.5, 20), None)
    activation = np.array([[0.25, -1 / 3], [0, 1e-9]], np.float32)
    return responses.explanation(photo, activation, label, class_index=1, probability=0.6)


def test_an_explanation_says_what_was_seen_of_the_image() -> None:
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


def test_kserve_explanations() -> None:
    v1 = responses.collect(request(Form.KSERVE_V1, "a"), [explanation()], MODEL, explained=True)
    assert v1 == {"explanations": [explanation()]}
    v2 = responses.collect(request(Form.KSERVE_V2, "a"), [explanation()], MODEL, explained=True)
    names = [tensor["name"] for tensor in v2["outputs"]]
    assert names == ["class_id", "class_name", "probability", "result"]


def test_a_pictures_headers_are_ascii_without_line_ends_whatever_a_class_is_called() -> None:
    label = Label("n\r\nX: y", "\u732b \"'")
    headers = responses.picture(b"png", label, 1, probability=0.6).headers
    assert headers["X-Class-Id"] == "n%0D%0AX: y"
    assert headers["X-Class-Name"] == "%E7%8C%AB %22'"
    assert headers["X-Probability"] == "0.6000000"


@pytest.mark.parametrize("form", list(Form))
def test_a_single_images_error_is_the_requests(form: Form) -> None:
    body = responses.collect(request(form, "a"), [responses.error(NotAnImage("no"))], MODEL)
    assert responses.encode(body).status == 400
    assert body["type"] == "NotAnImage"
    assert body.get("error") == ("no" if form is Form.KSERVE_V2 else None)


def test_what_is_not_json_is_never_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        responses.encode({"probability": float("nan")})
