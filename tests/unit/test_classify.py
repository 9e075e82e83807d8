"""The command `classify`, in process, with a small HTTP server that answers as the service does.

Only a kill, Ctrl-C and a full device need a process.
"""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classification_client import Client
from classification_client.command import start
from tests.unit import test_client

LABELS = ("tabby", "tiger cat", "lynx", "fox", "dog")
VERSION = "1.0-untrained+0123abcd"
WARNING = "The model has untrained random weights."
PROGRAM = (
    # A terminal's program takes Ctrl-C; one in a script's background is started to ignore it.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from classification_client.command import start; start()"
)


class Service(test_client.Server):
    """Rejects what holds "broken" and classifies everything else.

    Attributes:
        images: how many images have arrived; `on_image` is called with it before each is answered.
        seconds: how long each takes.
        version: of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images, self.seconds, self.version = 0, 0.0, VERSION
        self.on_image: Callable[[int], object] = lambda _: None
        self.url = f"http://127.0.0.1:{self.server_port}/predictions/cats"
        self._lock = threading.Lock()

    def response(
        self, _act: int | str, path: str, body: bytes, /
    ) -> tuple[int, dict[str, str], bytes]:
        status, answer = self.answer(path, body)
        model = {"x-model-name": "cats", "x-model-version": self.version}
        return status, model if path == "/predictions/cats" else {}, json.dumps(answer).encode()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path != "/predictions/cats":
            return (200, {"up": 1}) if path == "/metrics" else (404, {"message": "Model not found"})
        if not body:
            return 400, {"type": "MissingImage", "message": "There is no image."}
        with self._lock:
            self.images += 1
            self.on_image(self.images)
        time.sleep(self.seconds)
        if b"broken" in body:
            return 415, {"type": "NotAnImage", "message": "The bytes are not an image."}
        topk = re.search(rb'name="topk"\r\n\r\n(\d+)', body)
        predictions = [
            {"label": label, "probability": 0.5 / (n + 1), "class_id": f"n{n}", "class_index": n}
            for n, label in enumerate(LABELS[: int(topk[1]) if topk else None])
        ]
        answer = {"predictions": predictions, "recognized": b"threshold" not in body}
        if b'name="embedding"' in body and (number := re.search(rb"image (\d+)", body)):
            return 200, answer | {"embedding": [int(number[1]), 0.5]}
        return 200, answer | {"warning": WARNING}


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        yield service
        service.shutdown()


@dataclass(frozen=True)
class Result:
    """Exit status, standard output, and standard error with each white space as one space."""

    status: int
    printed: str
    errors: str


def rows_of(text: str) -> dict[str, dict[str, Any]]:
    """Return the rows of JSON lines or CSV by file name; fail if a file has two."""
    rows: list[dict[str, Any]] = (
        [json.loads(line) for line in text.splitlines()]
        if text.startswith("{")
        else list(csv.DictReader(io.StringIO(text, newline="")))
    )
    by_name = {Path(row["picture"]).name: row for row in rows}
    assert len(by_name) == len(rows)
    return by_name


def rows_in(output: Path) -> dict[str, dict[str, Any]]:
    return rows_of(output.read_bytes().decode(errors="surrogateescape"))


@dataclass(frozen=True)
class Classify:
    """The command, for the service unless another address is given."""

    service: Service
    monkeypatch: pytest.MonkeyPatch
    captured: pytest.CaptureFixture[bytes]

    def __call__(self, *arguments: object, stdin: bytes = b"") -> Result:
        self.monkeypatch.setattr(sys, "argv", ["classify", *map(str, arguments)])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exited:
            start()
        printed, errors = self.captured.readouterr()
        assert b"Traceback" not in errors
        assert b"\x1b" not in printed + errors
        assert isinstance(exited.value.code, int)
        text = printed.decode(errors="surrogateescape")
        return Result(exited.value.code, text, " ".join(errors.decode().split()))


@pytest.fixture
def classify(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> Classify:
    monkeypatch.setenv("CLASSIFY_URL", service.url)
    return Classify(service, monkeypatch, capsysbinary)


def write_images(folder: Path, count: int = 0) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.jpg").write_bytes(b"image %d" % number)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one in a folder below, a broken and an empty one, and another file."""
    place = tmp_path / "images"
    for name in ("a.jpg", "sub/c.jpeg", "d,\u00e9\u2603.jpg"):
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(b"image")
    for name, content in (("broken.jpg", b"broken"), ("empty.jpg", b""), ("notes.txt", b"text")):
        (place / name).write_bytes(content)
    for path in place.rglob("*"):
        os.utime(path, (0, 0))  # a new one might still be being copied
    return place


