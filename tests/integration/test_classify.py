"""The client and its command, with pictures by the thousand and a server that goes away."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from requests.adapters import HTTPAdapter

from classification_client import (
    Classification,
    Client,
    RefusedError,
    RequestOptions,
    UnavailableError,
)
from classification_client.results import Row, classify_all
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.samples import CAT
from scripts.serve.running import Running, find_running, free_ports
from scripts.serve.server import start, stop

THOUSANDS = 2000
CLASSIFY = (sys.executable, "-m", "classification_client")


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*CLASSIFY, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=200,
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
    )


def picture(number: int) -> bytes:
    """A small JPEG that is like no other."""
    colours = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(colours).resize((96, 96)).save(encoded, "JPEG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good pictures, one in a folder below, one bad one, and what is no picture."""
    place = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("a.jpg", "b [1].JPG", "sub/c.jpeg", "d,\u00e9\u2603.jpg")):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(picture(number))
    (place / "broken.jpg").write_bytes(b"no picture at all, but called one" * 10)
    (place / "notes.txt").write_text("not for the model")
    (place / ".thumbnails").mkdir()
    (place / ".thumbnails" / "a.jpg").write_bytes(picture(0))
    return place


def test_one_picture_is_printed_as_the_tutorial_does(running: Running) -> None:
    result = run(str(CAT), "--url", running.predictions_url)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    with Client(running.predictions_url) as client:
        answer = client.classify(CAT)
    assert lines[0] == f"1. {answer.label}: {answer.probability:.4f}"
    assert len(lines) == 5
    assert "untrained" in result.stderr


def test_a_folder_becomes_rows_of_json(running: Running, folder: Path) -> None:
    result = run(str(folder), "--format", "jsonl", "--url", running.predictions_url)
    rows = {row["picture"]: row for row in map(json.loads, result.stdout.splitlines())}
    names = {str(Path(name).relative_to(folder)) for name in rows}
    assert names == {"a.jpg", "b [1].JPG", "sub/c.jpeg", "d,\u00e9\u2603.jpg", "broken.jpg"}
    assert rows[str(folder / "a.jpg")]["label"]
    assert "not a picture" in rows[str(folder / "broken.jpg")]["error"]
    assert result.returncode == 4
    assert "4 classified, 1 refused or failed, 0 left" in result.stderr


def test_patterns_lists_and_csv(running: Running, folder: Path) -> None:
    pattern = str(folder / "**" / "*.jp*g")
    url = ("--url", running.predictions_url)
    by_pattern = run(pattern, "--format", "csv", *url)
    assert {row["picture"] for row in csv.DictReader(io.StringIO(by_pattern.stdout))} == {
        str(folder / name) for name in ("a.jpg", "broken.jpg", "sub/c.jpeg", "d,\u00e9\u2603.jpg")
    }
    names = f"{folder}/a.jpg\n{folder}/missing.jpg\n{folder}/a.jpg\n"
    by_list = run("--files-from", "-", "--format", "csv", *url, stdin=names.encode())
    rows = {row["picture"]: row for row in csv.DictReader(io.StringIO(by_list.stdout))}
    assert sorted(rows) == [f"{folder}/a.jpg", f"{folder}/missing.jpg"]
    assert "cannot be read: No such file" in rows[f"{folder}/missing.jpg"]["error"]
    assert by_list.returncode == 4


def test_a_picture_on_standard_input(running: Running) -> None:
    result = run("-", "--url", running.predictions_url, "--topk", "2", stdin=CAT.read_bytes())
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2
    as_json = run(
        "-", "--url", running.predictions_url, "--format", "jsonl", stdin=CAT.read_bytes()
    )
    assert json.loads(as_json.stdout)["picture"] == "-"
    assert "untrained" in as_json.stderr


