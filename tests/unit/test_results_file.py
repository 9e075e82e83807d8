"""The file of results: no kill loses a row, and no other run mixes its own with them."""

import csv
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from classification_client import Classification, ModelVersion, Prediction, RefusedError
from classification_client.reading import PassingError
from classification_client.results import Origin, Row
from classification_client.results_file import ResultsFile, results_file
from scripts.terminal import UserError

ORIGIN = Origin("densenet121", "1.0+12345678", topk=3, threshold=None)
MODEL = ModelVersion("densenet121", "1.0+12345678")
# A line end, a quote and a byte that is no text, as names of files may hold.
NAMES = ["a.jpg", 'two\nlines, "quoted".jpg', os.fsdecode(b"\xff\xc3.jpg"), "\u2603.jpg"]
SUFFIXES = pytest.mark.parametrize("suffix", ["jsonl", "csv"])


def classified(name: str, model: ModelVersion | None = MODEL) -> Row:
    predictions = tuple(
        Prediction(f"class, {place}", 0.5 / (place + 1), f"n{place}", place) for place in range(3)
    )
    warning = "untrained random weights"
    return Row(name, Classification(predictions, recognized=True, warning=warning, model=model))


def refused(name: str) -> Row:
    return Row(name, RefusedError(400, "NotAnImage", "This is not a picture.", MODEL))


def write(path: Path, *rows: Row, origin: Origin = ORIGIN) -> None:
    with opened(path, origin) as results:
        for row in rows:
            results.write(row)
        results.keep()


def opened(path: Path, origin: Origin = ORIGIN) -> AbstractContextManager[ResultsFile]:
    return results_file(path, as_csv=path.suffix == ".csv", origin=origin)


def done(path: Path) -> list[str]:
    with opened(path) as results:
        return list(results.done)


@SUFFIXES
def test_rows_are_read_as_they_were_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"results.{suffix}"
    write(path, *map(classified, NAMES), refused("broken.jpg"))
    with opened(path) as results:
        assert results.done == {
            **dict.fromkeys(NAMES),
            "broken.jpg": "This is not a picture.",
        }
        assert results.origin == ORIGIN


def test_csv_has_every_label_what_it_was_made_with_and_that_it_is_untrained(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, classified("a.jpg"), refused("b.jpg"))
    first, second = csv.DictReader(io.StringIO(path.read_text()))
    assert " ".join(first) == (
        "picture label probability class_id label_2 probability_2 class_id_2 label_3 probability_3 "
        "class_id_3 recognized error warning model model_version topk threshold"
    )
    assert (first["label"], first["label_3"], first["class_id_2"]) == ("class, 0", "class, 2", "n1")
    assert (first["recognized"], first["warning"]) == ("true", "untrained random weights")
    assert (second["label"], second["error"]) == ("", "This is not a picture.")
    for row in (first, second):
        assert (row["model"], row["model_version"], row["topk"], row["threshold"]) == (
            "densenet121",
            "1.0+12345678",
            "3",
            "",
        )


def test_a_model_of_fewer_classes_leaves_columns_empty() -> None:
    (row,) = csv.reader([classified("a.jpg").as_csv(replace(ORIGIN, topk=4))])
    assert row[1:13] == [
        *("class, 0", "0.5", "n0", "class, 1", "0.25", "n1"),
        *("class, 2", str(0.5 / 3), "n2", "", "", ""),
    ]


# Of a model that gives several labels; the most probable class is none of them.
SEVERAL = ModelVersion("densenet121", "1.0+12345678", multilabel=True)


def labelled(name: str, *places: int) -> Row:
    answer = classified(name, SEVERAL).answer
    assert isinstance(answer, Classification)
    labels = tuple(answer.predictions[place] for place in places)
    return Row(name, replace(answer, labels=labels, recognized=bool(labels)))


