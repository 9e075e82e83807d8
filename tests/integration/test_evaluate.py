"""The evaluation of a served model, on images whose scores are known beforehand."""

import csv
from pathlib import Path

import pytest
import torch

from classification_client import Client, RequestOptions
from scripts.build.sources.torchvision import TorchvisionSource
from scripts.evaluate import evaluate, report
from scripts.samples import CAT
from scripts.serve.running import Running
from scripts.terminal import UserError
from tests.pictures import encode, photographs
from tests.unit.test_images import TUTORIAL

COUNT, WRONG_BUT_NEAR, WRONG = 40, 6, 4


@pytest.fixture(scope="module")
def folders(
    running: Running, densenet: TorchvisionSource, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """30 images in the folder of PyTorch's best class, 6 in its second, 4 in its tenth."""
    place = tmp_path_factory.mktemp("by-class")
    labels = _labels(running)
    model = densenet.module
    for number, (_, image) in enumerate(list(photographs())[:COUNT]):
        rgb = image.convert("RGB")
        with torch.inference_mode():
            order = model(TUTORIAL(rgb)[None])[0].argsort(descending=True)
        rank = 9 if number < WRONG else 1 if number < WRONG + WRONG_BUT_NEAR else 0
        class_id, name = labels[int(order[rank])]
        # By id, or by name in other words, as people call their folders.
        folder = place / (class_id if number % 2 else name.replace("_", " ").upper())
        if _is_ambiguous(name, labels):
            folder = place / class_id
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(rgb))
    return place


def _labels(running: Running) -> dict[int, tuple[str, str]]:
    with Client(running.predictions_url, RequestOptions(topk=1000)) as client:
        rows = client.classify(CAT).predictions
    return {row.class_index: (row.class_id, row.label) for row in rows}


def _is_ambiguous(name: str, labels: dict[int, tuple[str, str]]) -> bool:
    return sum(other == name for _, other in labels.values()) > 1


def test_scores_are_the_known_ones_and_a_rejected_image_counts_nowhere_and_is_named(
    running: Running, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = next(folders.iterdir()) / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 cut off")
    found = evaluate(folders, running.predictions_url)
    assert len(found.truth) == COUNT
    assert found.top1 == (COUNT - WRONG_BUT_NEAR - WRONG) / COUNT
    assert found.top5 == (COUNT - WRONG) / COUNT
    assert 0 <= found.calibration_error <= 1
    assert "untrained" in (found.warning or "")
    report(found, tmp_path)
    assert "broken.jpg" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "| 40 | 1 | 75.00% | 90.00% |" in text
    assert "| 0.00 | 100.0% | 75.0% |" in text
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert sum(int(row["pictures"]) for row in rows) == COUNT
    for name in ("confusion.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("cats", r"no class 'cats'.*Similar are: tiger_cat \(n02123159\), "),
        ("crane", r"by id: n02012849, n03126707"),
        (".", "a folder of pictures for each class"),
    ],
)
def test_a_folder_that_is_not_one_class_is_named(
    folder: str, words: str, running: Running, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "1.png").write_bytes(encode(next(iter(photographs()))[1]))
    with pytest.raises(UserError, match=words):
        evaluate(tmp_path, running.predictions_url)
