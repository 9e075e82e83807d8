"""Rows are the served answers, whatever the pictures come in, and wherever they lie."""

import json
import os
import signal
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from handler.precision import CHECK_IMAGES, CHECK_LABELS
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.serve.running import Running
from scripts.store import sha256
from tests import corpus
from tests.batch.cluster import Cluster
from tests.batch.command import Row, begin, classify, differs, ended, part_files, rows, wait_for
from tests.batch.s3_server import S3, s3_server
from tests.conftest import Shapes

_UNTRAINED = "untrained random weights"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """What people send, and what attackers do: every kind of the corpus, and 100 photographs."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, valid in enumerate(corpus.valid()):
        (folder / f"valid-{number:03}.jpg").write_bytes(valid.data)
    for number, hostile in enumerate(corpus.hostile()):
        (folder / f"hostile-{number:03}.jpg").write_bytes(hostile.data)
    (folder / "empty.jpg").touch()
    for photograph in sorted(pictures.iterdir())[:100]:
        (folder / photograph.name).write_bytes(photograph.read_bytes())
    return folder


def test_every_row_is_the_servers_answer_for_the_same_bytes(
    mixed: Path, archive: Path, running: Running, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    job = begin(mixed, "--output", output, "--archive", archive)
    listening: set[str] = set()

    def look() -> bool:
        listening.update(_addresses(job.pid))
        return bool(part_files(output)) or job.poll() is not None

    wait_for(look)
    said = ended(job)
    found = rows(output)
    assert [row["path"] for row in found] == [str(path) for path in sorted(mixed.iterdir())]
    with requests.Session() as session:
        assert not [row for row in found if differs(row, session, running)]
    errors = Counter(row["error_type"] for row in found if row["error_type"])
    kinds = Counter(hostile.type for hostile in corpus.hostile())
    assert errors == kinds + Counter({"EmptyImage": 1})
    assert {row["archive_sha256"] for row in found} == {sha256(archive)}
    assert all(row["warning"].startswith(_UNTRAINED) for row in found)
    assert _UNTRAINED in said
    refused = sum(errors.values())
    assert f"{len(found)} read, {len(found) - refused} classified, {refused} refused, " in said
    assert "x DamagedImage: " in said
    # Whoever reaches Ray can run programs.
    assert listening
    assert {address for address in listening if not _is_loopback(address)} == set()


def _addresses(pid: int) -> Iterator[str]:
    """Where a process and all that it started listen."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        yield from (c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)


def _is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def test_ctrl_c_ends_everything_and_leaves_no_ray_behind(
    pictures: Path, small_archive: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    output = tmp_path / "results"
    job = begin(
        pictures,
        "--output",
        output,
        "--archive",
        small_archive,
        environment={"TMPDIR": _short(temporary)},
    )
    wait_for(lambda: bool(part_files(output)) or job.poll() is not None)
    started = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGINT)
    ended(job, 130)
    _, left = psutil.wait_procs(started, 30)
    assert not left
    assert not list(Path(_short(temporary)).glob("ray-*"))


def _short(folder: Path) -> str:
    """The same folder under a name that leaves Ray's sockets enough bytes."""
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_RDONLY)}"


def _read(cluster: Cluster, archive: Path, *args: str | Path, output: Path) -> list[Row]:
    options = ("--output", output, "--archive", archive, "--address", cluster.address)
    choices = ("--embedding", "--topk", "2")
    classify(*args, *options, *choices, environment=cluster.environment)
    return rows(output)


@pytest.fixture(scope="module")
def listed(
    cluster: Cluster, small_archive: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Row]:
    """Of 40 pictures, and one that is not there, on a list."""
    folder = tmp_path_factory.mktemp("list")
    names = [str(path) for path in [*sorted(pictures.iterdir())[:40], folder / "missing.jpg"]]
    (folder / "list.txt").write_text("\ufeff" + "\r\n".join([*names, ""]))
    return _read(cluster, small_archive, folder / "list.txt", output=folder / "results")


def test_a_picture_that_is_not_there_is_a_row(listed: list[Row]) -> None:
    assert listed[-1]["error_type"] == "Unreadable"
    assert "No such file" in listed[-1]["error_message"]
    assert all(len(row["labels"]) == 2 and len(row["embedding"]) == 512 for row in listed[:-1])


def test_parquet_of_pictures_gives_the_same_rows(
    cluster: Cluster, small_archive: Path, pictures: Path, listed: list[Row], tmp_path: Path
) -> None:
    contents = [path.read_bytes() for path in sorted(pictures.iterdir())[:40]]
    names = [row["path"] for row in listed[:-1]]
    structs = [{"bytes": content, "path": None} for content in contents]
    # In row groups that are no multiples of a part.
    table = pa.table({"image": contents, "path": names})
    pq.write_table(table, tmp_path / "1.parquet", row_group_size=7)
    pq.write_table(pa.table({"image": structs}), tmp_path / "2.parquet")
    options = ("--column", "image")
    found = _read(cluster, small_archive, tmp_path, *options, output=tmp_path / "results")
    assert found[:40] == listed[:-1]
    assert found[57]["path"] == f"{tmp_path}/2.parquet#17"
    assert [row["embedding"] for row in found[40:]] == [row["embedding"] for row in listed[:-1]]