def test_one_image_is_printed_as_the_tutorials_print_it(classify: Classify, folder: Path) -> None:
    for result in (classify(folder / "a.jpg"), classify("-", stdin=b"image")):
        assert (result.status, result.errors) == (0, WARNING)
        assert result.printed.startswith("1. tabby: 0.5000\n2. tiger cat: 0.2500\n3. lynx: 0.1667")
        assert result.printed.count("\n") == 5
    unsure = classify(folder / "a.jpg", "--threshold", "0.9", "--topk", "1")
    assert unsure.printed == "nothing recognized\n1. tabby: 0.5000\n"
    rejected = classify("-", stdin=b"broken")
    assert (rejected.status, rejected.printed) == (4, "")
    assert "-: The bytes are not an image." in rejected.errors


@pytest.mark.parametrize("format_", ["csv", "jsonl"])
def test_a_folder_becomes_rows_and_a_bad_image_fails_alone(
    format_: str, classify: Classify, folder: Path
) -> None:
    result = classify(folder, "--format", format_)
    rows = rows_of(result.printed)
    good = {"a.jpg", "c.jpeg", "d,\u00e9\u2603.jpg"}
    assert {name for name, row in rows.items() if row.get("label") == "tabby"} == good
    assert {name: row["error"] for name, row in rows.items() if name not in good} == {
        "broken.jpg": "The bytes are not an image.",
        "empty.jpg": "The image is empty: it has no bytes.",
    }
    assert result.status == 4
    assert "3 classified, 2 failed, 0 left" in result.errors
    assert "Skipped in the folders: 1 .txt." in result.errors
    assert rows_of(classify("-", "--format", format_, stdin=b"image").printed)["-"]
    for people in ("text", "table"):
        printed = classify(folder, "--format", people, "--topk", "2").printed
        assert [printed.count(text) for text in ("tabby", "0.5000", "tiger cat")] == [3] * 3
        assert printed.count("not classified: ") == 2


def test_a_wrong_argument_is_reported_and_nothing_is_sent(classify: Classify, folder: Path) -> None:
    classify.monkeypatch.chdir(folder)
    for arguments, status, message in (
        ("nowhere.jpg", 1, "no such file, folder, or match"),
        ("", 1, "There is no image here. Name files, folders, or patterns in quotes."),
        ("a.jpg --output results.txt", 1, "must end in .jsonl, .csv, .npy or .parquet"),
        ("- --output results.csv", 1, "has no name to go into a file"),
        ("a.jpg --at-once 0", 2, "greater than or equal to 1"),
        ("a.jpg --url foo", 1, "'foo' must be a whole address"),
    ):
        result = classify(*arguments.split())
        assert (result.status, classify.service.images) == (status, 0)
        assert message in result.errors