def test_nothing_recognised_is_said(running: Running) -> None:
    result = run(str(CAT), "--threshold", "0.99", "--url", running.predictions_url)
    assert result.stdout.startswith("nothing recognised\n1. ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.jpg"], 1, "no such file, folder, or match"),
        ([], 1, "There is no picture here"),
        ([str(CAT), "--output", "results.txt"], 1, "must end in .jsonl or .csv"),
        ([str(CAT), "--at-once", "0"], 2, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], status: int, message: str, running: Running
) -> None:
    result = run(*arguments, "--url", running.predictions_url)
    assert result.returncode == status
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_server_that_is_not_there_is_given_up() -> None:
    nobody = f"http://127.0.0.1:{free_ports().inference}/predictions/densenet121"
    result = run(str(CAT), "--patience", "1", "--url", nobody)
    assert result.returncode == 3
    assert "gave no answer" in result.stderr
    with Client(nobody, RequestOptions(patience=0.5)) as client, pytest.raises(UnavailableError):
        client.classify(CAT)


def test_another_page_is_not_taken_for_the_service(running: Running) -> None:
    with Client(running.metrics_url) as client, pytest.raises(RefusedError):
        client.classify(CAT)


def test_a_program_has_answers_and_errors_and_threads_share_a_client(running: Running) -> None:
    options = RequestOptions(topk=3, threshold=0.0)
    with Client(running.predictions_url, options) as client:
        alone = client.classify(CAT)
        with pytest.raises(RefusedError) as refused:
            client.classify(b"%PDF-1.7 ...")
        with pytest.raises(FileNotFoundError):
            client.classify(Path("nowhere.jpg"))
        with ThreadPoolExecutor(8) as threads:
            answers = threads.map(client.classify, [CAT.read_bytes()] * 24)
            together = {answer.label for answer in answers}
    assert (refused.value.code, refused.value.type) == (415, "UnsupportedFormat")
    assert len(alone.predictions) == 3
    assert alone.recognized
    assert together == {alone.label}


@pytest.fixture
def quick_archive(tmp_path: Path) -> Path:
    """Of a model that takes a tenth of the time: here the number of pictures counts."""
    return build(recipe(untrained("squeezenet1_1")), tmp_path / "model_store")


@pytest.fixture
def own_server(quick_archive: Path, tmp_path: Path) -> Iterator[Running]:
    yield start(quick_archive, free_ports(), workers=2, run_dir=tmp_path / "run")
    now = find_running(tmp_path / "run")  # the test starts another one in its place
    assert now is not None
    stop(now, tmp_path / "run")


