"""One row per image, although the program, actors and a node are killed during a job."""

import json
import os
import shutil
import signal
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.archives import repack
from handler.inference.precision import CHECK_IMAGES, CHECK_LABELS
from handler.settings import MODEL_CARD, ModelCard
from tests.batch.cluster import Cluster
from tests.batch.command import begin, classify, ended, part_files, rows, wait_for

# The actors that load the model.
ACTOR = "MapWorker(MapBatches(Model))"
# More than Ray's usual limit of restarts and retries.
_KILLED_ACTORS = 4


def _each_once(output: Path, folder: Path) -> None:
    counted = Counter(row["path"] for row in rows(output))
    assert counted == Counter(str(path) for path in folder.iterdir())


def test_each_image_has_one_row_although_program_actors_and_a_node_are_killed(
    cluster: Cluster, small_archive: Path, images: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "results"
    where = ("--output", output, "--archive", small_archive, "--address", cluster.address)
    command = (images[0].parent, *where)
    job = begin(*command, environment=cluster.environment)
    wait_for(lambda: len(part_files(output)) > 3 or job.poll() is not None)
    os.killpg(job.pid, signal.SIGKILL)
    ended(job, -signal.SIGKILL)
    # Its tasks may still write complete parts.
    wait_for(lambda: not cluster.workers(ACTOR))
    written = {file: file.stat().st_mtime_ns for file in part_files(output)}
    assert 3 < len(written) < len(images) // 8

    job = begin(*command, environment=cluster.environment)
    killed: set[int] = set()
    while len(killed) < _KILLED_ACTORS and job.poll() is None:
        for actor in [one for one in cluster.workers(ACTOR) if one.pid not in killed][:1]:
            before = len(part_files(output))
            actor.kill()
            killed.add(actor.pid)
            # The next actor must work before it is killed.
            wait_for(lambda: len(part_files(output)) > before or job.poll() is not None)  # noqa: B023
    assert job.poll() is None, f"the job was done after {len(killed)} actors"
    cluster.kill(cluster.nodes[1])
    assert job.poll() is None, "the job was done before the node died"
    cluster.add()
    printed = ended(job)
    assert "have results already" in printed
    assert ", 0 rejected" in printed
    assert {file: file.stat().st_mtime_ns for file in written} == written
    _each_once(output, images[0].parent)
    assert "topk None there, 3 here" in classify(*command, "--topk", "3", status=1)


# Appended to the archive's decoder, since no known image crashes Pillow.
_CRASH = b"""
_sound = decode_here


def decode_here(data, *rest):
    if Image.open(io.BytesIO(data)).size == (97, 13):
        import os
        os.abort()
    return _sound(data, *rest)
"""


def _broken(small_archive: Path, archive: Path) -> Path:
    """Write an archive whose decoder crashes, and whose int8 model is missing."""

    def change(name: str, content: bytes) -> bytes:
        if name == MODEL_CARD:
            return replace(ModelCard.from_json(content), precision="int8").to_json().encode()
        return content + (_CRASH if name == "handler/decoding/pillow.py" else b"")

    with zipfile.ZipFile(repack(small_archive, archive, change), "a") as packed:
        for name in (CHECK_IMAGES, CHECK_LABELS):
            with packed.open(name, "w") as file:
                np.save(file, np.zeros(1))
    return archive


def test_an_image_that_crashes_its_decoder_and_a_precision_that_fails_are_reported(
    cluster: Cluster, small_archive: Path, images: list[Path], tmp_path: Path
) -> None:
    archive = _broken(small_archive, tmp_path / "broken.mar")
    folder, output = tmp_path / "images", tmp_path / "results"
    folder.mkdir()
    for path in images[:20]:
        shutil.copy(path, folder)
    Image.new("RGB", (97, 13)).save(folder / "crash.jpg")
    where = ("--output", output, "--archive", archive, "--address", cluster.address)
    printed = " ".join(classify(folder, *where, environment=cluster.environment).split())
    assert "21 read, 20 classified, 1 rejected" in printed
    _each_once(output, folder)
    found = rows(output)
    (crashed,) = (row for row in found if row["error_type"])
    assert crashed["path"] == str(folder / "crash.jpg")
    assert crashed["error_type"] == "DamagedImage"
    assert "it crashed the program that decodes it" in crashed["error_message"]
    # Rows and report have the precision that was used.
    assert {row["precision"] for row in found} == {"float32"}
    assert "21 images are answered in float32, not the archive's precision: " in printed
    assert sum(json.loads((output / "_report.json").read_text())["fallbacks"].values()) == 21
