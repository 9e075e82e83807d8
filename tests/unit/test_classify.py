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
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from classification_client import Client
from classification_client.command import start
from scripts import classify as classify_here
from scripts.serve.running import Ports, Running, unused_ports
from scripts.state import remember, started
from scripts.terminal import command
from tests.unit import test_client

LABELS = ("tabby", "tiger cat", "lynx", "fox", "dog")
VERSION = "1.0-untrained+0123abcd"
WARNING = "The model has untrained random weights."
PROGRAM = (
    # A terminal's program takes Ctrl-C; one in a script's background is started to ignore it.
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


class Service(test_client.Server):
    """Rejects what holds "broken" and classifies everything else.

    Attributes:
        images: how many images have arrived.
        on_image: called with that number before each is answered.
        seconds: how long each takes.
        version: of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = Answers
        self.images = 0
        self.on_image: Callable[[int], object] = lambda _: None
        self.seconds = 0.0
        self.version = VERSION
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
            return 415, {"type": "NotAnImage", "message": "The bytes are not a picture."}
        topk = re.search(rb'name="topk"\r\n\r\n(\d+)', body)
        predictions = [
            {"label": label, "probability": 0.5 / (n + 1), "class_id": f"n{n}", "class_index": n}
            for n, label in enumerate(LABELS[: int(topk[1]) if topk else None])
        ]
        recognized = b"threshold" not in body
        return 200, {"predictions": predictions, "recognized": recognized, "warning": WARNING}


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


Rows = dict[str, dict[str, Any]]


def rows_of(text: str) -> Rows:
    """The rows of JSON lines or CSV by the names of the files; fails if a file has two."""
    rows: list[dict[str, Any]] = (
        [json.loads(line) for line in text.splitlines()]
        if text.startswith("{")
        else list(csv.DictReader(io.StringIO(text, newline="")))
    )
    by_name = {Path(row["picture"]).name: row for row in rows}
    assert len(by_name) == len(rows)
    return by_name


def rows_in(output: Path) -> Rows:
    return rows_of(output.read_bytes().decode(errors="surrogateescape"))


Ends = Callable[[Callable[[], object]], Result]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Ends:
    """Runs a program in this process until it exits."""

    def run(program: Callable[[], object]) -> Result:
        with pytest.raises(SystemExit) as ended:
            program()
        printed, said = capsysbinary.readouterr()
        assert b"Traceback" not in said
        assert b"\x1b" not in printed + said
        assert isinstance(ended.value.code, int)
        text = printed.decode(errors="surrogateescape")
        return Result(ended.value.code, text, " ".join(said.decode().split()))

    monkeypatch.delenv("GIVEN_TO", raising=False)
    return run


@dataclass(frozen=True)
class Classify:
    """The command, for the service unless another address is given."""

    service: Service
    ends: Ends
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, *arguments: object, stdin: bytes = b"") -> Result:
        self.monkeypatch.setattr(sys, "argv", ["classify", *map(str, arguments)])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return self.ends(start)


@pytest.fixture
def classify(service: Service, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> Classify:
    monkeypatch.setenv("CLASSIFY_URL", service.url)
    return Classify(service, ends, monkeypatch)


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.jpg").write_bytes(b"image %d" % number)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, one in a folder below, a broken and an empty one, and other files."""
    place = tmp_path / "images"
    for name in ("a.jpg", "b [1].JPG", "sub/c.jpeg", "d,\u00e9\u2603.jpg", ".thumbnails/a.jpg"):
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(b"image")
    (place / "broken.jpg").write_bytes(b"broken")
    (place / "empty.jpg").touch()
    (place / "notes.txt").write_text("not for the model")
    return place


def test_one_image_is_printed_as_the_tutorials_print_it(classify: Classify, folder: Path) -> None:
    for result in (classify(folder / "a.jpg"), classify("-", stdin=b"image")):
        assert (result.status, result.said) == (0, WARNING)
        assert result.printed.startswith(
            "1. tabby: 0.5000\n2. tiger cat: 0.2500\n3. lynx: 0.1667\n"
        )
        assert result.printed.count("\n") == 5
    unsure = classify(folder / "a.jpg", "--threshold", "0.9", "--topk", "1")
    assert unsure.printed == "nothing recognised\n1. tabby: 0.5000\n"


@pytest.mark.parametrize("format_", ["csv", "jsonl"])
def test_an_image_on_standard_input_is_a_row(format_: str, classify: Classify) -> None:
    result = classify("-", "--format", format_, stdin=b"image")
    assert (result.status, result.said) == (0, WARNING)
    assert rows_of(result.printed)["-"]["label"] == "tabby"
    refused = classify("-", "--format", format_, stdin=b"broken")
    assert (refused.status, refused.said) == (4, "Refused: The bytes are not a picture.")


def test_a_folder_becomes_rows_and_a_bad_image_fails_alone(
    classify: Classify, folder: Path
) -> None:
    result = classify(folder, "--format", "jsonl")
    rows = rows_of(result.printed)
    good = {"a.jpg", "b [1].JPG", "c.jpeg", "d,\u00e9\u2603.jpg"}
    assert {name for name, row in rows.items() if row.get("label") == "tabby"} == good
    assert {name: row["error"] for name, row in rows.items() if name not in good} == {
        "broken.jpg": "The bytes are not a picture.",
        "empty.jpg": "The picture is empty: it has no bytes.",
    }
    assert rows["a.jpg"]["picture"] == str(folder / "a.jpg")
    assert len(rows["a.jpg"]["predictions"]) == len(LABELS)
    assert result.status == 4
    assert "4 classified, 2 refused or failed, 0 left" in result.said
    assert "Left out of the folders: 1 not called as pictures (1 .txt), 1 hidden." in result.said


def test_csv_on_standard_output_is_complete(classify: Classify, folder: Path) -> None:
    rows = rows_of(classify(folder, "--format", "csv", "--topk", "3").printed)
    assert len(rows) == 6
    assert "not a picture" in rows["broken.jpg"]["error"]
    row = rows["a.jpg"]
    assert row["warning"] == WARNING
    for n, (suffix, label) in enumerate(zip(("", "_2", "_3"), LABELS, strict=False)):
        assert (row[f"label{suffix}"], row[f"class_id{suffix}"]) == (label, f"n{n}")
        assert float(row[f"probability{suffix}"]) == 0.5 / (n + 1)


@pytest.mark.parametrize("format_", ["text", "table"])
def test_output_for_people_has_every_label_and_every_rejection(
    format_: str, classify: Classify, folder: Path
) -> None:
    printed = classify(folder, "--format", format_, "--topk", "3").printed
    for text in ("tabby", "0.5000", "tiger cat", "0.2500", "lynx", "0.1667"):
        assert printed.count(text) == 4
    assert printed.count("not classified: ") == 2


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("nowhere.jpg", 1, "no such file, folder, or match"),
        ("", 1, "There is no picture here"),
        ("a.jpg --output results.txt", 1, "must end in .jsonl or .csv"),
        ("- --output results.csv", 1, "has no name to go into a file"),
        ("a.jpg --at-once 0", 2, "greater than or equal to 1"),
        ("a.jpg --format csv --topk 5001", 1, "no more than 5000 labels"),
        ("a.jpg --output precious.csv", 1, "something else"),
        ("a.jpg --url foo", 1, "'foo' must be a whole address with http:// or https://"),
        ("a.jpg --url 127.0.0.1:8080/a", 1, "'127.0.0.1:8080/a' must be a whole address"),
        ("a.jpg --url http://", 1, "such as http://127.0.0.1:8080/predictions/densenet121"),
        ("a.jpg --url ftp://host/x", 1, "'ftp://host/x' must be"),
        ("a.jpg --url http://a:b", 1, "'http://a:b' is no address"),
    ],
)
def test_mistakes_are_reported_and_nothing_is_sent(
    arguments: str, status: int, message: str, classify: Classify
) -> None:
    Path("precious.csv").write_text("name,price\nhouse,1\n")
    result = classify(*arguments.split())
    assert result.status == status
    assert message in result.said
    assert classify.service.images == 0
    assert Path("precious.csv").read_text() == "name,price\nhouse,1\n"