def test_thousands_of_pictures_survive_a_restart_of_the_server(
    quick_archive: Path, own_server: Running, tmp_path: Path, note: list[str]
) -> None:
    files = [tmp_path / f"{number:04}.jpg" for number in range(THOUSANDS)]
    contents = {}
    for number, file in enumerate(files):
        file.write_bytes(picture(number))
        contents[file.read_bytes()] = str(file)
    rows: list[Row] = []
    asked: Counter[str] = Counter()
    succeeded: Counter[str] = Counter()
    enough, lock = threading.Event(), threading.Lock()

    class Counting(HTTPAdapter):
        def send(
            self, request: requests.PreparedRequest, *arguments: Any, **options: Any
        ) -> requests.Response:
            body = request.body
            assert isinstance(body, bytes)
            name = contents[body[body.index(b"\xff\xd8") : body.rindex(b"\xff\xd9") + 2]]
            with lock:
                asked[name] += 1
            response = super().send(request, *arguments, **options)
            with lock:
                succeeded[name] += response.status_code == 200
            return response

    def take(row: Row) -> None:
        rows.append(row)
        if len(rows) == THOUSANDS // 3:
            enough.set()

    def restart() -> None:
        enough.wait()
        stop(own_server, tmp_path / "run")
        start(quick_archive, own_server.ports, workers=2, run_dir=tmp_path / "run")

    operator = threading.Thread(target=restart)
    operator.start()
    try:
        with Client(own_server.predictions_url) as client:
            client._session.mount("http://", Counting(pool_maxsize=16))
            classify_all(files, client, 16, take)
    finally:
        enough.set()
        operator.join()
    again = sum(asked.values()) - THOUSANDS
    note.append(
        f"client: {THOUSANDS} pictures, the server stopped and started in the middle: {len(rows)} "
        f"results, {again} requests repeated, {sum(succeeded.values())} answers"
    )
    assert Counter(row.picture for row in rows) == Counter(map(str, files))
    assert all(isinstance(row.answer, Classification) for row in rows)
    assert set(succeeded.values()) == {1}, "a picture was asked again that had its answer"
    assert again > 0, "the restart was not noticed: this test shows nothing"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_killed_run_goes_on_where_it_was(suffix: str, running: Running, tmp_path: Path) -> None:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(300):
        (place / f"{number:03}.jpg").write_bytes(picture(number))
    output = tmp_path / f"results.{suffix}"
    command = [str(place), "--output", str(output), "--url", running.predictions_url]
    with subprocess.Popen([*CLASSIFY, *command], stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 60
        while not output.exists() or output.read_bytes().count(b"\n") < 60:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    with output.open("a") as file:
        file.write('{"picture": "' if suffix == "jsonl" else '"half a na')  # as if cut off
    before = output.read_bytes().count(b"\n")
    assert before < 300, "it was done already: this test shows nothing"
    second = run(*command)
    assert second.returncode == 0, second.stderr
    names = _names(output)
    assert len(names) == 300
    assert Counter(names) == Counter(str(file) for file in place.iterdir())
    earlier = re.search(r"^(\d+) of 300 are in .*: (\d+) classified, 0 refused", second.stderr)
    assert earlier is not None, second.stderr
    assert earlier[1] == earlier[2]
    assert "with earlier runs: 300 classified, 0 refused" in second.stderr
    third = run(*command)
    assert (third.returncode, third.stderr[:14]) == (0, "300 of 300 are")
    assert len(_names(output)) == 300


def _names(output: Path) -> list[str]:
    if output.suffix == ".csv":
        return [row[0] for row in csv.reader(output.read_text().splitlines())][1:]
    return [json.loads(line)["picture"] for line in output.read_text().splitlines()]


def test_ctrl_c_keeps_what_is_done(running: Running, tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.jpg").write_bytes(picture(number))
    output = tmp_path / "results.jsonl"
    program = (
        # A terminal's program takes Ctrl-C; one in a script's background is started to ignore it.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from classification_client.command import start; start()"
    )
    arguments = [str(tmp_path), "--output", str(output), "--url", running.predictions_url]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE
    ) as process:
        while not output.exists() or output.read_bytes().count(b"\n") < 20:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Run the same command again to go on" in said
    assert b"Traceback" not in said
    assert all(json.loads(line)["label"] for line in output.read_text().splitlines())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("precious.csv", "name,price\nhouse,1\n"),
        ("precious.jsonl", '{"name": "house"}\n{"name": "ga'),
    ],
)
def test_a_file_that_is_no_result_is_left_alone(
    name: str, text: str, running: Running, tmp_path: Path
) -> None:
    precious = tmp_path / name
    precious.write_text(text)
    result = run(str(CAT), "--output", str(precious), "--url", running.predictions_url)
    assert result.returncode == 1
    assert "something else" in result.stderr
    assert precious.read_text() == text


def test_a_strange_name_has_one_row_and_cannot_write_to_the_terminal(
    running: Running, tmp_path: Path
) -> None:
    strange = tmp_path / "pictures"
    strange.mkdir()
    names = [b"icon\r.jpg", b"two\nlines.jpg", b'quote",.jpg', b"\xff.jpg", b"\x1b[2J.jpg"]
    for name in names:
        (strange / os.fsdecode(name)).write_bytes(picture(1) if name != names[4] else b"x" * 999)
    for suffix in ("csv", "jsonl"):
        output = tmp_path / f"results.{suffix}"
        command = [str(strange), "--output", str(output), "--url", running.predictions_url]
        first, second = run(*command), run(*command)
        assert first.returncode == second.returncode == 4, second.stderr
        assert "5 of 5 are in" in second.stderr
        assert "\x1b" not in first.stderr + second.stderr
    printed = run(str(strange), "--format", "text", "--url", running.predictions_url)
    assert "\x1b" not in printed.stdout + printed.stderr


