"""Multi-label models from training to serving: `make shapes` with little training.

The example compares the served probabilities with PyTorch's.
"""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.archives import repack
from classification_client import Client, RequestOptions
from examples.shapes.drawing import LABELS_FILE, NAMES
from handler.settings import MODEL_CARD
from scripts.evaluate import main as evaluate
from scripts.gateway import upgrade as upgrades
from scripts.serve.running import ServerState
from scripts.store import read_card
from scripts.terminal import UserError
from tests.served import served


def test_the_thresholds_that_the_evaluation_chose_decide_the_labels(
    shapes: Path, shapes_archive: Path, shapes_server: ServerState
) -> None:
    chosen = json.loads((shapes / "validation-report" / "thresholds.json").read_text())
    thresholds = [float(np.float32(chosen[name])) for name in NAMES]
    assert len(set(thresholds)) > 1
    card = read_card(shapes_archive)
    assert card is not None
    assert card.activation == "sigmoid"
    assert np.array(card.thresholds, np.float32).tolist() == thresholds
    counts = set()
    with Client(shapes_server.predictions_url, RequestOptions(topk=len(NAMES))) as client:
        model = client.model()
        assert model is not None
        assert model.multilabel
        for path in sorted((shapes / "test").glob("*.png"))[:50]:
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
    shapes: Path, shapes_server: ServerState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, report = str(shapes / "test"), tmp_path / "report"
    evaluate(images, shapes_server.predictions_url, output=report, min_precision=0.8)
    printed = capsys.readouterr().out
    text = (report / "report.md").read_text()
    assert "| images | 400 |\n| not counted | 0 |\n| classes | 6 |\n" in text
    (precision,) = re.findall(r"\| mean average precision \| 0\.\d{4} \|", text)
    assert precision in (shapes / "test-report" / "report.md").read_text()
    written = report / "thresholds.json"
    assert json.loads(written.read_text()).keys() == set(NAMES)
    assert f"thresholds:{written}" in "".join(printed.split())
    with (report / "classes.csv").open() as file:
        for row in csv.DictReader(file):
            reached = float(row["precision_at_threshold"]) >= 0.8
            assert reached or f"{row['class']} reaches a precision of" in printed


def test_an_evaluation_without_labels_that_fit_the_model_is_rejected(
    shapes: Path, shapes_server: ServerState, running: ServerState, tmp_path: Path
) -> None:
    labels, (image, *_) = tmp_path / LABELS_FILE, (shapes / "test").glob("*.png")
    (tmp_path / "star").mkdir()
    shutil.copy(image, tmp_path / "star" / "1.png")
    for server, line, message in (
        (
            shapes_server,
            None,
            rf"\(activation: sigmoid\), and an image in a.* {labels}, .*LABELS=file",
        ),
        (
            shapes_server,
            "star/1.png,sqare",
            r"no class 'sqare', .*labels.csv has it. Similar are: square\.",
        ),
        (running, "star/1.png,tabby", r"single-label \(softmax\), and .* is for models"),
    ):
        if line is not None:
            labels.write_text(f"{line}\n")
        with pytest.raises(UserError, match=message):
            evaluate(str(tmp_path), server.predictions_url, output=tmp_path / "report")


# --- Upgrades ---


def test_an_upgrade_compares_all_labels(
    shapes_archive: Path,
    shapes_server: ServerState,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only thresholds change, so each image keeps its top-1 class."""

    def change(name: str, content: bytes) -> bytes:
        if name != MODEL_CARD:
            return content
        return json.dumps(json.loads(content) | {"thresholds": [1.0] * len(NAMES)}).encode()

    strict = repack(shapes_archive, tmp_path / shapes_archive.name, change)
    with served(strict, tmp_path / "run") as server:

        def check(new: ServerState, old: ServerState, agreement: float = upgrades.AGREEMENT) -> str:
            upgrades._compare(old, new, agreement)
            return " ".join("".join(capsys.readouterr()).split())

        same = "the label is the same for 100% of the sample images"
        assert same in check(shapes_server, shapes_server)
        with pytest.raises(UserError, match=r"of the sample images keep their label, and 90% are"):
            check(server, shapes_server)
        assert "All sample images get the same label" in check(server, shapes_server, agreement=0)
        assert same in check(server, server)
