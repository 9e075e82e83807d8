"""Nothing lost, nothing twice: nodes, actors and the program itself die in the middle of a job."""

import os
import signal
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.batch.cluster import Cluster
from tests.batch.command import begin, classify, ended, part_files, rows, wait_for

# Actors of the class that loads the model.
ACTOR = "MapWorker(MapBatches(Model))"
_KILLED_ACTORS = 10


def _command(
    cluster: Cluster, archive: Path, pictures: Path, output: Path
) -> tuple[str | Path, ...]:
    return (pictures, "--output", output, "--archive", archive, "--address", cluster.address)


def _each_once(output: Path, pictures: Path) -> None:
    counted = Counter(row["path"] for row in rows(output))
    assert counted == Counter(str(path) for path in pictures.iterdir())


def test_ten_actors_and_a_node_die_and_no_row_is_missing_or_twice(
    cluster: Cluster, small_archive: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    job = begin(
        *_command(cluster, small_archive, pictures, output), environment=cluster.environment
    )
    killed: set[int] = set()
    while len(killed) < _KILLED_ACTORS and job.poll() is None:
        for actor in cluster.workers(ACTOR):
            if actor.pid not in killed:
                before = len(part_files(output))
                actor.kill()
                killed.add(actor.pid)
                # It must not only die, but work in between.
                wait_for(lambda: len(part_files(output)) > before or job.poll() is not None)  # noqa: B023
                break
    assert job.poll() is None, f"the job was done after {len(killed)} actors"
    cluster.kill(cluster.nodes[0])
    assert job.poll() is None, "the job was done before the node died"
    cluster.add()
    assert "800 read, 800 classified, 0 refused" in ended(job)
    _each_once(output, pictures)


def test_what_was_killed_goes_on_and_keeps_what_is_there(
    cluster: Cluster, small_archive: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    command = _command(cluster, small_archive, pictures, output)
    job = begin(*command, environment=cluster.environment)
    wait_for(lambda: len(part_files(output)) > 3 or job.poll() is not None)
    os.killpg(job.pid, signal.SIGKILL)
    ended(job, -signal.SIGKILL)
    # What its tasks still write is whole, and theirs to write.
    wait_for(lambda: not cluster.workers(ACTOR))
    there = {file: file.stat().st_mtime_ns for file in part_files(output)}
    assert there
    said = classify(*command, environment=cluster.environment)
    assert "pictures have results already" in said
    assert {file: file.stat().st_mtime_ns for file in there} == there
    _each_once(output, pictures)
    assert "All 800 pictures have results" in classify(*command)
    with pytest.raises(AssertionError, match="topk None there, 3 here"):
        classify(*command, "--topk", "3")


# Appended to the archive's own code: no picture is known that crashes Pillow.
_CRASH = """
_sound = _made


def _made(data, *rest):
    if Image.open(io.BytesIO(data)).size == (97, 13):
        import os
        os.abort()
    return _sound(data, *rest)
"""


def test_a_picture_that_crashes_its_decoder_is_a_row(
    small_archive: Path, pictures: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "crashes.mar"
    with zipfile.ZipFile(small_archive) as sound, zipfile.ZipFile(archive, "w") as packed:
        for name in sound.namelist():
            code = _CRASH.encode() if name == "handler/images.py" else b""
            packed.writestr(name, sound.read(name) + code)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:60]:
        (folder / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (97, 13)).save(folder / "crash.jpg")
    output = tmp_path / "results"
    said = classify(folder, "--output", output, "--archive", archive)
    assert "61 read, 60 classified, 1 refused" in said
    _each_once(output, folder)
    (refused,) = (row for row in rows(output) if row["error_type"])
    assert refused["path"] == str(folder / "crash.jpg")
    assert refused["error_type"] == "DamagedImage"
    assert "it ended the program that decodes it" in refused["error_message"]