def test_a_mistake_in_the_question_is_no_pictures_result(running: Running, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    url = running.predictions_url.replace("densenet121", "nobody")
    wrong = run(str(CAT), "--output", str(output), "--url", url)
    assert wrong.returncode == 3
    assert "Stopped" in wrong.stderr
    assert output.read_text() == ""
    again = run(str(CAT), "--output", str(output), "--url", running.predictions_url)
    assert again.returncode == 0
    assert len(output.read_text().splitlines()) == 1


def test_what_is_larger_than_the_server_takes_is_not_sent(running: Running, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(b"\xff\xd8" + bytes(21_000_000))
    result = run(str(tmp_path), "--url", running.predictions_url)
    assert result.returncode == 4
    assert "more than the 20 accepted" in result.stderr


@pytest.mark.parametrize(
    "url",
    ["foo", "127.0.0.1:8080/predictions/densenet121", "http://", "ftp://host/x", "http://a:b"],
)
def test_what_is_no_address_is_told_at_once(url: str) -> None:
    result = run(str(CAT), "--url", url)
    assert result.returncode == 1
    assert f"{url!r}" in result.stderr
    assert "such as http://" in result.stderr


URL = "--url"


def rows_of(text: str, suffix: str) -> dict[str, dict[str, str]]:
    """The rows of CSV or JSON lines by their pictures' file names."""
    rows = (
        csv.DictReader(io.StringIO(text, newline=""))
        if suffix == "csv"
        else map(json.loads, text.splitlines())
    )
    return {Path(row["picture"]).name: row for row in rows}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_results_of_another_question_or_model_are_not_mixed_in(
    suffix: str, running: Running, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"results.{suffix}"
    command = [str(folder), "--output", str(output), URL, running.predictions_url]
    assert run(*command, "--topk", "2").returncode == 4
    before = output.read_text()
    row = rows_of(before, suffix)["a.jpg"]
    assert row["model"] == "densenet121"
    assert re.fullmatch(r"1\.0-untrained\+[0-9a-f]{8}", row["model_version"])
    assert "untrained random weights" in row["warning"]

    for others, words in (
        (["--topk", "3"], "was made with --topk 2, and this would be --topk 3"),
        (
            ["--topk", "2", "--threshold", "0.5"],
            "no --threshold, and this would be --threshold 0.5",
        ),
    ):
        refused = run(*command, *others)
        assert (refused.returncode, output.read_text()) == (1, before)
        assert words in refused.stderr
        assert "name another --output" in refused.stderr

    # As another archive of the same name would have written them: nothing is left to be asked for.
    other = before.replace(row["model_version"], "1.0+00000000")
    output.write_text(other)
    refused = run(*command, "--topk", "2")
    assert (refused.returncode, output.read_text()) == (1, other)
    assert "was made with densenet121 1.0+00000000" in refused.stderr
    assert f"this would be densenet121 {row['model_version']}" in refused.stderr


def test_a_rerun_says_what_was_done_earlier(running: Running, folder: Path, tmp_path: Path) -> None:
    command = [str(folder), "--output", str(tmp_path / "a.csv"), URL, running.predictions_url]
    run(*command)
    again = run(*command)
    assert again.returncode == 4
    assert "5 of 5 are in" in again.stderr
    assert "already: 4 classified, 1 refused, by densenet121 1.0-untrained+" in again.stderr
    assert "with earlier runs: 4 classified, 1 refused" in again.stderr
    assert "broken.jpg: The bytes are not a picture" in again.stderr


def test_what_a_folder_has_beside_pictures_is_counted(running: Running, folder: Path) -> None:
    result = run(str(folder), URL, running.predictions_url)
    assert "Left out of the folders: 1 not called as pictures (1 .txt), 1 hidden." in result.stderr


def test_csv_on_standard_output_is_complete(running: Running, folder: Path) -> None:
    url = (URL, running.predictions_url)
    result = run(str(folder), "--format", "csv", "--topk", "3", *url)
    rows = rows_of(result.stdout, "csv")
    assert len(rows) == 5
    with Client(running.predictions_url, RequestOptions(topk=3)) as client:
        expected = client.classify(folder / "a.jpg").predictions
    row = rows["a.jpg"]
    assert [(row[f"label{n}"], row[f"class_id{n}"]) for n in ("", "_2", "_3")] == [
        (prediction.label, prediction.class_id) for prediction in expected
    ]
    assert [float(row[f"probability{n}"]) for n in ("", "_2", "_3")] == [
        prediction.probability for prediction in expected
    ]
    assert "untrained" in row["warning"]
    assert "not a picture" in rows["broken.jpg"]["error"]
    alone = run("-", "--format", "csv", *url, stdin=CAT.read_bytes())
    assert list(rows_of(alone.stdout, "csv")) == ["-"]


@pytest.mark.parametrize("format_", ["text", "table"])
def test_what_is_for_people_has_every_label_and_every_refusal(
    format_: str, running: Running, folder: Path
) -> None:
    with Client(running.predictions_url, RequestOptions(topk=3)) as client:
        expected = client.classify(folder / "a.jpg").predictions
    result = run(str(folder), "--format", format_, "--topk", "3", URL, running.predictions_url)
    for prediction in expected:
        assert prediction.label in result.stdout
        assert f"{prediction.probability:.4f}" in result.stdout
    assert result.stdout.count("not classified: ") == 1


def test_more_labels_than_a_spreadsheet_has_columns_for_are_refused(running: Running) -> None:
    url = (URL, running.predictions_url)
    result = run(str(CAT), "--format", "csv", "--topk", "5001", *url)
    assert result.returncode == 1
    assert "no more than 5000 labels" in result.stderr
    assert run(str(CAT), "--format", "jsonl", "--topk", "5001", *url).returncode == 0


def test_an_empty_file_is_one_pictures_matter(running: Running, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "empty.jpg").touch()
    result = run(str(tmp_path), "--format", "jsonl", URL, running.predictions_url)
    rows = rows_of(result.stdout, "jsonl")
    assert rows["empty.jpg"]["error"] == "The picture is empty: it has no bytes."
    assert rows["a.jpg"]["label"]
    assert result.returncode == 4


def test_a_drive_that_is_gone_for_a_moment_is_waited_for(running: Running, tmp_path: Path) -> None:
    place = tmp_path / "share"
    place.mkdir()
    for number in range(100):
        (place / f"{number:03}.jpg").write_bytes(picture(number))
    output = tmp_path / "results.jsonl"
    command = [str(place), "--output", str(output), URL, running.predictions_url]
    with subprocess.Popen([*CLASSIFY, *command], stderr=subprocess.PIPE) as process:
        wait_for_rows(output, 10)
        place.rename(tmp_path / "away")
        place.mkdir()  # what is left where a drive was mounted
        time.sleep(1.5)
        assert process.poll() is None
        during = output.read_bytes().count(b"\n")
        place.rmdir()
        (tmp_path / "away").rename(place)
        _, said = process.communicate(timeout=100)
    assert during < 100, "it was done before the drive was gone: this test shows nothing"
    assert process.returncode == 0, said
    assert b"100 classified, 0 refused" in said
    assert len(_names(output)) == 100


def wait_for_rows(output: Path, least: int) -> None:
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < least:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_drive_that_stays_away_stops_the_run_and_is_no_pictures_result(
    running: Running, tmp_path: Path
) -> None:
    place = tmp_path / "share"
    place.mkdir()
    for number in range(100):
        (place / f"{number:03}.jpg").write_bytes(picture(number))
    output = tmp_path / "results.csv"
    command = [str(place), "--output", str(output), URL, running.predictions_url]
    with subprocess.Popen(
        [*CLASSIFY, *command, "--patience", "2"],
        stderr=subprocess.PIPE,
    ) as process:
        wait_for_rows(output, 10)
        place.rename(tmp_path / "away")
        _, said = process.communicate(timeout=100)
    assert process.returncode == 3, said
    assert re.search(rb"Stopped: .*/\d+\.jpg cannot be read, however often it was tried", said)
    assert f"its folder {place} is not there".encode() in said
    assert b"Run the same command to go on" in said
    rows = rows_of(output.read_text(), "csv")
    assert len(rows) < 100
    assert not any(row["error"] for row in rows.values())
    (tmp_path / "away").rename(place)
    assert run(*command).returncode == 0
    assert len(_names(output)) == 100


def test_one_picture_on_a_bad_spot_of_the_drive_stops_no_other(
    running: Running, tmp_path: Path
) -> None:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(120):
        (place / f"{number:03}.jpg").write_bytes(picture(number))
    (place / "000.jpg").unlink()
    (place / "000.jpg").symlink_to("/proc/self/mem")  # reading it is an input error
    output = tmp_path / "results.jsonl"
    command = [str(place), "--output", str(output), URL, running.predictions_url]
    result = run(*command, "--patience", "0.5")
    assert result.returncode == 3
    assert "119 classified, 1 refused or failed, 1 left" in result.stderr
    assert "000.jpg: cannot be read: Input/output error" in result.stderr
    assert len(_names(output)) == 119
    (place / "000.jpg").unlink()
    (place / "000.jpg").write_bytes(picture(0))
    assert run(*command).returncode == 0
    assert len(_names(output)) == 120


def test_a_list_with_a_folder_that_is_not_there_goes_on_with_the_others(
    running: Running, folder: Path, tmp_path: Path
) -> None:
    names = f"{tmp_path}/gone/a.jpg\n{folder}/a.jpg\n{tmp_path}/gone/b.jpg\n"
    output = tmp_path / "results.jsonl"
    result = run(
        *("--files-from", "-", "--output", str(output), URL, running.predictions_url),
        stdin=names.encode(),
    )
    assert result.returncode == 3
    assert "1 classified, 2 refused or failed, 2 left" in result.stderr
    assert _names(output) == [str(folder / "a.jpg")]


def test_a_picture_that_is_being_copied_is_waited_for(running: Running, tmp_path: Path) -> None:
    whole = CAT.read_bytes()
    copy = tmp_path / "copy.png"
    copy.write_bytes(whole[: len(whole) // 2])
    rest = threading.Timer(0.7, copy.write_bytes, [whole])
    with Client(running.predictions_url) as client:
        expected = client.classify(whole)
        copy.touch()
        rest.start()
        assert client.classify(copy) == expected
    rest.join()


def test_a_full_disk_stops_the_run_with_whole_rows(running: Running, tmp_path: Path) -> None:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(40):
        (place / f"{number:03}.jpg").write_bytes(picture(number))
    output = tmp_path / "results.jsonl"
    command = [str(place), "--output", str(output), URL, running.predictions_url]
    limited = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 8; exec "$@"', "-", *CLASSIFY, *command],
        capture_output=True,
        check=False,
        text=True,
        timeout=100,
    )
    assert limited.returncode == 3
    assert "cannot be written: File too large" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert output.read_bytes().endswith(b"\n")
    assert 0 < len(_names(output)) < 40
    assert run(*command).returncode == 0
    assert Counter(_names(output)) == Counter(str(file) for file in place.iterdir())


@pytest.mark.parametrize("format_", ["text", "table", "csv", "jsonl"])
def test_results_that_cannot_be_printed_are_told(
    format_: str, running: Running, folder: Path
) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*CLASSIFY, str(folder), "--format", format_, URL, running.predictions_url],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
            timeout=100,
        )
    assert result.returncode in {1, 3}
    assert "Standard output cannot be written: No space left on device" in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.fixture
def house(run_dir: Path, tmp_path: Path) -> Path:
    """The project's folder, as it is where the shared server was started with `make run`."""
    place = tmp_path / "house"
    place.mkdir()
    for name in ("Makefile", "scripts", "handler", ".venv", "config.properties"):
        (place / name).symlink_to(Path(name).absolute())
    (place / ".run").symlink_to(run_dir)
    return place


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.5, 0.7, 0.9, 1.2])
@pytest.mark.usefixtures("running")
def test_ctrl_c_at_any_moment_shows_no_traceback(seconds: float, house: Path) -> None:
    (house / "pictures").mkdir()
    for number in range(100):
        (house / "pictures" / f"{number:03}.jpg").write_bytes(picture(number))
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import runpy; runpy.run_module('scripts.classify', run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=house,
        env=os.environ | {"GIVEN_IMAGES": "pictures", "GIVEN_OUTPUT": "a.csv"},
        stderr=subprocess.PIPE,
    ) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # nobody presses it once
        _, said = process.communicate(timeout=60)
    assert b"Traceback" not in said
    assert process.returncode in {0, 130, -signal.SIGINT}