def test_rows_and_the_report_say_the_precision_that_answered(
    small_archive: Path, pictures: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "int8.mar"
    with zipfile.ZipFile(small_archive) as sound, zipfile.ZipFile(archive, "w") as packed:
        for name in sound.namelist():
            content = sound.read(name)
            if name == MODEL_CARD:
                card = replace(ModelCard.from_json(content), precision="int8")
                content = card.to_json().encode()
            packed.writestr(name, content)
        # What to check the model with, and no model.
        for name in (CHECK_IMAGES, CHECK_LABELS):
            with packed.open(name, "w") as file:
                np.save(file, np.zeros(1))
    output = tmp_path / "results"
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:10]:
        (folder / path.name).write_bytes(path.read_bytes())
    said = " ".join(classify(folder, "--output", output, "--archive", archive).split())
    assert {row["precision"] for row in rows(output)} == {"float32"}
    assert "10 pictures are answered in float32, not the archive's precision: " in said
    assert sum(json.loads((output / "_report.json").read_text())["fallbacks"].values()) == 10


def test_a_node_with_one_cpu_and_one_gpu_decodes_and_classifies(
    pictures: Path, tmp_path: Path
) -> None:
    size = Preprocessing(resize=64, crop=64)
    # On a machine without a GPU PyTorch takes the CPU.
    wanted = recipe(untrained("resnet18"), "small", engine="torch", preprocessing=size)
    archive = build(wanted, tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
    options = ("--output", tmp_path / "results", "--archive", archive)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray:
        node = Cluster(Path(ray, "ray"), nodes=0, gpus=1)
        try:
            address = ("--address", node.address)
            said = classify(folder, *options, *address, environment=node.environment)
        finally:
            node.close()
    assert "1 actor(s) on 1 CPU(s) and 1 GPU(s)" in said
    assert "20 read, 20 classified, 0 refused" in said


def test_several_labels_a_picture_are_the_servers(
    cluster: Cluster, shapes: Shapes, shapes_server: Running, tmp_path: Path
) -> None:
    folder = shapes.folder / "test"
    found = _read(cluster, shapes.archive, folder, output=tmp_path / "results")
    with requests.Session() as session:
        assert not [row for row in found[:20] if differs(row, session, shapes_server, topk=2)]
    assert any(row["passing"] for row in found)


def test_pictures_and_results_in_object_storage(
    small_archive: Path, pictures: Path, listed: list[Row], tmp_path: Path
) -> None:
    with s3_server(tmp_path) as s3:
        files = s3.filesystem()
        for number, path in enumerate(sorted(pictures.iterdir())[:40]):
            # What an address would have to quote.
            with files.open_output_stream(f"pictures/in/{number:02} ü%+?#.jpg") as stream:
                stream.write(path.read_bytes())
        said = _in_bucket(s3, small_archive)
        assert "40 read, 40 classified, 0 refused" in said
        assert "All 40 pictures have results" in _in_bucket(s3, small_archive)
        table = pq.read_table("pictures/out", filesystem=files)
    assert table.column("embedding").to_pylist() == [row["embedding"] for row in listed[:-1]]
    assert table.column("path").to_pylist()[7] == "s3://pictures/in/07 ü%+?#.jpg"


def _in_bucket(s3: S3, archive: Path) -> str:
    """By a Ray of its own, whose processes have the credentials."""
    addresses = (s3.address("pictures/in"), "--output", s3.address("pictures/out"))
    options = ("--archive", archive, "--embedding", "--topk", "2")
    return classify(*addresses, *options, environment=s3.environment)


def test_what_a_person_can_mend_is_a_sentence(
    small_archive: Path, pictures: Path, tmp_path: Path
) -> None:
    options = ("--output", tmp_path / "out", "--archive")
    said = classify(tmp_path / "nothing", *options, small_archive, status=1)
    assert f"Error: {tmp_path}/nothing: there is no such file or folder." in said.replace("\n", "")
    said = classify(tmp_path, *options, __file__, status=1)
    assert "is no sound archive: File is not a zip file." in " ".join(said.split())
    said = classify(pictures, *options, small_archive, "--address", "127.0.0.1:9", status=1)
    assert "Error: No Ray cluster answers: 127.0.0.1:9: [Errno 111]" in " ".join(said.split())
    assert "Traceback" not in said