def test_csv_of_several_labels_has_a_column_with_all_of_them_and_is_gone_on_with(
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.csv"
    for part in (
        [refused("b.jpg"), labelled("a.jpg", 1, 2)],  # the first row has no labels to learn from
        [labelled("c.jpg")],
    ):
        with opened(path) as results:
            results.made_by(SEVERAL)
            for row in part:
                results.write(row)
    whole = path.read_bytes()
    rows = {row["picture"]: row for row in csv.DictReader(io.StringIO(whole.decode()))}
    assert list(rows["a.jpg"])[:14] == [
        *("picture", "label", "probability", "class_id", "label_2", "probability_2"),
        *("class_id_2", "label_3", "probability_3", "class_id_3"),
        *("labels", "recognized", "error", "warning"),
    ]
    assert {name: row["labels"] for name, row in rows.items()} == {
        "b.jpg": "",
        "a.jpg": '["class, 1", "class, 2"]',
        "c.jpg": "[]",
    }
    # The label that counts stands first, then the others, most probable first.
    assert [rows["a.jpg"][f"label{n}"] for n in ("", "_2", "_3")] == [
        *("class, 1", "class, 0", "class, 2")
    ]
    assert (rows["c.jpg"]["label"], rows["c.jpg"]["recognized"]) == ("class, 0", "false")
    for length in range(1, whole.index(b"\n") + 1):  # a header that was cut off is begun again
        path.write_bytes(whole[:length])
        assert done(path) == []


def test_json_of_several_labels_has_all_of_them() -> None:
    row = json.loads(labelled("a.jpg", 1, 2).as_json(ORIGIN))
    assert (row["label"], row["class_id"], row["probability"]) == ("class, 1", "n1", 0.25)
    assert [label["label"] for label in row["labels"]] == ["class, 1", "class, 2"]
    assert set(row) - {"labels"} == set(json.loads(classified("a.jpg").as_json(ORIGIN)))


OTHERS = [
    (replace(ORIGIN, topk=5), "--topk 3, and this would be --topk 5"),
    (replace(ORIGIN, topk=None), "--topk 3, and this would be no --topk"),
    (replace(ORIGIN, threshold=0.5), "no --threshold, and this would be --threshold 0.5"),
]


@SUFFIXES
@pytest.mark.parametrize(("other", "words"), OTHERS)
def test_rows_of_other_options_are_not_added(
    suffix: str, other: Origin, words: str, tmp_path: Path
) -> None:
    path = tmp_path / f"results.{suffix}"
    write(path, classified("a.jpg"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=words), opened(path, other):
        pass
    assert path.read_bytes() == before


@SUFFIXES
@pytest.mark.parametrize(
    "model", [ModelVersion("digits", "1.0+12345678"), ModelVersion("densenet121", "1.0+87654321")]
)
def test_rows_of_another_model_or_archive_are_not_added(
    suffix: str, model: ModelVersion, tmp_path: Path
) -> None:
    path = tmp_path / f"results.{suffix}"
    write(path, classified("a.jpg"))
    before = path.read_bytes()
    with opened(path) as results:
        with pytest.raises(UserError, match=r"made with densenet121 1\.0\+12345678,") as told:
            results.made_by(model)
        assert f"and this would be {model}." in str(told.value)
        # The server is replaced while a run goes on.
        with pytest.raises(UserError, match="mixed up"):
            results.write(classified("b.jpg", model))
    assert path.read_bytes() == before


def test_a_file_that_is_mixed_already_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [classified("a.jpg").as_json(ORIGIN), refused("b.jpg").as_json(ORIGIN)]
    path.write_text(rows[0] + rows[1].replace('"topk": 3', '"topk": 4'))
    with pytest.raises(UserError, match="--topk 3, also with --topk 4"), opened(path):
        pass


@SUFFIXES
def test_what_a_file_was_made_with_is_in_makes_words_under_make(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVEN_TO", "make classify")
    path = tmp_path / f"results.{suffix}"
    write(path, classified("a.jpg"))
    with (
        pytest.raises(UserError, match=r"TOPK=3, .* no TOPK.* name another OUTPUT"),
        opened(path, replace(ORIGIN, topk=None)),
    ):
        pass


# Runs `work(path)` again and again, each time in a fork of its own that is killed one line of the
# results file's program later; prints how many lines there are.
KILLED_AT_EVERY_LINE = """
import os, shutil, sys
from pathlib import Path
from classification_client import results_file as program
from tests.unit.test_results_file import NAMES, classified, opened

original, path, work = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def killed_at(wanted):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != program.__file__:
            return None
        seen += event == "line"
        if seen == wanted:
            os._exit(9)
        return trace
    sys.settrace(trace)
    with opened(path) as results:
        if work == "write":
            for name in NAMES:
                results.write(classified(name))
                print(f"{wanted} {NAMES.index(name)}", flush=True)
    os._exit(0)

wanted = 0
while True:
    wanted += 1
    shutil.copyfile(original, path)
    child = os.fork()
    if child == 0:
        killed_at(wanted)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.copyfile(path, path.with_name(f"after-{wanted}"))
    if ended != 9:
        sys.exit(ended)
"""


def killed_at_every_line(original: Path, work: str) -> Iterator[tuple[Path, int]]:
    """What each kill leaves, with how many rows had been written by then."""
    path = original.with_name(f"killed{original.suffix}")
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_LINE, str(original), str(path), work],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    written: dict[int, int] = {}
    for line in result.stdout.splitlines():
        kill, number = map(int, line.split())
        written[kill] = number + 1
    left = sorted(original.parent.glob("after-*"), key=lambda file: int(file.name[6:]))
    assert len(left) > 30, "it was killed at few lines: this test shows nothing"
    for number, file in enumerate(left, start=1):
        yield file.replace(path), written.get(number, 0)


@SUFFIXES
def test_a_kill_at_any_line_of_mending_a_cut_file_loses_no_row(suffix: str, tmp_path: Path) -> None:
    original = tmp_path / f"results.{suffix}"
    write(original, *map(classified, NAMES))
    whole = original.read_bytes()
    with original.open("ab") as file:
        file.write(b'{"picture": "cut' if suffix == "jsonl" else b'"cut","of\nf')
    mended = 0
    for after, _ in killed_at_every_line(original, "open"):
        content = after.read_bytes()
        assert content.startswith(whole)
        mended += content == whole
        assert done(after) == NAMES
    assert mended > 0, "the cut row was never taken off: this test shows nothing"


@SUFFIXES
def test_a_kill_at_any_line_of_writing_loses_no_row_that_was_written(
    suffix: str, tmp_path: Path
) -> None:
    original = tmp_path / f"results.{suffix}"
    original.touch()
    most = 0
    for after, written in killed_at_every_line(original, "write"):
        names = done(after)
        assert names[:written] == NAMES[:written]
        assert names == NAMES[: len(names)]
        most = max(most, written)
    assert most == len(NAMES)


@SUFFIXES
def test_a_file_cut_at_any_byte_keeps_its_whole_rows(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"results.{suffix}"
    write(path, *map(classified, NAMES))
    whole = path.read_bytes()
    ends = [0]
    for count in range(1, len(NAMES) + 1):
        part = tmp_path / f"part.{suffix}"
        part.unlink(missing_ok=True)
        write(part, *map(classified, NAMES[:count]))
        ends.append(part.stat().st_size)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        rows = sum(end <= length for end in ends) - 1
        assert done(path) == NAMES[:rows], length
    write(path, *map(classified, NAMES[rows:]))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("precious.csv", "name,price\nhouse,1\n"),
        ("precious.csv", "name,price\nhouse,1"),
        ("precious.csv", "one line without an end"),
        ("precious.csv", '"picture","label","price"\n"a","b","1"\n'),
        ("precious.csv", '"an open quote\nand no end\n'),
        ("precious.csv", "\0\0\0\0"),
        ("precious.jsonl", '{"name": "house"}\n{"name": "ga'),
        ("precious.jsonl", '{"picture": "a.jpg", "label": "of an older program"}\n'),
        ("precious.jsonl", "[1]\n"),
        ("precious.jsonl", "one line without an end"),
    ],
)
def test_a_file_of_something_else_is_left_alone(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match="holds something else"), opened(path):
        pass
    assert path.read_text() == text


@SUFFIXES
def test_a_full_disk_keeps_every_whole_row_and_is_told(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"results.{suffix}"
    write(path, classified("a.jpg"))
    whole = path.read_bytes()
    program = f"""
        import resource
        from pathlib import Path
        from tests.unit.test_results_file import *
        with opened(Path({str(path)!r})) as results:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) + 40},) * 2)
            try:
                results.write(classified("b.jpg"))
            except UserError as error:
                print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert "cannot be written: File too large. What is in it is kept;" in result.stdout
    assert path.read_bytes() == whole


def test_a_device_is_no_file_of_results(tmp_path: Path) -> None:
    """/dev/full would be read without an end."""
    path = tmp_path / "results.csv"
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="is no file"), opened(path):
        pass


def test_two_runs_cannot_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with opened(path), pytest.raises(UserError, match="Another run writes to"), opened(path):
        pass


@pytest.mark.parametrize("gone", [Path.unlink, lambda path: path.rename(f"{path}.old")])
def test_a_file_that_is_taken_away_stops_the_run(
    gone: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "results.csv"
    with opened(path) as results:
        results.write(classified("a.jpg"))
        gone(path)
        with pytest.raises(UserError, match="moved or deleted"):
            results.write(classified("b.jpg"))


def test_what_may_pass_is_no_result() -> None:
    assert not Row("a.jpg", PassingError(5, "Input/output error")).is_final
    assert Row("a.jpg", FileNotFoundError(2, "No such file or directory")).is_final
    assert refused("a.jpg").is_final
    assert not Row("a.jpg", RefusedError(500, "InternalError", "failed")).is_final
    # What another release may call a picture that costs too much.
    assert Row("a.jpg", RefusedError(413, "TooCostly", "too much work")).is_final
    assert not Row("a.jpg", RefusedError(413, "TooManyImages", "more than 16")).is_final


def test_a_row_of_json_says_what_it_was_made_with() -> None:
    row = json.loads(classified("a.jpg").as_json(ORIGIN))
    assert [row[key] for key in ("model", "model_version", "topk", "threshold", "warning")] == [
        "densenet121",
        "1.0+12345678",
        3,
        None,
        "untrained random weights",
    ]
