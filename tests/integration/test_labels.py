"""Multi-label models from training to serving: `make shapes` with little training.

The example compares the served probabilities with PyTorch's.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.archives import repack
from classification_client import Client, RequestOptions
from examples.shapes.drawing import LABELS_FILE, NAMES
from handler.settings import MODEL_CARD
from scripts.evaluate import main as evaluate
from scripts.evaluation.multilabel import evaluate_labels
from scripts.gateway import upgrade as upgrades
from scripts.samples import CAT
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from scripts.store import read_card
from scripts.terminal import UserError
from tests.conftest import Shapes


def _thresholds(shapes: Shapes) -> list[float]:
    """Return the thresholds that the evaluation chose, one per class, rounded to float32."""
    chosen = json.loads((shapes.folder / "validation-report" / "thresholds.json").read_text())
    return np.array([chosen[name] for name in NAMES], np.float32).tolist()  # type: ignore[no-any-return]


def test_the_thresholds_that_the_evaluation_chose_decide_the_labels(
    shapes: Shapes, shapes_server: ServerState
) -> None:
    thresholds = _thresholds(shapes)
    assert len(set(thresholds)) > 1
    card = read_card(shapes.archive)
    assert card is not None
    assert card.activation == "sigmoid"
    assert np.array(card.thresholds, np.float32).tolist() == thresholds
    counts = set()
    with Client(shapes_server.predictions_url, RequestOptions(topk=len(NAMES))) as client:
        model = client.model()
        assert model is not None
        assert model.multilabel
        for path in sorted((shapes.folder / "test").glob("*.png"))[:50]:
            answer = client.classify(path)
            found = {p.label: p.probability for p in answer.predictions}
            labels = {label.label for label in answer.labels or ()}
            for name, threshold in zip(NAMES, thresholds, strict=True):
                # Probabilities are rounded, so skip ties.
                if abs(found[name] - threshold) > 1e-4:
                    assert (name in labels) is (found[name] >= threshold)
            counts.add(len(labels))
    assert len(counts) > 2


# --- Evaluation ---


def test_evaluate_finds_labels_csv_and_writes_thresholds_for_a_precision(
    shapes: Shapes, shapes_server: ServerState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, report = str(shapes.folder / "test"), tmp_path / "report"
    evaluate(images, shapes_server.predictions_url, output=report, min_precision=0.8)
    printed = capsys.readouterr().out
    served = re.findall(r"precision served +(0\.\d{4})", shapes.output)[-1]
    text = (report / "report.md").read_text()
    assert "| images | 400 |\n| not counted | 0 |\n| classes | 6 |\n" in text
    assert f"| mean average precision | {served} |" in text
    written = report / "thresholds.json"
    assert json.loads(written.read_text()).keys() == set(NAMES)
    assert f"thresholds:{written}" in "".join(printed.split())
    with (report / "classes.csv").open() as file:
        for row in csv.DictReader(file):
            reached = float(row["precision_at_threshold"]) >= 0.8
            assert reached or f"{row['class']} reaches a precision of" in printed


def test_a_multi_label_evaluation_without_labels_csv_is_rejected(
    shapes: Shapes, shapes_server: ServerState, tmp_path: Path
) -> None:
    (tmp_path / "star").mkdir()
    image = next((shapes.folder / "test").glob("*.png"))
    (tmp_path / "star" / "1.png").write_bytes(image.read_bytes())
    message = rf"\(activation: sigmoid\), and an image in a.* {tmp_path}/labels.csv, .*LABELS=file"
    with pytest.raises(UserError, match=message):
        evaluate(str(tmp_path), shapes_server.predictions_url, output=tmp_path / "report")


def test_labels_csv_with_an_unknown_class_is_rejected(
    shapes: Shapes, shapes_server: ServerState, tmp_path: Path
) -> None:
    labels, url = tmp_path / LABELS_FILE, shapes_server.predictions_url
    labels.write_text("0000.png,sqare\n")
    message = r"no class 'sqare', as .*labels.csv has it. Similar are: square\."
    with pytest.raises(UserError, match=message):
        evaluate_labels(shapes.folder / "test", labels, url, RequestOptions(), 2)


def test_labels_csv_is_rejected_for_a_single_label_model(
    running: ServerState, tmp_path: Path
) -> None:
    labels = tmp_path / LABELS_FILE
    (tmp_path / "1.png").write_bytes(CAT.read_bytes())
    labels.write_text("1.png,tabby\n")
    with pytest.raises(UserError, match=r"single-label \(softmax\), and .* is for models"):
        evaluate_labels(tmp_path, labels, running.predictions_url, RequestOptions(), 2)


# --- Upgrades ---


def test_an_upgrade_compares_all_labels(
    shapes: Shapes,
    shapes_server: ServerState,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only thresholds change, so each image keeps its top-1 class."""

    def change(name: str, content: bytes) -> bytes:
        if name != MODEL_CARD:
            return content
        return json.dumps(json.loads(content) | {"thresholds": [1.0] * len(NAMES)}).encode()

    strict = repack(shapes.archive, tmp_path / shapes.archive.name, change)
    server = start(strict, free_ports(), 1, tmp_path / "run")
    try:

        def check(new: ServerState, old: ServerState, agreement: float = upgrades.AGREEMENT) -> str:
            upgrades._compare(old, new, agreement)
            return " ".join("".join(capsys.readouterr()).split())

        same = "the label is the same for 100% of the sample images"
        assert same in check(shapes_server, shapes_server)
        with pytest.raises(UserError, match=r"of the sample images keep their label, and 90% are"):
            check(server, shapes_server)
        assert "All sample images get the same label" in check(server, shapes_server, agreement=0)
        assert same in check(server, server)
    finally:
        stop(server, tmp_path / "run")
