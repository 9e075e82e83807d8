"""The evaluation of a served model, on pictures whose scores are known beforehand."""

import csv
import re
from pathlib import Path

import pytest
import torch

from classification_client import Client, RequestOptions
from handler.labels import Label
from scripts.build.weights import Weights, build_model
from scripts.evaluate import evaluate, report
from scripts.matching import match
from scripts.samples import CAT
from scripts.serve.running import Running
from scripts.terminal import UserError
from tests.pictures import encode, photographs
from tests.unit.test_images import TUTORIAL

COUNT, WRONG_BUT_NEAR, WRONG = 40, 6, 4


@pytest.fixture(scope="module")
def folders(running: Running, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures in the folder of PyTorch's best class, 6 in its second, 4 in its tenth."""
    place = tmp_path_factory.mktemp("by-class")
    labels = _labels(running)
    model = build_model(weights)
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


def test_the_scores_are_those_that_the_folders_were_made_for(
    running: Running, folders: Path, tmp_path: Path
) -> None:
    found = evaluate(folders, running.predictions_url)
    assert len(found.truth) == COUNT
    assert found.top1 == (COUNT - WRONG_BUT_NEAR - WRONG) / COUNT
    assert found.top5 == (COUNT - WRONG) / COUNT
    assert 0 <= found.calibration_error <= 1
    assert "untrained" in (found.warning or "")
    report(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 40 | 0 | 75.00% | 90.00% |" in text
    assert "| 0.00 | 100.0% | 75.0% |" in text
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert sum(int(row["pictures"]) for row in rows) == COUNT
    for name in ("confusion.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_refused_picture_counts_nowhere_and_is_named(
    running: Running, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = next(folders.iterdir())
    broken = folder / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 cut off")
    try:
        found = evaluate(folders, running.predictions_url)
    finally:
        broken.unlink()
    assert len(found.truth) == COUNT
    report(found, tmp_path)
    assert "broken.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("Egyptain cat", r"Similar are: Egyptian_cat \(n02124075\)\."),
        # No `oxcart` and no `crate`, which are spelt much the same.
        ("cats", r"Similar are: tiger_cat \(n02123159\), Persian_cat .*Egyptian_cat .*\)\."),
        ("Labrador", r"Similar are: Labrador_retriever \(n02099712\)\."),
        ("other", r"It has 1000 classes, such as tench \(n01440764\), goldfish"),
    ],
)
def test_a_folder_that_is_no_class_is_named_with_what_it_may_mean(
    folder: str, words: str, running: Running, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "1.png").write_bytes(encode(next(iter(photographs()))[1]))
    with pytest.raises(UserError, match=f"no class '{folder}'.* {words}") as told:
        evaluate(tmp_path, running.predictions_url)
    assert not re.search("oxcart|crate|library|otter", str(told.value))


def test_the_classes_of_a_model_that_has_few_are_all_named() -> None:
    labels = [Label(name, name) for name in ("zero", "one", "two")]
    with pytest.raises(UserError, match=r"no class '1'.* Its classes are: zero, one, two\."):
        match({"1"}, labels, "as a folder is called", "Call the folder by id")


def test_an_ambiguous_folder_asks_for_the_id(running: Running, tmp_path: Path) -> None:
    (tmp_path / "crane").mkdir()
    (tmp_path / "crane" / "1.png").write_bytes(encode(next(iter(photographs()))[1]))
    with pytest.raises(UserError, match=r"by id: n02012849, n03126707"):
        evaluate(tmp_path, running.predictions_url)


def test_pictures_without_folders_are_told_so(running: Running, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder of pictures for each class"):
        evaluate(tmp_path, running.predictions_url)
