"""What a list of labels says, and the scores and thresholds of models that give several."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from handler.labels import Label
from scripts.evaluate import Evaluation
from scripts.evaluation.multilabel import (
    MultilabelEvaluation,
    Scores,
    choose_thresholds,
    report_labels,
)
from scripts.labels_file import read_labels
from scripts.matching import match
from scripts.terminal import UserError


def test_top_1_top_5_and_calibration_are_the_known_ones() -> None:
    truth = np.array([0, 1, 2, 3])
    guesses = np.array([[0, 1], [1, 0], [0, 2], [0, 1]])
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    found = Evaluation([], truth, guesses, confidence, refused=[], warning=None)
    assert (found.top1, found.top5) == (0.5, 0.75)
    # Bins of two images each: all right at 0.95, none right at 0.55.
    assert found.calibration_error == pytest.approx(0.5 * 0.05 + 0.5 * 0.55)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/c.png", "picture"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("header", ["", "picture,labels\n", "\ufeffPicture,labels,labels\r\n"])
def test_a_line_is_a_picture_and_its_labels(header: str, images: Path) -> None:
    file = images / "list.csv"
    file.write_text(f'{header}a.png,cat,"dog, wet",cat\n\nb.png\nsub/c.png, cat ,,\n', "utf-8")
    assert read_labels(file, images) == {
        images / "a.png": ("cat", "dog, wet"),
        images / "b.png": (),
        images / "sub/c.png": ("cat",),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,cat\nd.png,cat\n", "line 2: .* has no picture 'd.png'. Each line is a"),
        ("a.png,cat\na.png,dog\n", "line 2: a.png has a line already"),
        (",cat\n", "line 1: .* has no picture ''"),
        ("picture,labels\n\n", "names no picture. Each line"),
        ("", "names no picture"),
        ('a.png,"cat\n', "cannot be read"),
        ("a\0.png,cat\n", "has no picture|cannot be read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_list_is_rejected_with_the_line(
    content: str | None, message: str, images: Path
) -> None:
    file = images / "list.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_labels(file, images)


# By hand: of `first` both are above the others; of `second` the order is right, wrong, right.
TRUTH = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
FOUND = np.array([[0.9, 0.8, 0.3], [0.7, 0.6, 0.9], [0.2, 0.4, 0.1], [0.1, 0.1, 0.5]])
EVALUATION = MultilabelEvaluation(
    [Label("n0", "first"), Label("n1", "$second"), Label("n2", "[never]")],
    [Path(f"{number}.png") for number in range(4)],
    TRUTH,
    FOUND,
    FOUND >= 0.5,
    [],
    None,
)


def test_scores_are_those_worked_out_by_hand() -> None:
    assert EVALUATION.average_precision[:2] == pytest.approx([1, (1 + 2 / 3) / 2])
    assert np.isnan(EVALUATION.average_precision[2])
    assert EVALUATION.mean_average_precision == pytest.approx((1 + 5 / 6) / 2)
    assert EVALUATION.auroc[:2] == pytest.approx([1, 3 / 4])
    # Six labels were given, three of them right, of four.
    scores = Scores.of(TRUTH, EVALUATION.given)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((0.5, 0.75, 0.6))


def test_thresholds_lie_between_the_probabilities_that_they_part() -> None:
    # By F1 the second class takes one wrong picture to find both; by precision it does not.
    assert choose_thresholds(EVALUATION) == pytest.approx([0.45, 0.25, 0.5])
    assert choose_thresholds(EVALUATION, 0.9) == pytest.approx([0.45, 0.7, 0.5])


def test_a_precision_that_is_out_of_reach_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    choose_thresholds(replace(EVALUATION, probabilities=1 - FOUND), 0.9)
    assert "first reaches a precision of 50.0% at most" in capsys.readouterr().out


def test_the_report_has_each_class_and_a_file_of_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_labels(EVALUATION, tmp_path)
    said = capsys.readouterr().out
    assert "Mean average precision  0.9167 of 2 classes, 4 pictures" in said
    assert "1 classes are on no picture: their threshold is 0.5" in said
    assert json.loads((tmp_path / "thresholds.json").read_text()) == pytest.approx(
        {"n0": 0.45, "n1": 0.25, "n2": 0.5}
    )
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [(row["class"], row["auroc"]) for row in rows] == [
        ("first", "1.0000"),
        ("$second", "0.7500"),
    ]
    assert "| as served | 50.00% | 75.00% | 0.6000 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "precision-recall.png").read_bytes().startswith(b"\x89PNG")


LABELS = [
    *(Label("n1", "Egyptian_cat"), Label("n2", "oxcart"), Label("n3", "tiger_cat")),
    *(Label("n4", "crane"), Label("n5", "crane")),
    *(Label(f"m{number}", f"dog {number:02d}") for number in range(10)),
]


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("Egyptain cat", LABELS, r"no class .* Similar are: Egyptian_cat \(n1\)\."),
        ("cats", LABELS, r"Similar are: Egyptian_cat \(n1\), tiger_cat \(n3\)\."),
        ("other", LABELS, r"It has 15 classes, such as Egyptian_cat \(n1\), oxcart"),
        ("other", LABELS[:2], r"Its classes are: Egyptian_cat \(n1\), oxcart \(n2\)\."),
        ("Crane", LABELS, "Call the folder by id: n4, n5"),
    ],
)
def test_a_name_that_is_no_class_or_several_is_told_with_what_it_may_mean(
    name: str, labels: list[Label], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        match({name}, labels, "as a folder is called", "Call the folder by id")


def test_a_class_is_meant_by_its_id_or_its_name_however_it_is_spelt() -> None:
    meant = match({"n4", "egyptian-cat", "TIGER CAT"}, LABELS, "", "")
    assert meant == {"n4": 3, "egyptian-cat": 0, "TIGER CAT": 2}
