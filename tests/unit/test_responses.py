"""Results and errors as clients read them."""

import json

import numpy as np
import pytest

from handler import responses
from handler.errors import NotAnImage
from handler.inputs import Options
from handler.labels import Label

LABELS = [Label(f"n{i}", f"name_{i}") for i in range(4)]
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
    body = responses.collect(["a", "b"], [good, responses.error(NotAnImage("no"))])
    assert body["success"] is False
    assert [(r["name"], r["success"]) for r in body["results"]] == [("a", True), ("b", False)]
    assert responses.encode(body).status == 200


def test_what_is_not_json_is_never_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        responses.encode({"probability": float("nan")})
