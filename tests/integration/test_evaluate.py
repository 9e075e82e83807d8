"""The evaluation of a served model, on images with known scores."""

from pathlib import Path

import pytest
import torch

from classification_client import Client, RequestOptions
from scripts.build.sources.torchvision import TorchvisionSource
from scripts.evaluation.single_label import evaluate_folders, report_folders
from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.images import encode, photographs
from tests.unit.test_images import TUTORIAL

COUNT, WRONG_BUT_NEAR, WRONG = 40, 6, 4


@pytest.fixture(scope="module")
def folders(
    running: ServerState, densenet: TorchvisionSource, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Put 30 images into the folder of PyTorch's top-1 class, 6 of its second, 4 of its tenth."""
    place = tmp_path_factory.mktemp("by-class")
    labels = _labels(running)
    model = densenet.module
    for number, (_, image) in enumerate(list(photographs())[:COUNT]):
        rgb = image.convert("RGB")
        with torch.inference_mode():
            order = model(TUTORIAL(rgb)[None])[0].argsort(descending=True)
        rank = 9 if number < WRONG else 1 if number < WRONG + WRONG_BUT_NEAR else 0
        class_id, name = labels[int(order[rank])]
        # Folders are named by id, or by the label in upper case with spaces.
        folder = place / (class_id if number % 2 else name.replace("_", " ").upper())
        if _is_ambiguous(name, labels):
            folder = place / class_id
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(rgb))
    return place


def _labels(running: ServerState) -> dict[int, tuple[str, str]]:
    with Client(running.predictions_url, RequestOptions(topk=1000)) as client:
        rows = client.classify(CAT).predictions
    return {row.class_index: (row.class_id, row.label) for row in rows}


def _is_ambiguous(name: str, labels: dict[int, tuple[str, str]]) -> bool:
    return sum(other == name for _, other in labels.values()) > 1


def test_scores_are_the_known_ones_and_a_rejected_image_is_named_and_not_counted(
    running: ServerState, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = next(folders.iterdir()) / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 cut off")
    found = evaluate_folders(folders, running.predictions_url, RequestOptions(), 2)
    assert len(found.truth) == COUNT
    assert found.correct.mean() == (COUNT - WRONG_BUT_NEAR - WRONG) / COUNT
    assert found.top5_accuracy == (COUNT - WRONG) / COUNT
    assert "untrained" in (found.model.warning or "")
    report_folders(found, tmp_path)
    assert "broken.jpg" in capsys.readouterr().out
    assert "| images | 40 |\n| not counted | 1 |\n" in (tmp_path / "report.md").read_text()