def make(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a recipe as it is; what it is set up with is there already."""
    program = shutil.which("make")
    assert program is not None
    return subprocess.run(
        [program, "-o", "setup", *arguments],
        cwd=house,
        capture_output=True,
        check=False,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("variable", ["IMAGE", "IMAGES"])
@pytest.mark.usefixtures("running")
def test_make_takes_any_name_of_a_file(variable: str, house: Path) -> None:
    strange = 'it\'s a "cat" of $(HOME) for $5.jpg'
    (house / "my holidays").mkdir()
    (house / strange).write_bytes(picture(1))
    (house / "my holidays" / "x.jpg").write_bytes(picture(2))
    alone = make(house, "classify", f"{variable}={strange}", "TOPK=2", "THRESHOLD=0")
    assert (alone.returncode, len(alone.stdout.splitlines())) == (0, 2), alone.stderr
    output = house / "it's $5.jsonl"
    both = make(house, "classify", f"{variable}='my holidays' *.jpg", f"OUTPUT={output}")
    assert both.returncode == 0, both.stderr
    assert sorted(_names(output)) == [strange, "my holidays/x.jpg"]
    other = make(house, "classify", f"{variable}=my holidays", f"OUTPUT={output}", "TOPK=3")
    assert "was made with no TOPK, and this would be TOPK=3" in other.stderr
    assert "name another OUTPUT" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify"], "Name it: make classify IMAGE=cat.jpg"),
        (["classify", "IMAGE=nowhere.jpg"], "nowhere.jpg: there is no such file"),
        (["classify", "IMAGE=it's.jpg x.jpg"], "a quote without an end"),
        (["classify", f"IMAGE={CAT}", "TOPK=0"], "TOPK must be greater than or equal to 1"),
        (["classify", f"IMAGE={CAT}", "TOPK=many"], "TOPK must be a valid integer"),
        (["classify", f"IMAGE={CAT}", "FORMAT=xml"], "FORMAT"),
        (["classify", f"IMAGE={CAT}", "OUTPUT=a.txt"], "a.txt must end in .jsonl or .csv"),
        (["evaluate"], "make evaluate IMAGES=folder"),
        (["evaluate", "IMAGES=a b"], "One folder is needed"),
        (["evaluate", "IMAGES=no where"], "One folder is needed"),
    ],
)
@pytest.mark.usefixtures("running")
def test_makes_mistakes_are_told_in_makes_words(
    arguments: list[str], message: str, house: Path
) -> None:
    result = make(house, *arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "--" not in result.stderr
    assert "Usage" not in result.stderr
    assert "Traceback" not in result.stderr
