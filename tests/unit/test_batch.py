"""Batch classification without Ray: finding images, reading them, folders of results."""

import hashlib
import io
import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import stamina
from pyarrow.fs import LocalFileSystem

from batch import cluster, parts, plan, storage
from batch.archive import _root, unpack
from batch.classify import classify, errors_as_messages
from batch.job import Job, OtherJobError, load_existing_job
from batch.parts import Entry
from batch.pipeline import Actors
from batch.plan import PlanError
from batch.storage import AddressError
from classification_client.errors import TransientError
from handler.errors import NotAnImage
from scripts.terminal import UserError


def _entries(images: Path | str, column: str | None = None) -> list[Entry]:
    return list(plan.entries(str(images), column, Counter()))


def _job(output: Path, **values: Any) -> Job:
    choices: dict[str, Any] = {"topk": None, "threshold": None, "embedding": False}
    job = Job("a" * 64, "pictures", None, "/", **choices, output=str(output))
    return replace(job, **values)


THIRTY = [str(number).encode() for number in range(30)]


def _parquet(file: Path, group: int | None = None, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


def test_a_folders_images_are_found_in_order_and_the_rest_is_counted(
    tmp_path: Path,
) -> None:
    below = tmp_path / "b"
    below.mkdir()
    for name in ("c.JPG", "b/d.png", "_DSC1.jpg", "a?b #.webp", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    left_out: Counter[str] = Counter()
    found = [entry.path for entry in plan.entries(str(tmp_path), None, left_out)]
    names = ["_DSC1.jpg", "a?b #.webp", "b/d.png", "c.JPG"]
    assert found == [f"{tmp_path}/{name}" for name in names]
    assert left_out == {
        "hidden": 1,
        ".txt file(s)": 1,
        "link(s) to folders": 1,
        "pipe(s), or links to nothing": 2,
        "whose names are no text in UTF-8": 1,
    }


def test_a_list_names_images_whether_they_exist_or_not(tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_bytes("\ufeffa b.jpg\r\n\r\ns3://bucket/ü?.png\n".encode())
    assert _entries(listing) == [Entry("a b.jpg"), Entry("s3://bucket/ü?.png")]


def test_parquet_holds_addresses_or_bytes(tmp_path: Path) -> None:
    image = [{"bytes": b"1", "path": "one.jpg"}, {"bytes": b"2", "path": None}]
    columns: dict[str, list[Any]] = {"where": ["a", "b"], "data": [b"1", b"2"], "image": image}
    file = _parquet(tmp_path / "images.parquet", None, **columns)
    by_row = [Entry(f"{file}#{row}", str(file), row) for row in range(2)]
    for images in (file, tmp_path):
        assert _entries(images, "where") == [Entry("a"), Entry("b")]
        assert _entries(images, "data") == by_row
        assert _entries(images, "image") == [Entry("one.jpg", str(file), 0), by_row[1]]


@pytest.mark.parametrize("group", [1, 7, 100])
def test_bytes_come_from_the_rows_that_a_part_has(tmp_path: Path, group: int) -> None:
    contents = [str(number).encode() for number in range(50)]
    for name in ("a", "b"):
        _parquet(tmp_path / f"{name}.parquet", group, image=contents)
    folder = str(tmp_path / "plan")
    count, size = parts.write(_entries(tmp_path, "image"), folder)
    assert (count, size) == (100, 8)
    made: list[bytes | OSError] = []
    for number in range(13):
        rows = parts.part(folder, number, size)
        made += parts.contents(rows, "image", "/", "", 1000)
    assert made == contents * 2


def _contents(rows: list[dict[str, Any]]) -> list[bytes | OSError]:
    return list(parts.contents([Entry(**row) for row in rows], "image", "/", "", 1000))


def _rows(file: Path, numbers: range) -> list[bytes | OSError]:
    """Return the content of rows of a Parquet file."""
    return _contents([{"path": f"{row}", "file": str(file), "row": row} for row in numbers])


def test_a_damaged_row_group_fails_its_own_rows_only(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "images.parquet", 10, image=THIRTY)
    data = bytearray(file.read_bytes())
    at = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 8] = b"\xff" * 8
    file.write_bytes(data)
    found = _rows(file, range(5, 30))
    assert found[:5] + found[15:] == THIRTY[5:10] + THIRTY[20:]
    for one in found[5:15]:
        assert isinstance(one, OSError)
        assert not isinstance(one, TransientError)
        assert str(one).startswith("row group 1 of its Parquet file is damaged: ")
    file.write_bytes(b"PAR1 and no more")
    for one in _rows(file, range(3)):
        assert str(one).startswith("its Parquet file is damaged: ")
    file.unlink()
    (tmp_path / "another").touch()
    assert [type(one) for one in _rows(file, range(3))] == [FileNotFoundError] * 3


class _Network(SimpleNamespace):
    """A file system some of whose requests fail; one of pyarrow's cannot be changed."""

    def __init__(self, lost: Callable[[int], bool]) -> None:
        super().__init__()
        self._requests = 0
        self._lost = lost

    def _request(self) -> None:
        self._requests += 1
        if self._lost(self._requests):
            raise OSError("AWS Error NETWORK_CONNECTION")

    def open_input_file(self, path: str) -> Any:
        self._request()
        file = pa.OSFile(path)
        self.size, self.close = file.size, file.close
        self._file = file
        return self

    def read_at(self, count: int, start: int) -> Any:
        self._request()
        return self._file.read_at(count, start)


@pytest.mark.parametrize(
    ("lost", "is_read"),
    [
        (lambda number: number % 4 > 0, True),
        (lambda _: True, False),
        (lambda number: number > 4, False),
    ],
)
def test_reading_parquet_is_retried(
    lost: Callable[[int], bool], *, is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _parquet(tmp_path / "images.parquet", 10, image=THIRTY)
    network = _Network(lost)
    monkeypatch.setattr(storage, "_local", lambda: network)
    with stamina.set_testing(True, attempts=4):
        found = _rows(file, range(30))
    assert len(found) == 30
    if is_read:
        assert found == THIRTY
    else:
        assert isinstance(found[-1], TransientError)


def test_a_place_without_images_is_an_error_message(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    _parquet(tmp_path / "ab.parquet", a=[1], b=["x"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    for name, column, message in (
        ("empty", None, r"there is no image here \(1 \.txt file"),
        ("nothing", None, "there is no such file or folder"),
        ("ab.parquet", None, "Which column of ab.parquet has the images[?] It has a, b"),
        ("ab.parquet", "c", "has no column 'c'; it has a, b"),
        ("ab.parquet", "a", "holds int64, neither addresses"),
        ("broken.parquet", "a", "is no Parquet file"),
        ("bytes", None, "is no image, no Parquet file"),
    ):
        with pytest.raises(PlanError, match=message):
            _entries(tmp_path / name, column)


def test_a_mistake_is_an_error_message_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "no.mar").write_bytes(b"no archive")
    options: dict[str, Any] = {"column": None, "choices": {}, "actors": None, "address": None}
    with pytest.raises(UserError, match=r"no\.mar is no sound archive: File is not a zip file\."):
        classify("images", str(tmp_path / "out"), tmp_path / "no.mar", **options)
    with pytest.raises(UserError, match=r"cannot be read: No such file.*`make archive` builds it"):
        classify("images", str(tmp_path / "out"), tmp_path / "missing.mar", **options)
    failed = ray.exceptions.RayError("a task failed")
    failed.__cause__ = TransientError(5, "Input/output error")
    for mistake, message in (
        (lambda: _entries(tmp_path / "no"), "/no: there is no such file or folder."),
        (
            lambda: cluster._check_reachable("127.0.0.1:9"),
            r"No Ray cluster answers: 127\.0\.0\.1:9: \[Errno 111\]",
        ),
        (
            MagicMock(side_effect=failed),
            "The storage does not answer: Input/output error. The same command resumes",
        ),
        (MagicMock(side_effect=PermissionError(13, "Permission denied", "a")), "a: Permission den"),
    ):
        with pytest.raises(UserError, match=message), errors_as_messages():
            mistake()


def test_an_unsupported_address_is_an_error_message() -> None:
    for address, message in (
        ("https://example.org/a.jpg", "not from web servers"),
        ("s4://bucket/key", "Unrecognized filesystem"),
        ("s3://bucket/key?speed=9", "Unexpected query parameter"),
    ):
        with pytest.raises(AddressError, match=message):
            storage.place(address)


def test_looking_up_a_bucket_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a region in the address, the storage system is asked for it."""
    gone = OSError("When resolving region for bucket 'a': AWS Error NETWORK_CONNECTION")
    systems = SimpleNamespace(from_uri=MagicMock())
    monkeypatch.setattr(
        storage, "fs", SimpleNamespace(FileSystem=systems, LocalFileSystem=LocalFileSystem)
    )
    with stamina.set_testing(True, attempts=4):
        systems.from_uri.side_effect = [gone, gone, gone, ("system", "a")]
        assert storage.place("s3://bucket-1/key") == storage.Place("system", "bucket-1/key")
        systems.from_uri.side_effect = gone
        with pytest.raises(TransientError, match="NETWORK_CONNECTION"):
            storage.place("s3://bucket-2/key")
        (found,) = _contents([{"path": "s3://bucket-3/key"}])
        assert isinstance(found, TransientError)
        systems.from_uri.side_effect = [OSError("Bucket 'bucket-4' not found")]
        with pytest.raises(AddressError, match="'bucket-4' not found"):
            storage.place("s3://bucket-4/key")


def test_a_missing_image_is_final_and_a_missing_drive_is_transient(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1000))
    assert len(storage.read(storage.place(str(tmp_path / "large")), 10)) == 11, "over the limit"
    with pytest.raises(FileNotFoundError):
        storage.read(storage.place(str(tmp_path / "gone.jpg")), 10)
    with pytest.raises(OSError, match="it is not a regular file"):
        storage.read(storage.place(str(tmp_path)), 10)
    with stamina.set_testing(True), pytest.raises(TransientError, match="its folder is missing"):
        storage.read(storage.place(str(tmp_path / "drive" / "a.jpg")), 10)


def test_a_folder_of_results_belongs_to_one_job(tmp_path: Path) -> None:
    assert load_existing_job(_job(tmp_path)) is None
    # As a kill in the middle of the planning leaves it.
    storage.write(storage.place(str(tmp_path)) / "_plan/plan-00000.parquet", b"")
    assert load_existing_job(_job(tmp_path)) is None
    job = _job(tmp_path, pictures=20, part_size=8)
    job.begin()
    assert load_existing_job(_job(tmp_path)) == job
    storage.write(job.part_file(1), b"")
    assert job.missing() == [0, 2]
    assert [job.size(number) for number in range(3)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"archive_sha256": "b"}, f"archive '{'a' * 64}' there, 'b' here"),
        ({"topk": 3}, "topk None there, 3 here"),
        ({"embedding": True}, "embedding False there, True here"),
        ({"images": "others"}, "images '/pictures' there, '/others' here"),
        ({"base": "/home"}, "images '/pictures' there, '/home/pictures' here"),
        ({}, "version of the columns 1 there, 2 here"),
    ],
)
def test_results_of_another_job_or_version_are_rejected(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    _job(tmp_path, pictures=20, part_size=8).begin()
    if not other:  # earlier versions named none
        file = tmp_path / "_job.json"
        named = json.loads(file.read_text())
        del named["version"]
        file.write_text(json.dumps(named))
    with pytest.raises(OtherJobError, match=message):
        load_existing_job(_job(tmp_path, **other))
    (tmp_path / "_job.json").rename(tmp_path / "thesis.txt")
    with pytest.raises(OtherJobError, match=r"has other files, such as thesis\.txt"):
        load_existing_job(_job(tmp_path, **other))


def test_an_archive_is_unpacked_whole_and_only_as_it_was_sent(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as content:
        content.writestr("handler/__init__.py", "")
    sha256 = hashlib.sha256(packed.getvalue()).hexdigest()
    with pytest.raises(ValueError, match="changed on its way"):
        unpack(packed.getvalue() + b"1", sha256, tmp_path / "archive")
    unpack(packed.getvalue(), sha256, tmp_path / "archive")
    # Another process unpacked it at the same time.
    unpack(packed.getvalue(), sha256, tmp_path / "archive")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    assert (tmp_path / "archive" / "handler" / "__init__.py").is_file()


def test_code_is_not_loaded_from_a_folder_that_others_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(PermissionError, match="belongs to another user, or others may write"):
            _root(str(tmp_path / name))


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted", "actors"),
    [
        *((8, 0, None, 8), (8, 2, None, 2), (2, 0, 6, 6), (1, 1, None, 1), (2, 2, None, 2)),
        *((2, 8, None, 8), (16, 8, 1, 1), (10, 10, None, 10), (200, 0, None, 100)),
    ],
)
def test_actors_leave_cpus_for_decoding(
    cpus: int, gpus: int, wanted: int | None, actors: int
) -> None:
    resources = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    found = Actors.of(resources, wanted, 100, gpu=True)
    assert (found.count, found.on_gpus) == (actors, gpus > 0)
    assert found.count * found.cpus <= 0.6 * cpus + 1e-9
    assert 0 < found.task_cpus <= 1
    assert found.count * found.cpus + found.task_cpus <= cpus + 1e-9


ERRORS = {b"text": NotAnImage("no image"), b"unforeseen": ValueError("a fault")}


def test_an_image_that_fails_is_a_row_of_the_spark_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def pixels(_: object, content: bytes) -> bytes:
        if content in ERRORS:
            raise ERRORS[content]
        return content

    def results(_: object, decoded: list[bytes]) -> Iterator[dict[str, Any] | Exception]:
        for one in decoded:
            label = {"label": one.decode(), "probability": 1.0}
            yield ValueError("not finite") if one == b"infinite" else {"predictions": [label]}

    new = {"__init__": lambda *_: None}
    stages = SimpleNamespace(
        Choices=MagicMock(),
        Classifier=type("Classifier", (), new | {"results": results}),
        Decoder=type("Decoder", (), new | {"pixels": pixels}),
    )
    for name in ("", ".ml", ".ml.functions", ".sql", ".sql.types"):
        monkeypatch.setitem(sys.modules, f"pyspark{name}", MagicMock())
    monkeypatch.setitem(sys.modules, "batch.stages", stages)
    monkeypatch.setattr(sys, "path", sys.path[:])
    page = Path(__file__).parents[2].joinpath("docs", "use", "spark.md").read_text("utf-8")
    program = page.partition("```python\n")[2].partition("\nspark = ")[0]
    namespace: dict[str, Any] = {}
    exec(program, namespace)  # this repository's own page
    rows = namespace["make_predict"]()([b"cat", *ERRORS, b"infinite", b"dog"])
    assert [list(row["labels"]) for row in rows] == [["cat"], [], [], [], ["dog"]]
    assert [row["error"] for row in rows] == [
        *("", "NotAnImage: no image", "InternalError: a fault", "InternalError: not finite", "")
    ]


@pytest.mark.parametrize("folder", ["/var/tmp/" + "a" * 25, "/var/tmp/prüfung"])
def test_a_temporary_folder_that_ray_cannot_use_is_not_used(folder: str) -> None:
    assert cluster._plain("/var/tmp/a folder") == "/var/tmp/a folder"
    assert cluster._plain(folder) == "/tmp"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "part"
    storage.write(storage.place(str(file)), b"first")
    with pytest.raises(TypeError):
        storage.write(storage.place(str(file)), "no bytes")
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [
        ("part", b"first")
    ]
