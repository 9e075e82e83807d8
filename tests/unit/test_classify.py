"""The command `classify`, in process, against a small HTTP server that answers as the service does.

What only a process of its own can show (a kill, Ctrl-C, a full device) starts one.
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
        self.RequestHandlerClass = Answers
        self.images, self.seconds, self.version = 0, 0.0, VERSION
        self.on_image: Callable[[int], object] = lambda _: None
        self.url = f"http://127.0.0.1:{self.server_port}/predictions/cats"
        self._lock = threading.Lock()

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


class Answers(test_client.Answers):
    server: Service
    wbufsize = -1

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        if self.path == "/predictions/cats":
            self.send_header("x-model-name", "cats")
            self.send_header("x-model-version", self.server.version)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        yield service
        service.shutdown()


@dataclass(frozen=True)
class Result:
    """Exit status, standard output, and standard error with each white space as one blank."""

    status: int
    printed: str
    said: str


def rows_of(text: str) -> dict[str, dict[str, Any]]:
    """The rows of JSON lines or CSV by the names of the files; fails if a file has two."""
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
        printed, said = self.captured.readouterr()
        assert b"Traceback" not in said
        assert b"\x1b" not in printed + said
        assert isinstance(exited.value.code, int)
        text = printed.decode(errors="surrogateescape")
        return Result(exited.value.code, text, " ".join(said.decode().split()))


@pytest.fixture
def classify(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> Classify:
    monkeypatch.setenv("CLASSIFY_URL", service.url)
    return Classify(service, monkeypatch, capsysbinary)


def write_images(folder: Path, count: int) -> Path:
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
        os.utime(place / name, (0, 0))  # a new one might still be being copied
    return place


def test_one_image_is_printed_as_the_tutorials_print_it(classify: Classify, folder: Path) -> None:
    for result in (classify(folder / "a.jpg"), classify("-", stdin=b"image")):
        assert (result.status, result.said) == (0, WARNING)
        assert result.printed.startswith("1. tabby: 0.5000\n2. tiger cat: 0.2500\n3. lynx: 0.1667")
        assert result.printed.count("\n") == 5
    unsure = classify(folder / "a.jpg", "--threshold", "0.9", "--topk", "1")
    assert unsure.printed == "nothing recognized\n1. tabby: 0.5000\n"


@pytest.mark.parametrize("format_", ["csv", "jsonl"])
def test_an_image_on_standard_input_is_a_row(format_: str, classify: Classify) -> None:
    result = classify("-", "--format", format_, stdin=b"image")
    assert rows_of(result.printed)["-"]["label"] == "tabby"
    rejected = classify("-", stdin=b"broken")
    assert (rejected.status, rejected.printed) == (4, "")
    assert "-: The bytes are not an image." in rejected.said


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
    assert "3 classified, 2 failed, 0 left" in result.said
    assert "Skipped in the folders: 1 .txt." in result.said


@pytest.mark.parametrize("format_", ["text", "table"])
def test_output_for_people_has_every_label_and_every_rejection(
    format_: str, classify: Classify, folder: Path
) -> None:
    printed = classify(folder, "--format", format_, "--topk", "2").printed
    for text in ("tabby", "0.5000", "tiger cat", "0.2500"):
        assert printed.count(text) == 3
    assert printed.count("not classified: ") == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("nowhere.jpg", 1, "no such file, folder, or match"),
        ("", 1, "There is no image here. Name files, folders, or patterns in quotes."),
        ("a.jpg --output results.txt", 1, "must end in .jsonl, .csv, .npy or .parquet"),
        ("- --output results.csv", 1, "has no name to go into a file"),
        ("a.jpg --at-once 0", 2, "greater than or equal to 1"),
        ("a.jpg --output precious.csv", 1, "does not hold results of this command"),
        ("a.jpg --url foo", 1, "'foo' must be a whole address"),
    ],
)
def test_mistakes_are_reported_and_nothing_is_sent(
    arguments: str, status: int, message: str, classify: Classify, folder: Path
) -> None:
    classify.monkeypatch.chdir(folder)
    Path("precious.csv").write_text("name,price\nhouse,1\n")
    result = classify(*arguments.split())
    assert result.status == status
    assert message in result.said
    assert classify.service.images == 0


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/predictions/nobody", "Model not found"), ("/metrics", "no image classification service")],
)
def test_a_wrong_address_is_no_images_result(
    path: str, reason: str, classify: Classify, folder: Path, tmp_path: Path
) -> None:
    wrong = f"http://127.0.0.1:{classify.service.server_port}{path}"
    for more in ((), ("--output", tmp_path / "results.jsonl")):
        result = classify(folder / "a.jpg", "--url", wrong, *more)
        assert result.status == 3
        assert "Stopped: " in result.said
        assert reason in result.said
    assert not (tmp_path / "results.jsonl").exists()


def test_a_strange_name_has_one_row_and_cannot_write_to_the_terminal(
    classify: Classify, tmp_path: Path
) -> None:
    """`classify` looks for escape sequences in what is printed."""
    place, output = write_images(tmp_path / "images", 0), tmp_path / "results.csv"
    names = [b"icon\r.jpg", b"two\nlines.jpg", b'quote",.jpg', b"\xff.jpg", b"\x1b[2J.jpg"]
    for name in names:
        (place / os.fsdecode(name)).write_bytes(b"broken" if b"\x1b" in name else b"image")
    assert classify(place, "--output", output).status == 4
    assert "5 of 5 are in" in classify(place, "--output", output).said
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
    assert "5 of 6 are in" in again.said
    assert "4 classified, 2 failed, 0 left; 1 by this run" in again.said
    assert "broken.jpg: The bytes are not an image" in again.said
    before = output.read_text()
    row = rows_in(output)["a.jpg"]
    assert (row["model"], row["model_version"], row["warning"]) == ("cats", VERSION, WARNING)
    classify.service.version = "1.0+00000000"  # nothing is left to be classified
    other = classify(*command)
    assert (other.status, output.read_text()) == (1, before)
    assert f"was made with cats {VERSION} --topk 2, and this would be cats 1.0+0" in other.said


def test_images_on_a_drive_that_goes_away_are_left_for_another_run(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "share", 50), tmp_path / "results.csv"
    away = tmp_path / "away"
    classify.service.on_image = lambda number: number == 10 and place.rename(away)
    result = classify(place, "--output", output)
    assert result.status == 3
    assert "cannot be read: its folder is missing or empty" in result.said
    assert "Run the same command again" in result.said
    assert 0 < len(rows_in(output)) < 50
    assert not any(row["error"] for row in rows_in(output).values())
    classify.service.on_image = lambda _: None
    away.rename(place)
    assert classify(place, "--output", output).status == 0
    assert len(rows_in(output)) == 50


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (1, "14 classified, 1 failed, 1 left"),
        (15, "0 classified, 0 failed, 15 left; 0 by this run"),
    ],
)
def test_an_image_on_a_bad_spot_stops_no_other_and_a_bad_drive_stops_the_run(
    bad: int, said: str, classify: Classify, tmp_path: Path
) -> None:
    place = write_images(tmp_path / "images", 15)
    for number in range(bad):
        (place / f"{number:03}.jpg").unlink()
        (place / f"{number:03}.jpg").symlink_to("/proc/self/mem")  # reading it is an input error
    classify.service.seconds = 0.1  # the others take longer than the bad one is retried
    result = classify(place, "--at-once", "2", "--patience", "0.5")
    assert result.status == 3
    assert said in result.said
    assert "cannot be read: Input/output error" in result.said
    assert ("Stopped: " in result.said) == (bad > 1)


def test_a_list_is_answered_line_by_line_whatever_is_missing(
    classify: Classify, folder: Path, tmp_path: Path
) -> None:
    names = ("d,\u00e9\u2603.jpg", "missing.jpg", "gone/a.jpg", "d,\u00e9\u2603.jpg")
    listing = "".join(f"{folder / name}\n" for name in names).encode()
    output = tmp_path / "results.jsonl"
    result = classify("--files-from", "-", "--output", output, stdin=listing)
    assert result.status == 3
    assert "1 classified, 2 failed, 1 left" in result.said
    assert set(rows_in(output)) == {"d,\u00e9\u2603.jpg", "missing.jpg"}
    assert "cannot be read: No such file" in rows_in(output)["missing.jpg"]["error"]


def test_an_image_that_is_being_copied_is_waited_for(service: Service, tmp_path: Path) -> None:
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
    assert (result.status, result.said[:20]) == (0, "20 embeddings are in")
    rows = np.load(output)
    assert rows["picture"].tolist() == [str(place / f"{n:03}.jpg") for n in range(20)]
    assert rows["embedding"][:, 0].tolist() == [*range(20)]


# --- In a process of its own ---


def program(service: Service, *arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments), "--url", service.url]


def test_a_killed_run_resumes(classify: Classify, tmp_path: Path) -> None:
    place, output = write_images(tmp_path / "images", 200), tmp_path / "results.jsonl"
    with subprocess.Popen(program(classify.service, place, "--output", output)) as first:
        classify.service.on_image = lambda number: first.kill() if number == 60 else None
        assert first.wait(60) == -signal.SIGKILL
    classify.service.on_image = lambda _: None
    kept = output.read_text().count("\n")
    assert 0 < kept < 200
    second = classify(place, "--output", output)
    assert second.status == 0
    assert f"{kept} of 200 are in" in second.said
    assert f"200 classified, 0 failed, 0 left; {200 - kept} by this run" in second.said
    assert len(rows_in(output)) == 200


@pytest.mark.parametrize("format_", ["text", "jsonl"])
def test_results_that_cannot_be_printed_are_reported(
    format_: str, service: Service, folder: Path
) -> None:
    command = program(service, folder, "--format", format_)
    with Path("/dev/full").open("wb") as full:
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
        said = ""
        for line in process.stderr:
            said += line
            while "Stopped by Ctrl-C" in line and process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.001)
    assert process.returncode == 130
    assert "Run the same command again to resume" in said
    assert "Traceback" not in said
    assert 0 < len(rows_in(output)) < 100
