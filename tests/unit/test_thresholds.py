"""The thresholds of a multi-label model, and what is wrong with them in words."""

import json
from pathlib import Path

import pytest

from handler.labels import Label
from scripts.build.thresholds import resolve
from scripts.terminal import UserError

LABELS = [Label("n1", "cat"), Label("n2", "dog"), Label("n3", "crane"), Label("n4", "crane")]
COMPLETE = {"cat": 0.4, "n2": 0.5, "n3": 0, "n4": 1}


def test_the_default_is_one_half_and_one_number_is_every_classs() -> None:
    assert resolve(None, LABELS) == (0.5,) * 4
    assert resolve(0.25, LABELS) == (0.25,) * 4


def test_a_mapping_or_a_file_has_each_class_by_id_or_name(tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps(COMPLETE))
    assert resolve(COMPLETE, LABELS) == resolve(file, LABELS) == (0.4, 0.5, 0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (COMPLETE | {"horse": 0.5}, r"has no class 'horse'"),
        (COMPLETE | {"crane": 0.5}, r"Several classes are called 'crane'. Use its id: n3, n4"),
        ({"cat": 0.4, "n2": 0.5, "n3": 0}, "has no threshold for n4. It must hold"),
        (COMPLETE | {"cat": 1.5}, "the threshold of cat must be a number from 0 to 1, got 1.5"),
        (COMPLETE | {"cat": True}, "must be a number from 0 to 1, got True"),
        (COMPLETE | {"cat": float("nan")}, "must be a number from 0 to 1, got nan"),
        (COMPLETE | {"n1": 0.5}, "has two thresholds for the class n1"),
        ([0.5] * 4, "must hold"),
        (b"cat 0.5", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        (None, "cannot be read"),
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
        resolve(file, LABELS)
