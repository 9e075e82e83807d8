"""Results on standard output: as text, as a table, as JSON lines, as CSV."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from rich.markup import escape
from rich.table import Table

from classification_client.client import Classification, Prediction
from classification_client.results import Origin, Row, csv_header
from classification_client.terminal import UserError, console, printable, warn


class Format(str, Enum):
    """How results are printed."""

    TEXT = "text"
    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


# What is printed as soon as it is known.
_STREAMED: dict[Format, Callable[[Row, Origin], str]] = {
    Format.JSONL: Row.as_json,
    Format.CSV: Row.as_csv,
}


def show(picture: str, result: Classification) -> None:
    """Prints a result as a table, best label first."""
    name = safe(picture)
    table = Table(title=name if result.recognized else f"{name}: nothing recognised")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("class id")
    if result.labels is not None:
        table.add_column("passes")
    for row in _shown(result):
        passes = ["yes" if row in result.labels else ""] if result.labels is not None else []
        table.add_row(safe(row.label), f"{row.probability:.4f}", safe(row.class_id), *passes)
    console.print(table)
    if result.warning is not None:
        warn(result.warning)


def _as_text(answer: Classification) -> str:
    """As the tutorials' clients print it."""
    lines = [
        f"{place}. {printable(prediction.label)}: {prediction.probability:.4f}"
        for place, prediction in enumerate(_shown(answer), start=1)
    ]
    if answer.labels:
        names = ", ".join(printable(label.label) for label in answer.labels)
        return "\n".join([f"labels: {names}", *lines])
    return "\n".join(lines if answer.recognized else ["nothing recognised", *lines])


def _shown(answer: Classification) -> list[Prediction]:
    """What was asked for, and every label, most probable first."""
    more = [label for label in answer.labels or () if label not in answer.predictions]
    return sorted([*answer.predictions, *more], key=lambda row: -row.probability)


@contextmanager
def _standard_output() -> Iterator[None]:
    """What is printed within has left this process in the end; `UserError` where it cannot."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still to be written would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"Standard output cannot be written: {error.strerror}.") from error


def print_header(format_: Format, origin: Origin) -> None:
    """Prints what stands before the first row."""
    if format_ is Format.CSV:
        with _standard_output():
            sys.stdout.write(csv_header(origin))


def print_row(row: Row, format_: Format, origin: Origin) -> None:
    """Prints what is printed at once, on standard output."""
    if format_ in _STREAMED:
        with _standard_output():
            sys.stdout.write(_STREAMED[format_](row, origin))


def print_rest(rows: Sequence[Row], format_: Format) -> None:
    """Prints texts or a table; what a single picture was refused for is in the summary."""
    with _standard_output():
        if format_ is Format.TABLE:
            _print_table(rows)
        elif format_ is Format.TEXT:
            for row in rows:
                _print_text(row, alone=len(rows) == 1)


def _print_text(row: Row, *, alone: bool) -> None:
    if not alone:
        print(f"{printable(row.picture)}:")
    if isinstance(row.answer, Classification):
        print(_as_text(row.answer))
    elif not alone:
        print(f"not classified: {printable(row.problem or '')}")


def _print_table(rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table("picture", "label", "probability")
    for row in sorted(rows, key=lambda row: row.picture):
        if isinstance(row.answer, Classification):
            predictions = row.answer.labels or row.answer.predictions
            labels = [safe(prediction.label) for prediction in predictions]
            if not row.answer.recognized:
                labels[0] = f"({labels[0]}?)"
            numbers = [f"{prediction.probability:.4f}" for prediction in predictions]
            table.add_row(safe(row.picture), "\n".join(labels), "\n".join(numbers))
        else:
            table.add_row(safe(row.picture), f"not classified: {safe(row.problem)}", "")
    console.print(table)


def safe(text: object) -> str:
    """Text from elsewhere, as rich takes it."""
    return escape(printable(str(text)))