def test_a_wrong_address_stops_the_run_and_writes_no_result(
    classify: Classify, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    address = f"127.0.0.1:{classify.service.server_port}"
    for url, reason in (
        (f"http://{address}/predictions/nobody", "Model not found"),
        (f"http://{address}/metrics", "no image class"),
        (f"https://{address}/predictions/cats", "use http:// instead of https://"),
    ):
        for more in ((), ("--output", output)):
            result = classify(folder / "a.jpg", "--url", url, *more)
            assert result.status == 3
            assert "Stopped: " in result.errors
            assert reason in result.errors
            assert "Run the same command again" not in result.errors
    assert not output.exists()


def test_a_strange_name_has_one_row_and_cannot_write_to_the_terminal(
    classify: Classify, tmp_path: Path
) -> None:
    """`classify` looks for escape sequences in what is printed."""
    place, output = write_images(tmp_path / "images", 0), tmp_path / "results.csv"
    names = [b"icon\r.jpg", b"two\nlines.jpg", b'quote",.jpg', b"\xff.jpg", b"\x1b[2J.jpg"]
    for name in names:
        path = place / os.fsdecode(name)
        path.write_bytes(b"broken" if b"\x1b" in name else b"image")
        os.utime(path, (0, 0))
    assert classify(place, "--output", output).status == 4
    assert "5 of 5 are in" in classify(place, "--output", output).errors
    assert set(rows_in(output)) == set(map(os.fsdecode, names))
    assert classify(place, "--format", "text").status == 4


def test_a_rerun_reports_earlier_results_and_rejects_another_model(
    classify: Classify, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    command = (folder, "--output", output, "--topk", "2")
    classify(*command)
    (folder / "new.jpg").write_bytes(b"image")
    again = classify(*command)
    assert again.status == 4
    assert "5 of 6 are in" in again.errors
    assert "4 classified, 2 failed, 0 left; 1 by this run" in again.errors
    assert "broken.jpg: The bytes are not an image" in again.errors
    before = output.read_text()
    row = rows_in(output)["a.jpg"]
    assert (row["model"], row["model_version"], row["warning"]) == ("cats", VERSION, WARNING)
    classify.service.version = "1.0+00000000"  # nothing is left to be classified
    other = classify(*command)
    assert (other.status, output.read_text()) == (1, before)
    assert f"was made with cats {VERSION} --topk 2, and this would be cats 1.0+0" in other.errors


def test_images_on_a_drive_that_goes_away_are_left_for_another_run(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "share", 50), tmp_path / "results.csv"
    away = tmp_path / "away"
    classify.service.on_image = lambda number: number == 10 and place.rename(away)
    result = classify(place, "--output", output)
    assert result.status == 3
    assert "cannot be read: its folder is missing or empty" in result.errors
    assert "Run the same command again" in result.errors
    assert 0 < len(rows_in(output)) < 50
    assert not any(row["error"] for row in rows_in(output).values())
    classify.service.on_image = lambda _: None
    away.rename(place)
    assert classify(place, "--output", output).status == 0
    assert len(rows_in(output)) == 50


@pytest.mark.parametrize(
    ("bad", "errors"),
    [
        (1, "14 classified, 1 failed, 1 left"),
        (15, "0 classified, 0 failed, 15 left; 0 by this run"),
    ],
)
def test_an_unreadable_image_fails_alone_and_an_unreadable_drive_stops_the_run(
    bad: int, errors: str, classify: Classify, tmp_path: Path
) -> None:
    place = write_images(tmp_path / "images", 15)
    for number in range(bad):
        (place / f"{number:03}.jpg").unlink()
        (place / f"{number:03}.jpg").symlink_to("/proc/self/mem")  # reading it is an input error
    classify.service.seconds = 0.1  # the others take longer than the bad one is retried
    result = classify(place, "--at-once", "2", "--patience", "0.8")
    assert result.status == 3
    assert errors in result.errors
    assert "cannot be read: Input/output error" in result.errors
    assert ("Stopped: " in result.errors) == (bad > 1)


def test_each_line_of_a_list_gets_a_row_even_if_the_image_is_missing(
    classify: Classify, folder: Path, tmp_path: Path
) -> None:
    names = ("d,\u00e9\u2603.jpg", "missing.jpg", "gone/a.jpg", "d,\u00e9\u2603.jpg")
    listing = "".join(f"{folder / name}\n" for name in names).encode()
    output = tmp_path / "results.jsonl"
    result = classify("--files-from", "-", "--output", output, stdin=listing)
    assert result.status == 3
    assert "1 classified, 2 failed, 1 left" in result.errors
    assert set(rows_in(output)) == {"d,\u00e9\u2603.jpg", "missing.jpg"}
    assert "cannot be read: No such file" in rows_in(output)["missing.jpg"]["error"]


def test_an_image_that_is_being_copied_is_read_again(service: Service, tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(b"broken: half an image")
    service.on_image = lambda number: number == 1 and copy.write_bytes(b"the whole image")
    with Client(service.url) as client:
        assert client.classify(copy).label == "tabby"
    assert service.images == 2


def test_embeddings_are_written_in_the_order_of_the_images(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "images", 20), tmp_path / "vectors.npy"
    result = classify(place, "--output", output)
    assert (result.status, result.errors[:20]) == (0, "20 embeddings are in")
    rows = np.load(output)
    assert rows["picture"].tolist() == [str(place / f"{n:03}.jpg") for n in range(20)]
    assert rows["embedding"][:, 0].tolist() == [*range(20)]


# --- In a process of its own ---


def program(service: Service, *arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments), "--url", service.url]


def test_a_full_device_is_reported(service: Service, folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = program(service, folder, "--format", "jsonl")
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, check=False, text=True
        )
    assert result.returncode == 1
    assert "The output cannot be written: No space left on device" in result.stderr
    assert "Exception ignored" not in result.stderr


def test_repeated_ctrl_c_keeps_the_results_and_shows_no_traceback(
    service: Service, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "images", 100), tmp_path / "a.jsonl"
    service.seconds = 0.02
    command = program(service, place, "--output", output)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        service.on_image = lambda number: process.send_signal(signal.SIGINT) if number == 30 else 0
        assert process.stderr is not None
        errors = ""
        for line in process.stderr:
            errors += line
            while "Stopped by Ctrl-C" in line and process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.001)
    assert process.returncode == 130
    assert "Run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert 0 < len(rows_in(output)) < 100
