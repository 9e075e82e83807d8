"""Rows equal the server's responses, for files, lists, Parquet and object storage."""

import io
import json
import os
import signal
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image
from pyarrow import fs

from benchmarks.archives import repack
from handler.inference.precision import CHECK_IMAGES, CHECK_LABELS
from handler.settings import MODEL_CARD, ModelCard
from scripts.serve.running import ServerState
from scripts.store import sha256
from tests import corpus
from tests.batch.cluster import Cluster
from tests.batch.command import Row, begin, classify, differs, ended, rows, wait_for

_UNTRAINED = "untrained random weights"
_CHOICES = ("--embedding", "--topk", "2")


@dataclass(frozen=True)
class Result:
    """The output, the rows and the report of a job."""

    printed: str
    rows: list[Row]
    report: dict[str, Any]


def _run(cluster: Cluster, archive: Path, *args: str | Path, output: Path) -> Result:
    options = ("--output", output, "--archive", archive, "--address", cluster.address)
    printed = classify(*args, *options, environment=cluster.environment)
    return Result(printed, rows(output), json.loads((output / "_report.json").read_text()))


@pytest.fixture(scope="module")
def rejected() -> dict[str, bytes]:
    """An image per error type."""
    return {"EmptyImage": b""} | {hostile.type: hostile.data for hostile in corpus.hostile()}


