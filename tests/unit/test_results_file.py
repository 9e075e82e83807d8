"""The file of results: no kill loses a row, and no other run mixes its own with them."""

import csv
import io
import json
import os
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from classification_client import Classification, ModelVersion, Prediction, RefusedError
from classification_client.reading import PassingError
from classification_client.results import Origin, Row
from classification_client.results_file import ResultsFile, results_file
from scripts.terminal import UserError
from tests.killing import killed_at_each_line

ORIGIN = Origin("densenet121", "1.0+12345678", topk=3, threshold=None)
MODEL = ModelVersion("densenet121", "1.0+12345678")
# A line end, a quote and a byte that is no text, as names of files may hold.
NAMES = ["a.jpg", 'two\nlines, "quoted".jpg', os.fsdecode(b"\xff\xc3.jpg"), "\u2603.jpg"]


@pytest.fixture(params=["jsonl", "csv"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of results in either form; it is not there yet."""
    return tmp_path / f"results.{request.param}"


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


def test_rows_are_read_as_they_were_written(path: Path) -> None:
    write(path, *map(classified, NAMES), refused("broken.jpg"))
    with opened(path) as results:
        assert results.done == dict.fromkeys(NAMES) | {"broken.jpg": "This is not a picture."}
        assert results.origin == ORIGIN


def test_csv_has_every_label_what_it_was_made_with_and_that_it_is_untrained(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    origin = replace(ORIGIN, topk=4)  # more than the model has classes
    write(path, classified("a.jpg"), refused("b.jpg"), origin=origin)
    header, first, second = csv.reader(io.StringIO(path.read_text()))
    assert " ".join(header) == (
        "picture label probability class_id label_2 probability_2 class_id_2 label_3 probability_3 "
        "class_id_3 label_4 probability_4 class_id_4 "
        "recognized error warning model model_version topk threshold"
    )
    made_with = ["densenet121", "1.0+12345678", "4", ""]
    assert first == [
        *("a.jpg", "class, 0", "0.5", "n0", "class, 1", "0.25", "n1"),
        *("class, 2", str(0.5 / 3), "n2", "", "", "", "true", "", "untrained random weights"),
        *made_with,
    ]
    assert second == ["b.jpg", *[""] * 13, "This is not a picture.", "", *made_with]


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
    assert list(rows["a.jpg"])[9:12] == ["class_id_3", "labels", "recognized"]
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


def test_json_has_all_labels_and_what_it_was_made_with() -> None:
    one = json.loads(classified("a.jpg").as_json(ORIGIN))
    made_with = {"model": "densenet121", "model_version": "1.0+12345678", "topk": 3}
    assert one.items() >= (made_with | {"warning": "untrained random weights"}).items()
    assert one["threshold"] is None
    several = json.loads(labelled("a.jpg", 1, 2).as_json(ORIGIN))
    assert [several[key] for key in ("label", "class_id", "probability")] == [
        "class, 1",
        "n1",
        0.25,
    ]
    assert [label["label"] for label in several["labels"]] == ["class, 1", "class, 2"]
    assert several.keys() - {"labels"} == one.keys()


@pytest.mark.parametrize(
    ("change", "words", "under_make"),
    [
        ({"topk": 5}, "--topk 3, and this would be --topk 5", "TOPK=3, .* TOPK=5"),
        ({"topk": None}, "--topk 3, and this would be no --topk", "TOPK=3, .* no TOPK"),
        ({"threshold": 0.5}, "no --threshold, .* --threshold 0.5", "no THRESHOLD, .*HOLD=0.5"),
    ],
)
def test_rows_of_other_options_are_not_added(
    change: dict[str, Any],
    words: str,
    under_make: str,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(path, classified("a.jpg"))
    before = path.read_bytes()
    other = replace(ORIGIN, **change)
    with pytest.raises(UserError, match=f"{words}.* another --output"), opened(path, other):
        pass
    monkeypatch.setenv("GIVEN_TO", "make classify")
    with pytest.raises(UserError, match=f"{under_make}.* another OUTPUT"), opened(path, other):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "model", [ModelVersion("digits", "1.0+12345678"), ModelVersion("densenet121", "1.0+87654321")]
)
def test_rows_of_another_model_or_archive_are_not_added(model: ModelVersion, path: Path) -> None:
    write(path, classified("a.jpg"))
    before = path.read_bytes()
    with opened(path) as results:
        with pytest.raises(UserError, match=rf"densenet121 1\.0\+12345678,.* {model.name} 1\.0"):
            results.made_by(model)
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


def test_what_a_file_was_made_with_is_in_makes_words_under_make(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVEN_TO", "make classify")
    write(path, classified("a.jpg"))
    with (
        pytest.raises(UserError, match=r"TOPK=3, .* no TOPK.* name another OUTPUT"),
        opened(path, replace(ORIGIN, topk=None)),
    ):
        pass


def test_a_kill_at_any_line_of_mending_a_cut_file_loses_no_row(path: Path) -> None:
    write(path, *map(classified, NAMES))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"picture": "cut' if path.suffix == ".jsonl" else b'"cut","of\nf')
    mended = kills = 0
    for _ in killed_at_each_line(opening(path), RESULTS_FILE, path):
        content = path.read_bytes()
        assert content.startswith(whole)
        assert done(path) == NAMES
        mended += content == whole
        kills += 1
    assert kills > 30
    assert mended > 0


def test_a_kill_at_any_line_of_writing_loses_no_row_that_was_written(path: Path) -> None:
    path.touch()
    writing = opening(path, "for name in NAMES: results.write(classified(name)); print(flush=True)")
    written = 0
    for written in killed_at_each_line(writing, RESULTS_FILE, path):
        names = done(path)
        assert names[:written] == NAMES[:written]
        assert names == NAMES[: len(names)]
    assert written == len(NAMES)


RESULTS_FILE = "classification_client.results_file"


def opening(path: Path, then: str = "pass") -> str:
    """A program that opens a file of results."""
    return f"""
from pathlib import Path
from tests.unit.test_results_file import NAMES, classified, opened
def work():
    with opened(Path({str(path)!r})) as results:
        {then}
"""


def test_a_file_cut_at_any_byte_keeps_its_whole_rows(path: Path) -> None:
    ends = []
    for name in NAMES[1:3]:
        write(path, classified(name))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert done(path) == NAMES[1 : 1 + sum(end <= length for end in ends)], length
    write(path, classified(NAMES[2]))
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


def test_a_full_disk_keeps_every_whole_row_and_is_told(path: Path) -> None:
    write(path, classified("a.jpg"))
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as results:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, hard))
        try:
            with pytest.raises(UserError, match=r"File too large. What is in it is kept;"):
                results.write(classified("b.jpg"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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
