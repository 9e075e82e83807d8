"""Rows equal the server's responses, for files, lists, Parquet and object storage."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from pyarrow import fs

from scripts.serve.running import ServerState
from scripts.store import sha256
from tests import corpus
from tests.batch.cluster import Cluster
from tests.batch.command import Row, begin, classify, differs, ended, part_files, rows, wait_for

_UNTRAINED = "untrained random weights"
_CHOICES = ("--embedding", "--topk", "2")


@dataclass(frozen=True)
class Result:
    """The output and the rows of a job."""

    printed: str
    rows: list[Row]


def _run(cluster: Cluster, archive: Path, *args: str | Path, output: Path) -> Result:
    options = ("--output", output, "--archive", archive, "--address", cluster.address)
    return Result(classify(*args, *options, environment=cluster.environment), rows(output))


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


def test_images_in_parquet_give_the_same_rows(
    cluster: Cluster, small_archive: Path, images: list[Path], listed: Result, tmp_path: Path
) -> None:
    contents = [path.read_bytes() for path in images[:20]]
    table = pa.table({"image": contents, "path": [str(path) for path in images[:20]]})
    # In row groups that are no multiples of a part.
    pq.write_table(table, tmp_path / "1.parquet", row_group_size=7)
    structs = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"image": structs}), tmp_path / "2.parquet")
    options = ("--column", "image", *_CHOICES)
    found = _run(cluster, small_archive, tmp_path, *options, output=tmp_path / "results").rows
    expected = listed.rows[:20]
    assert found[:20] == expected
    assert found[37]["path"] == f"{tmp_path}/2.parquet#17"
    assert [row["embedding"] for row in found[20:]] == [row["embedding"] for row in expected]


def test_nodes_with_one_cpu_and_one_gpu_decode_and_classify(
    cluster: Cluster, torch_archive: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images[:20]:
        shutil.copy(path, folder)
    printed = _run(cluster, torch_archive, folder, output=tmp_path / "results").printed
    assert "2 actor(s) on 2 CPU(s) and 2 GPU(s)" in printed
    assert "20 read, 20 classified, 0 rejected" in printed


def test_multi_label_rows_of_object_storage_equal_the_servers_responses(
    bucket: Callable[[str], str], multilabel_archive: Path, images: list[Path], server: ServerState
) -> None:
    storage, _ = fs.FileSystem.from_uri(bucket(""))
    for number, path in enumerate(images[:20]):
        # Characters that a URL has to quote.
        with storage.open_output_stream(f"images/in/{number:02} ü%+?#.jpg") as stream:
            stream.write(path.read_bytes())
    command = (bucket("in"), "--output", bucket("out"), "--archive", multilabel_archive)
    assert "20 read, 20 classified, 0 rejected" in classify(*command, *_CHOICES)
    assert "All 20 images have results" in classify(*command, *_CHOICES)
    found = pq.read_table("images/out", filesystem=storage).to_pylist()
    assert found[7]["path"] == "s3://images/in/07 ü%+?#.jpg"
    local = [row | {"path": str(path)} for row, path in zip(found, images[:20], strict=True)]
    with requests.Session() as session:
        several = server.serving("several")
        assert not [row for row in local if differs(row, session, several, topk=2)]
    assert any(row["passing"] for row in found)


def test_ray_listens_on_loopback_only_and_ctrl_c_leaves_no_process(
    small_archive: Path, images: list[Path], tmp_path: Path
) -> None:
    output, temporary = tmp_path / "results", tmp_path / "t"
    temporary.mkdir()
    # A short path: those of Ray's sockets are limited to 107 bytes.
    short = f"/proc/{os.getpid()}/fd/{os.open(temporary, os.O_RDONLY)}"
    options = ("--output", output, "--archive", small_archive)
    job = begin(images[0].parent, *options, environment={"TMPDIR": short})
    wait_for(lambda: bool(part_files(output)) or job.poll() is not None)
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    # Whoever can connect to Ray can run programs.
    addresses = {address.removeprefix("::ffff:") for address in _addresses(processes)}
    assert addresses
    assert not [one for one in addresses if not one.startswith("127.") and one != "::1"]
    assert any(temporary.glob("ray-*"))
    os.kill(job.pid, signal.SIGINT)
    ended(job, 130)
    _, left = psutil.wait_procs(processes[1:], 30)
    assert not left
    assert not any(temporary.glob("ray-*"))


def _addresses(processes: list[psutil.Process]) -> Iterator[str]:
    """Yield the addresses at which they listen."""
    for process in processes:
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        yield from (c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{images}/no --archive={archive}", "/no: there is no such file or folder."),
        ("{images} --archive={images}/0000.jpg", "is no sound archive: File is not a zip file."),
        (
            "{images} --archive={archive} --address=127.0.0.1:9",
            "Error: No Ray cluster answers: 127.0.0.1:9: [Errno 111]",
        ),
    ],
)
def test_a_mistake_is_an_error_message(
    small_archive: Path, images: list[Path], tmp_path: Path, arguments: str, message: str
) -> None:
    filled = arguments.format(images=images[0].parent, archive=small_archive).split()
    printed = classify(*filled, "--output", tmp_path / "out", status=1)
    assert message.replace(" ", "") in "".join(printed.split())
    assert "Traceback" not in printed
