"""Photographs with known content, classified in batch by a model with trained weights."""

import shutil
from pathlib import Path

from benchmarks.known import KNOWN
from tests.batch.command import classify, rows


def test_every_photograph_is_recognized(lite0_archive: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "photographs", tmp_path / "results"
    folder.mkdir()
    for known in KNOWN:
        shutil.copy(known.path, folder)
    classify(folder, "--output", output, "--archive", lite0_archive)
    best = {Path(row["path"]).name: row["labels"][0] for row in rows(output)}
    assert len(best) == len(KNOWN)
    wrong = {p.path.name: best[p.path.name] for p in KNOWN if best[p.path.name] not in p.labels}
    assert not wrong