@pytest.fixture(scope="module")
def listed(
    cluster: Cluster,
    small_archive: Path,
    images: list[Path],
    rejected: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Result:
    """The rows of a list: 20 photographs, images of the corpus, and a missing file."""
    folder = tmp_path_factory.mktemp("list")
    some = [*rejected.values(), *(valid.data for valid in islice(corpus.valid(), 0, None, 8))]
    files = [folder / f"{number:03}.jpg" for number in range(len(some))]
    for file, data in zip(files, some, strict=True):
        file.write_bytes(data)
    names = map(str, [*images[:20], *files, folder / "missing.jpg"])
    (folder / "list.txt").write_text("\ufeff" + "\r\n".join([*names, ""]))
    return _run(cluster, small_archive, folder / "list.txt", *_CHOICES, output=folder / "results")


def test_every_row_equals_the_servers_response(
    listed: Result, rejected: dict[str, bytes], server: ServerState, small_archive: Path
) -> None:
    *found, missing = listed.rows
    with requests.Session() as session:
        assert not [row for row in found if differs(row, session, server, topk=2)]
    errors = Counter(row["error_type"] for row in found if row["error_type"])
    assert errors == Counter(list(rejected))
    sound = [row for row in found if not row["error_type"]]
    assert all(len(row["labels"]) == 2 and len(row["embedding"]) == 512 for row in sound)
    assert missing["error_type"] == "Unreadable"
    assert "No such file" in missing["error_message"]
    assert {row["archive_sha256"] for row in listed.rows} == {sha256(small_archive)}
    assert all(row["warning"].startswith(_UNTRAINED) for row in listed.rows)
    assert _UNTRAINED in listed.printed
    counts = f"{len(found) + 1} read, {len(sound)} classified, {len(errors) + 1} rejected, "
    assert counts in listed.printed
    assert "x DamagedImage: " in listed.printed


# Appended to the archive's decoder, since no known image crashes Pillow.
_CRASH = b"""
_sound = decode_here


def decode_here(data, *rest):
    if Image.open(io.BytesIO(data)).size == (97, 13):
        import os
        os.abort()
    return _sound(data, *rest)
"""


def _break(archive: Path, target: Path) -> Path:
    """Copy an archive; the copy's decoder crashes, and its int8 model is missing."""

    def change(name: str, content: bytes) -> bytes:
        if name == MODEL_CARD:
            return replace(ModelCard.from_json(content), precision="int8").to_json().encode()
        return content + (_CRASH if name == "handler/decoding/pillow.py" else b"")

    with zipfile.ZipFile(repack(archive, target, change), "a") as packed:
        for name in (CHECK_IMAGES, CHECK_LABELS):
            with packed.open(name, "w") as file:
                np.save(file, np.zeros(1))
    return target


@pytest.fixture(scope="module")
def parquet(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two Parquet files.

    One has 20 photographs and the image for `_CRASH`, the other the same photographs without names.
    """
    folder = tmp_path_factory.mktemp("parquet")
    contents = [path.read_bytes() for path in images[:20]]
    crash = io.BytesIO()
    Image.new("RGB", (97, 13)).save(crash, "JPEG")
    names = [*map(str, images[:20]), "crash.jpg"]
    table = pa.table({"image": [*contents, crash.getvalue()], "path": names})
    # In row groups that are no multiples of a part.
    pq.write_table(table, folder / "1.parquet", row_group_size=7)
    structs = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"image": structs}), folder / "2.parquet")
    return folder


def test_images_in_parquet_give_the_same_rows(
    cluster: Cluster, small_archive: Path, parquet: Path, listed: Result, tmp_path: Path
) -> None:
    options = (parquet, "--column", "image", *_CHOICES)
    found = _run(cluster, small_archive, *options, output=tmp_path / "results").rows
    expected = listed.rows[:20]
    assert found[:20] == expected
    assert found[38]["path"].endswith("/2.parquet#17")
    assert [row["embedding"] for row in found[21:]] == [row["embedding"] for row in expected]


@pytest.fixture(scope="module")
def broken(
    cluster: Cluster, small_archive: Path, parquet: Path, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """The rows of the Parquet files, classified by a broken archive."""
    folder = tmp_path_factory.mktemp("broken")
    archive = _break(small_archive, folder / "broken.mar")
    options = (parquet, "--column", "image", *_CHOICES)
    return _run(cluster, archive, *options, output=folder / "results")


def test_an_image_that_crashes_its_decoder_fails_alone(broken: Result) -> None:
    assert "41 read, 40 classified, 1 rejected" in broken.printed
    (crashed,) = (row for row in broken.rows if row["error_type"])
    assert (crashed["path"], crashed["error_type"]) == ("crash.jpg", "DamagedImage")
    assert "it crashed the program that decodes it" in crashed["error_message"]


def test_rows_and_report_have_the_precision_that_was_used(broken: Result) -> None:
    assert {row["precision"] for row in broken.rows} == {"float32"}
    warning = "41 images are answered in float32, not the archive's precision: "
    assert warning in " ".join(broken.printed.split())
    assert sum(broken.report["fallbacks"].values()) == 41


def test_nodes_with_one_cpu_and_one_gpu_decode_and_classify(
    cluster: Cluster, torch_archive: Path, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(map(str, images[:20])))
    result = _run(cluster, torch_archive, tmp_path / "list.txt", output=tmp_path / "results")
    assert "2 actor(s) on 2 CPU(s) and 2 GPU(s)" in result.printed
    assert "20 read, 20 classified, 0 rejected" in result.printed


def test_a_job_on_object_storage_stops_by_ctrl_c_and_resumes_with_the_servers_results(
    bucket: Callable[[str], str],
    multilabel_archive: Path,
    images: list[Path],
    server: ServerState,
    tmp_path: Path,
) -> None:
    storage, _ = fs.FileSystem.from_uri(bucket(""))
    # Characters that a URL has to quote.
    keys = {f"images/in/{path.stem} ü%+?#.jpg": path for path in images}
    for key, path in keys.items():
        with storage.open_output_stream(key) as stream:
            stream.write(path.read_bytes())
    command = (bucket("in"), "--output", bucket("out"), "--archive", multilabel_archive, *_CHOICES)
    # A short path: those of Ray's sockets are limited to 107 bytes.
    short = f"/proc/{os.getpid()}/fd/{os.open(tmp_path, os.O_RDONLY)}"
    job = begin(*command, environment={"TMPDIR": short})
    results = fs.FileSelector("images/out", allow_not_found=True)

    def has_results() -> bool:
        return any("part-" in file.base_name for file in storage.get_file_info(results))

    wait_for(lambda: has_results() or job.poll() is not None)
    assert job.poll() is None, job.communicate()[0]
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    # Whoever can connect to Ray can run programs.
    addresses = {address.removeprefix("::ffff:") for address in _addresses(processes)}
    assert addresses
    assert not [one for one in addresses if not one.startswith("127.") and one != "::1"]
    assert any(tmp_path.glob("ray-*"))
    os.kill(job.pid, signal.SIGINT)
    ended(job, 130)
    _, left = psutil.wait_procs(processes[1:], 30)
    assert not left
    assert not any(tmp_path.glob("ray-*"))

    assert "images have results already" in classify(*command)
    found = pq.read_table("images/out", filesystem=storage).to_pylist()
    assert Counter(row["path"] for row in found) == Counter(f"s3://{key}" for key in keys)
    assert any(row["passing"] for row in found)
    local = [row | {"path": str(keys[row["path"].removeprefix("s3://")])} for row in found[:20]]
    with requests.Session() as session:
        several = server.serving("several")
        assert not [row for row in local if differs(row, session, several, topk=2)]


def _addresses(processes: list[psutil.Process]) -> Iterator[str]:
    """Yield the addresses at which they listen."""
    for process in processes:
        with suppress(psutil.Error):
            connections = process.net_connections("inet")
            yield from (c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)
