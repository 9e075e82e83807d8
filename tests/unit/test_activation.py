"""What `ACTIVATION=...` and `THRESHOLDS=...` ask for, and what is wrong with them in words."""

import json
from pathlib import Path

import numpy as np
import pytest

from handler.labels import Label
from scripts.build.activation import SOFTMAX, Activation, choose, read_thresholds
from scripts.build.guard import Bounds, compare
from scripts.terminal import UserError

LABELS = [Label("n1", "cat"), Label("n2", "dog"), Label("n3", "crane"), Label("n4", "crane")]
COMPLETE = {"cat": 0.4, "n2": 0.5, "n3": 0, "n4": 1}


def test_softmax_is_the_default_and_has_no_thresholds() -> None:
    assert choose("softmax") == SOFTMAX
    assert SOFTMAX.thresholds(LABELS) == ()


def test_the_default_threshold_is_one_half_and_one_number_is_every_classs() -> None:
    assert choose("sigmoid").thresholds(LABELS) == (0.5,) * 4
    assert choose("sigmoid", "0.25").thresholds(LABELS) == (0.25,) * 4


def test_a_file_has_each_class_by_id_or_name(tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps(COMPLETE))
    assert choose("sigmoid", str(file)) == Activation("sigmoid", file)
    assert choose("sigmoid", str(file)).thresholds(LABELS) == (0.4, 0.5, 0, 1)


@pytest.mark.parametrize(
    ("activation", "thresholds", "message"),
    [
        ("tanh", None, "ACTIVATION must be softmax or sigmoid, got 'tanh'."),
        ("softmax", "0.5", "THRESHOLDS is for models that give several labels a picture: ACTIV"),
        ("sigmoid", "1.5", "THRESHOLDS must be from 0 to 1, got 1.5."),
        ("sigmoid", "nan", "THRESHOLDS must be from 0 to 1, got nan."),
        ("sigmoid", "nowhere.json", "a file of them, and there is no file nowhere.json."),
    ],
)
def test_an_activation_or_threshold_that_makes_no_sense_is_rejected(
    activation: str, thresholds: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(activation, thresholds)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (COMPLETE | {"horse": 0.5}, r"no class of the model: horse. Its classes are n1, n2"),
        (COMPLETE | {"crane": 0.5}, "no class of the model: crane"),  # there are two
        ({"cat": 0.4, "n2": 0.5, "n3": 0}, "has no threshold for n4. It must be JSON"),
        (COMPLETE | {"cat": 1.5}, "the threshold of cat must be a number from 0 to 1, got 1.5"),
        (COMPLETE | {"cat": True}, "must be a number from 0 to 1, got True"),
        (COMPLETE | {"cat": float("nan")}, "must be a number from 0 to 1, got nan"),
        (COMPLETE | {"n1": 0.5}, "has two thresholds for the class n1"),
        ([0.5] * 4, "name no classes. It must be JSON with a number from 0 to 1 for eac"),
        (b"cat 0.5", "are no JSON"),
        (b"\xff\xfe{", "are no JSON"),
        (None, "No"),
    ],
)
def test_a_file_that_does_not_fit_is_rejected_with_what_is_wrong(
    content: object, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "thresholds.json"
    if content is not None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        file.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_thresholds(file, LABELS)


def test_reduced_precision_is_compared_by_all_labels() -> None:
    thresholds = np.array([0.5, 0.2], np.float32)
    exact = np.array([[0.9, 0.1], [0.9, 0.3], [0.1, 0.1], [0.2, 0.9]], np.float32)
    lower = exact.copy()
    lower[1, 1] = 0.19  # the first label stays, the second goes
    found = compare(exact, lower, thresholds=thresholds)
    assert found.agreement.value == 0.75
    assert found.report()[0].startswith("labels as in float32: 75.00%")
    assert found.excess(Bounds()) == "75.00% of the labels are float32's, 99.00% must be"
    assert compare(exact, lower).agreement.value == 1
