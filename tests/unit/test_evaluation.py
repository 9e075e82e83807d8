"""`make evaluate`: lists of labels, names of classes, scores, thresholds, and reports."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from classification_client import RequestOptions, Row
from handler.labels import Label
from scripts.classify import select
from scripts.evaluation.evaluation import Model
from scripts.evaluation.multilabel import (
    MultilabelEvaluation,
    choose_thresholds,
    evaluate_labels,
    report_labels,
    scores,
)
from scripts.evaluation.single_label import SingleLabelEvaluation, evaluate_folders, report_folders
from scripts.labels_file import read_labels
from scripts.matching import match
from scripts.serve.running import Ports, ServerState
from scripts.terminal import UserError

URL = "http://localhost:1/never-used"


def read_table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text("utf-8").splitlines()))


def read_classes(folder: Path) -> list[dict[str, str]]:
    return read_table(folder / "classes.csv")


# --- Single-label models ---

NAMES = [Label("n0", "cat"), Label("n1", "$dog|[red]"), Label("n2", "_owl"), Label("n3", "never")]
SINGLE = SingleLabelEvaluation(
    Model(NAMES, multilabel=False, warning="The model is untrained.", name="pets 1.0"),
    images=[Path(f"{number}.png") for number in range(4)],
    rejected=[Row("broken.jpg", OSError("cut off"))] * 12,
    truth=np.array([0, 1, 2, 2]),
    predictions=np.array([[0, 1], [1, 0], [0, 2], [0, 1]]),
    confidence=np.array([0.95, 0.95, 0.54, 0.56]),
)


def test_accuracy_and_calibration_error_are_right() -> None:
    assert (SINGLE.correct.mean(), SINGLE.top5_accuracy) == (0.5, 0.75)
    # Bins of two images each: all correct at 0.95, none at 0.55.
    assert SINGLE.calibration_error == pytest.approx(0.5 * 0.05 + 0.5 * 0.55)


def test_the_report_of_a_single_label_model_has_all_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_folders(SINGLE, tmp_path)
    printed, text = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert "Not counted: broken.jpg: cannot be read: cut off" in printed
    assert "Not counted: 2 more images" in printed
    for shown in (printed, text):
        assert "The model is untrained." in shown
        assert "$dog" in shown
    for row in (
        "| images | 4 |\n| not counted | 12 |\n| top-1 accuracy | 50.00% |",
        "| top-5 accuracy | 75.00% |\n| expected calibration error | 0.300 |",
        "| 0.60 | 50.0% | 100.0% |",
        "| _owl | cat | 2 |",
        r"| 1 | n1 | $dog\|[red] | 1 | 1.0000 | 1.0000 | 1.0000 |",
        "# Evaluation: pets 1.0 on 4 images",
        "| 3.png | _owl | cat | 0.5600 |\n| 2.png | _owl | cat | 0.5400 |",
    ):
        assert row in text
    assert [row["image"] for row in read_table(tmp_path / "mistakes.csv")] == ["3.png", "2.png"]
    assert [(row["class"], row["images"], row["recall"]) for row in read_classes(tmp_path)] == [
        ("cat", "1", "1.0000"),
        ("$dog|[red]", "1", "1.0000"),
        ("_owl", "2", "0.0000"),
    ]
    for name in ("confusion.png", "calibration.png"):
        assert imread(tmp_path / name).std() > 0
        assert f"]({name})" in text


# --- Multi-label models ---

# `first` ranks both of its images above the others; `second` ranks right, wrong, right.
TRUTH = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
PROBABILITIES = np.array([[0.9, 0.8, 0.3], [0.7, 0.6, 0.9], [0.2, 0.4, 0.1], [0.1, 0.1, 0.5]])
MULTILABEL = MultilabelEvaluation(
    Model([Label("n0", "first"), Label("n1", "$second"), Label("n2", "[never]")], True, None),
    [Path(f"{number}.png") for number in range(4)],
    [],
    TRUTH,
    PROBABILITIES,
    PROBABILITIES >= 0.5,
)


def test_scores_of_labels_are_right() -> None:
    assert MULTILABEL.average_precision == pytest.approx([1, (1 + 2 / 3) / 2])
    assert MULTILABEL.mean_average_precision == pytest.approx((1 + 5 / 6) / 2)
    assert MULTILABEL.auroc == pytest.approx([1, 3 / 4])
    # Six labels were given, three of them right, of four.
    found = scores(TRUTH, MULTILABEL.given)
    assert found == pytest.approx({"precision": 0.5, "recall": 0.75, "f1": 0.6})
    nothing = np.zeros(3, bool)
    assert set(scores(nothing, nothing).values()) == {0}
    # If all images show a class, it has no ROC curve.
    assert np.isnan(replace(MULTILABEL, truth=np.ones((4, 3), bool)).auroc).all()


def test_thresholds_are_halfway_between_two_probabilities(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The best F1 of the second class takes one wrong image to find both; precision does not.
    assert choose_thresholds(MULTILABEL) == pytest.approx([0.45, 0.25, 0.5])
    assert choose_thresholds(MULTILABEL, 0.9) == pytest.approx([0.45, 0.7, 0.5])
    choose_thresholds(replace(MULTILABEL, probabilities=1 - PROBABILITIES), 0.9)
    assert "first reaches a precision of 50.0% at most" in capsys.readouterr().out


def test_the_report_of_a_multi_label_model_has_all_figures_and_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_labels(MULTILABEL, tmp_path)
    printed, text = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert "1 classes are on no image: their threshold is 0.5" in printed
    assert f"thresholds: {tmp_path / 'thresholds.json'}" in printed
    assert json.loads((tmp_path / "thresholds.json").read_text()) == pytest.approx(
        {"n0": 0.45, "n1": 0.25, "n2": 0.5}
    )
    for row in (
        "| images | 4 |\n| not counted | 0 |\n| classes | 2 |\n| mean average precision | 0.9167 |",
        "| mean AUROC | 0.8750 |",
        "| as served | 0.5000 | 0.7500 | 0.6000 |",
        "| by thresholds.json | 0.5714 | 1.0000 | 0.7273 |",
    ):
        assert row in text
    assert [(row["class"], row["auroc"], row["threshold"]) for row in read_classes(tmp_path)] == [
        ("first", "1.0000", "0.4500"),
        ("$second", "0.7500", "0.2500"),
    ]
    assert imread(tmp_path / "precision-recall.png").std() > 0
    assert [list(row.values()) for row in read_table(tmp_path / "mistakes.csv")] == [
        ["1.png", "", "$second, [never]"],
        ["2.png", "$second", ""],
        ["3.png", "", "[never]"],
    ]


# --- Which model ---


def test_the_selected_model_is_reported_if_there_are_several(
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = ServerState(1, "", Ports(), models={"cats": "0", "dogs": "1"}, model="cats")
    assert select(running, "dogs").model == "dogs"
    assert select(replace(running, models={"cats": "0"}), None).model == "cats"
    assert not capsys.readouterr().err
    assert select(running, None).model == "cats"
    printed = capsys.readouterr()
    assert "Model: cats. MODEL=name chooses another one: dogs." in printed.err
    assert not printed.out
    with pytest.raises(UserError, match="does not serve"):
        select(running, "birds")


# --- Lists of labels ---


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("header", ["", "image,labels\n", "\ufeffImage,labels,labels\r\n"])
def test_each_line_of_a_list_has_an_image_and_its_labels(header: str, images: Path) -> None:
    file = images / "list.csv"
    file.write_text(f'{header}a.png,cat,"dog, wet",cat\n\nb.png\nsub/c.png, cat ,,\n', "utf-8")
    assert read_labels(file, images) == {
        images / "a.png": ("cat", "dog, wet"),
        images / "b.png": (),
        images / "sub/c.png": ("cat",),
    }


def test_a_malformed_list_is_rejected_with_its_line(images: Path) -> None:
    file = images / "list.csv"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_labels(file, images)
    for content, message in (
        ("a.png,cat\nd.png,cat\n", "line 2: .* has no image 'd.png'. Each line is an"),
        ("a.png,cat\na.png,dog\n", "line 2: a.png has a line already"),
        (",cat\n", "line 1: .* has no image ''"),
        ("image,labels\n\n", "names no image. Each line"),
        ("", "names no image"),
        ('a.png,"cat\n', "cannot be read"),
        ("a\0.png,cat\n", "has no image|cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_labels(file, images)


def test_images_without_a_class_are_rejected_before_any_is_sent(images: Path) -> None:
    labels = images / "labels.csv"
    labels.write_text("a.png\nb.png\n")
    with pytest.raises(UserError, match="gives no image a label, so that nothing can be measured"):
        evaluate_labels(images, labels, URL, RequestOptions(), 2)
    with pytest.raises(UserError, match="must be a folder with a folder of images for each class"):
        evaluate_folders(labels, URL, RequestOptions(), 2)
    (images / "sub" / "c.png").unlink()
    with pytest.raises(UserError, match="must hold a folder of images for each class"):
        evaluate_folders(images, URL, RequestOptions(), 2)


# --- Names of classes ---

LABELS = [
    *(Label("n1", "Egyptian_cat"), Label("n2", "oxcart"), Label("n3", "tiger_cat")),
    *(Label("n4", "crane"), Label("n5", "crane")),
    *(Label(f"m{number}", f"dog {number:02d}") for number in range(10)),
]


def test_a_class_matches_by_id_or_by_name_in_any_spelling() -> None:
    found = match({"n4", "egyptian-cat", "TIGER CAT"}, LABELS, "", "")
    assert found == {"n4": 3, "egyptian-cat": 0, "TIGER CAT": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Egyptain cat", r"no class .* Similar are: Egyptian_cat \(n1\)\."),
        ("cats", r"Similar are: Egyptian_cat \(n1\), tiger_cat \(n3\)\."),
        ("other", r"It has 15 classes, such as Egyptian_cat \(n1\), oxcart"),
        ("Crane", "Call the folder by id: n4, n5"),
    ],
)
def test_an_unknown_or_ambiguous_class_is_rejected_with_similar_ones(
    name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        match({name}, LABELS, "as a folder is called", "Call the folder by id")
