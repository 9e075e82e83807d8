"""The file of results: rows are kept, partial rows are cut off, and no two models are mixed."""

import csv
import io
import json
import os
import resource
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from classification_client import Classification, ModelVersion, Prediction, TransientError
from classification_client.errors import RejectedError, UserError
from classification_client.results import Row, as_line, csv_columns
from classification_client.results_file import ResultsFile, results_file

MODEL = ModelVersion("densenet121", "1.0+12345678")
MADE_WITH: dict[str, Any] = {
    "model": MODEL.name,
    "model_version": MODEL.version,
    "topk": 3,
    "threshold": None,
}
# A line end, a quote and a byte that is no text, as names of files may hold.
NAMES = ["a.jpg", 'two\nlines, "quoted".jpg', os.fsdecode(b"\xff\xc3.jpg"), "\u2603.jpg"]


@pytest.fixture(params=["jsonl", "csv"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of results in either form; it is not there yet."""
    return tmp_path / f"results.{request.param}"


def classified(name: str, *labels: int, model: ModelVersion = MODEL) -> Row:
    predictions = tuple(
        Prediction(f"class, {place}", 0.5 / (place + 1), f"n{place}", place) for place in range(3)
    )
    given = tuple(predictions[place] for place in labels) if labels else None
    return Row(
        name,
        Classification(
            predictions, recognized=True, warning="untrained", model=model, labels=given
        ),
    )


REJECTED = Row("b.jpg", RejectedError(400, "NotAnImage", "This is not an image.", MODEL))


def opened(
    path: Path, *, multilabel: bool = False, **changes: Any
) -> AbstractContextManager[ResultsFile]:
    made_with = MADE_WITH | changes
    columns = csv_columns(made_with["topk"] or 1, multilabel=multilabel)
    return results_file(path, made_with, columns if path.suffix == ".csv" else None)


def write(path: Path, *rows: Row, **changes: Any) -> None:
    with opened(path, **changes) as results:
        for row in rows:
            results.write(row)


def done(path: Path) -> list[str]:
    with opened(path) as results:
        return list(results.done)


def test_rows_are_read_as_they_were_written(path: Path) -> None:
    write(path, *map(classified, NAMES))
    write(path, REJECTED)
    with opened(path) as results:
        assert results.done == dict.fromkeys(NAMES) | {"b.jpg": "This is not an image."}


def test_csv_has_every_label_and_what_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, classified("a.jpg"), REJECTED, topk=4)  # more than the model has classes
    header, first, second = csv.reader(io.StringIO(path.read_text()))
    assert " ".join(header) == (
        "picture label probability class_id label_2 probability_2 class_id_2 label_3 probability_3 "
        "class_id_3 label_4 probability_4 class_id_4 "
        "recognized error warning model model_version topk threshold"
    )
    made_with = ["densenet121", "1.0+12345678", "4", ""]
    assert first == [
        *("a.jpg", "class, 0", "0.5", "n0", "class, 1", "0.25", "n1"),
        *("class, 2", str(0.5 / 3), "n2", "", "", "", "true", "", "untrained"),
        *made_with,
    ]
    assert second == ["b.jpg", *[""] * 13, "This is not an image.", "", *made_with]


def test_csv_of_a_multilabel_model_has_a_column_with_all_labels(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, REJECTED, classified("a.jpg", 1, 2), multilabel=True)
    rejected, row = csv.DictReader(io.StringIO(path.read_text()))
    assert list(row)[9:12] == ["class_id_3", "labels", "recognized"]
    assert (rejected["labels"], row["labels"]) == ("", '["class, 1", "class, 2"]')
    # The best label comes first, then the other predictions, most probable first.
    labels = [row[name] for name in ("label", "label_2", "label_3")]
    assert labels == ["class, 1", "class, 0", "class, 2"]


def test_json_has_all_labels_and_what_it_was_made_with() -> None:
    one = json.loads(as_line(classified("a.jpg"), MADE_WITH, None))
    assert one.items() >= (MADE_WITH | {"picture": "a.jpg", "warning": "untrained"}).items()
    several = json.loads(as_line(classified("a.jpg", 1, 2), MADE_WITH, None))
    top = {"label": "class, 1", "class_id": "n1", "probability": 0.25}
    assert several.items() >= top.items()
    assert [label["label"] for label in several["labels"]] == ["class, 1", "class, 2"]
    assert several.keys() - {"labels"} == one.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk": 5}, "--topk 3, and this would be .* --topk 5"),
        ({"topk": None}, r"--topk 3, and this would be densenet121 \S+ Results"),
        ({"threshold": 0.5}, "--topk 3, and this would be .* --topk 3 --threshold 0.5"),
        ({"model_version": "1.0+87654321"}, r"1\.0\+12345678 .* 1\.0\+87654321"),
    ],
)
def test_rows_of_another_model_or_other_options_are_not_added(
    change: dict[str, Any], words: str, path: Path
) -> None:
    write(path, classified("a.jpg"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{words}.* another --output"), opened(path, **change):
        pass
    with pytest.raises(UserError, match="mixed up"):  # the model is replaced during a run
        write(path, classified("b.jpg", model=ModelVersion("other", "1")))
    assert path.read_bytes() == before


def test_a_file_cut_at_any_byte_keeps_its_complete_rows(path: Path) -> None:
    ends = []
    names = [NAMES[0], *NAMES[2:]]
    for name in names:
        write(path, classified(name))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for length in range(ends[0], len(whole), 3):
        path.write_bytes(whole[:length])
        assert done(path) == names[: sum(end <= length for end in ends)], length
    write(path, classified(names[-1]))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("precious.csv", "name,price\nhouse,1\n"),
        ("precious.csv", "one line without an end"),
        ("precious.csv", '"picture","label","price"\n"a","b","1"\n'),
        ("precious.csv", "\0\0\0\0"),
        ("precious.jsonl", '{"name": "house"}\n{"name": "ga'),
        ("precious.jsonl", '{"picture": "a.jpg", "label": "of an older program"}\n'),
        ("precious.jsonl", "[1]\n"),
        ("precious.jsonl", "one line without an end"),
    ],
)
def test_a_file_of_another_program_is_not_changed(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match="does not hold results"), opened(path):
        pass
    assert path.read_text() == text


def test_a_row_in_the_middle_that_is_damaged_loses_no_later_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, *map(classified, NAMES))
    damaged = path.read_bytes().replace(b'"a.jpg"', b'"a"jpg"')
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="does not hold results"), opened(path):
        pass
    assert path.read_bytes() == damaged


def test_a_full_disk_keeps_every_whole_row(path: Path) -> None:
    write(path, classified("a.jpg"))
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as results:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, hard))
        try:
            with pytest.raises(UserError, match=r"File too large. It keeps what it holds"):
                results.write(classified("b.jpg"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole


def test_a_device_or_a_file_in_use_is_rejected(path: Path, tmp_path: Path) -> None:
    with opened(path), pytest.raises(UserError, match="Another run uses"), opened(path):
        pass
    (tmp_path / "device.csv").symlink_to("/dev/full")  # could be read without an end
    with pytest.raises(UserError, match="not a regular"), opened(tmp_path / "device.csv"):
        pass


def test_only_permanent_results_are_kept() -> None:
    assert not Row("a.jpg", TransientError(5, "Input/output error")).is_final
    assert Row("a.jpg", FileNotFoundError(2, "No such file or directory")).is_final
    assert REJECTED.is_final
    assert not Row("a.jpg", RejectedError(500, "InternalError", "failed")).is_final
    # What another release may call an image that costs too much.
    assert Row("a.jpg", RejectedError(413, "TooCostly", "too much work")).is_final
    assert not Row("a.jpg", RejectedError(413, "TooManyImages", "more than 16")).is_final