def test_a_server_that_is_not_there_is_given_up(classify: Classify, folder: Path) -> None:
    url = f"http://127.0.0.1:{unused_ports(1)[0]}/predictions/cats"
    result = classify(folder / "a.jpg", "--patience", "0.2", "--url", url)
    assert result.status == 3
    assert "gave no answer" in result.said


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/predictions/nobody", "Model not found"), ("/metrics", "no image classification service")],
)
def test_a_wrong_address_is_no_images_result(
    path: str, reason: str, classify: Classify, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    wrong = f"http://127.0.0.1:{classify.service.server_port}{path}"
    for more in ((), ("--output", output)):
        result = classify(folder / "a.jpg", "--url", wrong, *more)
        assert result.status == 3
        assert "Stopped: " in result.said
        assert reason in result.said
    assert output.read_text() == ""
    assert classify(folder / "a.jpg", "--output", output).status == 0
    assert set(rows_in(output)) == {"a.jpg"}


def test_an_image_larger_than_the_limit_is_not_sent(classify: Classify, tmp_path: Path) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(21_000_000)
    result = classify(tmp_path)
    assert result.status == 4
    assert "more than the 20 accepted" in result.said
    assert classify.service.images == 0


def test_a_strange_name_has_one_row_and_cannot_write_to_the_terminal(
    classify: Classify, tmp_path: Path
) -> None:
    """`ends` looks for escape sequences in what is printed."""
    place = write_images(tmp_path / "images", 0)
    names = [b"icon\r.jpg", b"two\nlines.jpg", b'quote",.jpg', b"\xff.jpg", b"\x1b[2J.jpg"]
    for name in names:
        (place / os.fsdecode(name)).write_bytes(b"broken" if b"\x1b" in name else b"image")
    for suffix in ("csv", "jsonl"):
        output = tmp_path / f"results.{suffix}"
        assert classify(place, "--output", output).status == 4
        again = classify(place, "--output", output)
        assert again.status == 4
        assert "5 of 5 are in" in again.said
        assert set(rows_in(output)) == set(map(os.fsdecode, names))
    assert classify(place, "--format", "text").status == 4


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_rerun_reports_earlier_results_and_rejects_other_options_or_another_model(
    suffix: str, classify: Classify, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"results.{suffix}"
    command = (folder, "--output", output, "--topk")
    classify(*command, "2")
    (folder / "new.jpg").write_bytes(b"image")
    again = classify(*command, "2")
    assert again.status == 4
    assert "6 of 7 are in" in again.said
    assert f"already: 4 classified, 2 refused, by cats {VERSION}" in again.said
    assert "1 classified, 0 refused or failed, 0 left" in again.said
    assert "with earlier runs: 5 classified, 2 refused" in again.said
    assert "broken.jpg: The bytes are not a picture" in again.said
    before = output.read_text()
    row = rows_in(output)["a.jpg"]
    assert (row["model"], row["model_version"], row["warning"]) == ("cats", VERSION, WARNING)
    classify.service.version = "1.0+00000000"  # nothing is left to be classified
    for options, words in (
        (["3"], "was made with --topk 2, and this would be --topk 3"),
        (["2", "--threshold", "0.5"], "no --threshold, and this would be --threshold 0.5"),
        (["2"], f"was made with cats {VERSION}, and this would be cats 1.0+00000000"),
    ):
        result = classify(*command, *options)
        assert (result.status, output.read_text()) == (1, before)
        assert words in result.said
        assert "name another --output" in result.said


def test_a_drive_that_is_gone_for_a_moment_is_waited_for(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "share", 100), tmp_path / "results.jsonl"

    def back() -> None:
        place.rmdir()
        (tmp_path / "away").rename(place)

    def gone(number: int) -> None:
        if number == 10:
            place.rename(tmp_path / "away")
            place.mkdir()  # what is left where a drive was mounted
            threading.Timer(0.5, back).start()

    classify.service.on_image = gone
    result = classify(place, "--output", output)
    assert result.status == 0
    assert "100 classified, 0 refused" in result.said
    assert len(rows_in(output)) == 100


def test_a_drive_that_stays_away_stops_the_run_and_is_no_images_result(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "share", 50), tmp_path / "results.csv"
    away = tmp_path / "away"
    classify.service.on_image = lambda number: number == 10 and place.rename(away)
    result = classify(place, "--output", output, "--patience", "0.5")
    assert result.status == 3
    assert re.search(r"Stopped: .*/\d+\.jpg cannot be read, however often", result.said)
    assert f"its folder {place} is not there" in result.said
    assert "Run the same command to go on" in result.said
    assert 0 < len(rows_in(output)) < 50
    assert not any(row["error"] for row in rows_in(output).values())
    classify.service.on_image = lambda _: None
    away.rename(place)
    assert classify(place, "--output", output).status == 0
    assert len(rows_in(output)) == 50


def test_an_image_on_a_bad_spot_of_the_drive_stops_no_other(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "images", 15), tmp_path / "results.jsonl"
    (place / "000.jpg").unlink()
    (place / "000.jpg").symlink_to("/proc/self/mem")  # reading it is an input error
    classify.service.seconds = 0.1  # the others take longer than the bad one is tried for
    command = (place, "--output", output, "--at-once", "2")
    result = classify(*command, "--patience", "0.5")
    assert result.status == 3
    assert "14 classified, 1 refused or failed, 1 left" in result.said
    assert "000.jpg: cannot be read: Input/output error" in result.said
    assert len(rows_in(output)) == 14
    (place / "000.jpg").unlink()
    (place / "000.jpg").write_bytes(b"image")
    assert classify(*command).status == 0
    assert len(rows_in(output)) == 15


def test_a_list_is_answered_line_by_line_whatever_is_missing(
    classify: Classify, folder: Path, tmp_path: Path
) -> None:
    names = ("d,\u00e9\u2603.jpg", "missing.jpg", "gone/a.jpg", "d,\u00e9\u2603.jpg")
    listing = "".join(f"{folder / name}\n" for name in names).encode()
    output = tmp_path / "results.jsonl"
    result = classify("--files-from", "-", "--output", output, stdin=listing)
    assert result.status == 3
    assert "1 classified, 2 refused or failed, 1 left" in result.said
    assert set(rows_in(output)) == {"d,\u00e9\u2603.jpg", "missing.jpg"}
    assert "cannot be read: No such file" in rows_in(output)["missing.jpg"]["error"]


def test_a_results_file_that_cannot_be_written_any_more_stops_the_run(
    classify: Classify, tmp_path: Path
) -> None:
    place, output = write_images(tmp_path / "images", 100), tmp_path / "results.csv"
    classify.service.on_image = lambda number: output.unlink() if number == 20 else None
    result = classify(place, "--output", output)
    assert result.status == 3
    assert "Stopped: " in result.said
    assert "moved or deleted" in result.said
    assert "Run the same command" not in result.said


def test_an_image_that_is_being_copied_is_waited_for(service: Service, tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(b"broken: half an image")
    service.on_image = lambda number: number == 1 and copy.write_bytes(b"the whole image")
    with Client(service.url) as client:
        assert client.classify(copy).label == "tabby"
    assert service.images == 2


# --- In a process of its own ---


def program(service: Service, *arguments: object) -> list[str]:
    module = "classification_client"
    return [sys.executable, "-c", PROGRAM, module, *map(str, arguments), "--url", service.url]


def test_a_killed_run_resumes(classify: Classify, tmp_path: Path) -> None:
    place, output = write_images(tmp_path / "images", 200), tmp_path / "results.jsonl"
    with subprocess.Popen(program(classify.service, place, "--output", output)) as first:
        classify.service.on_image = lambda number: first.kill() if number == 60 else None
        assert first.wait(60) == -signal.SIGKILL
    classify.service.on_image = lambda _: None
    kept = output.read_text().count("\n")
    assert 0 < kept < 200
    with output.open("a") as file:
        file.write('{"picture": "')  # as if cut off
    second = classify(place, "--output", output)
    assert second.status == 0
    assert f"{kept} of 200 are in" in second.said
    assert f"already: {kept} classified, 0 refused" in second.said
    assert "with earlier runs: 200 classified, 0 refused" in second.said
    third = classify(place, "--output", output)
    assert (third.status, third.said[:14]) == (0, "200 of 200 are")
    assert len(rows_in(output)) == 200


@pytest.mark.parametrize("format_", ["text", "table", "csv", "jsonl"])
def test_results_that_cannot_be_printed_are_reported(
    format_: str, service: Service, folder: Path
) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            program(service, folder, "--format", format_),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
        )
    assert result.returncode in {1, 3}
    assert "Standard output cannot be written: No space left on device" in result.stderr
    assert "Exception ignored" not in result.stderr


# --- As make runs it ---


@pytest.fixture
def house(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose running server, as far as it remembers, is the service in this process."""
    running = Running(
        *(os.getpid(), started(os.getpid()), str(tmp_path)),
        ports=Ports(inference=service.server_port),
        models={"cats": ""},
        model="cats",
    )
    (tmp_path / ".run").mkdir()
    remember(tmp_path / ".run" / "server.json", asdict(running))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_repeated_ctrl_c_keeps_the_results_and_shows_no_traceback(
    service: Service, house: Path
) -> None:
    write_images(house / "images", 100)
    service.seconds = 0.02
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "scripts.classify"],
        env=os.environ
        | {"GIVEN_IMAGES": "images", "GIVEN_OUTPUT": "a.jsonl"}
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        service.on_image = lambda number: process.send_signal(signal.SIGINT) if number == 30 else 0
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            while "Stopped by Ctrl-C" in line and process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.001)
    assert process.returncode == 130
    assert "Run the same command again to go on" in said
    assert "Traceback" not in said
    assert 0 < len(rows_in(house / "a.jsonl")) < 100


def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    code = "import scripts; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.stderr == b"Stopped by Ctrl-C.\n"


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize(
    ("module", "variables", "message"),
    [
        ("classify", {}, "Name it: make classify IMAGE=cat.jpg"),
        ("classify", {"IMAGE": "nowhere.jpg"}, "nowhere.jpg: there is no such file"),
        ("classify", {"IMAGE": "it's.jpg x.jpg"}, "a quote without an end"),
        ("classify", {"TOPK": "0"}, "TOPK must be greater than or equal to 1, got '0'."),
        ("classify", {"TOPK": "many"}, "TOPK must be a valid integer"),
        ("classify", {"FORMAT": "xml"}, "FORMAT"),
        ("classify", {"OUTPUT": "a.txt"}, "a.txt must end in .jsonl or .csv"),
        ("classify", {"MODEL": "dogs"}, "does not serve 'dogs'. It serves: cats."),
        ("evaluate", {}, "make evaluate IMAGES=folder"),
        ("evaluate", {"IMAGES": "a b"}, "One folder is needed"),
    ],
)
def test_mistakes_in_makes_variables_are_reported_in_makes_words(
    module: str,
    variables: dict[str, str],
    message: str,
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [module])
    monkeypatch.setenv("GIVEN_TO", f"make {module}")
    for name, value in variables.items():
        monkeypatch.setenv(f"GIVEN_{name}", value)
    result = ends(lambda: command(import_module(f"scripts.{module}").main))
    assert result.status in {1, 2}
    assert message in result.said
    assert "--" not in result.said
    assert "Usage" not in result.said


def test_makes_variables_reach_the_server(
    house: Path, service: Service, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(house / "my cats", 2)
    given = {"IMAGES": "my cats", "MODEL": "cats", "FORMAT": "text", "TOPK": 1, "THRESHOLD": 0.9}
    monkeypatch.setattr(sys, "argv", ["classify"])
    for name, value in given.items():
        monkeypatch.setenv(f"GIVEN_{name}", str(value))
    result = ends(lambda: command(classify_here.main))
    assert result.status == 0
    assert result.printed.count("nothing recognised\n1. tabby: 0.5000\n") == service.images == 2
