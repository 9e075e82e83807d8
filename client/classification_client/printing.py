"""Print results as text or as a table."""

from collections.abc import Sequence
from enum import Enum

from rich.table import Table

from classification_client.responses import Classification
from classification_client.results import Row
from classification_client.terminal import console, printable, safe


class Format(str, Enum):
    """Formats of the results."""

    TEXT = "text"
    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


# Formats with one line per image, which are printed immediately.
LINES = {Format.JSONL, Format.CSV}


def print_results(rows: Sequence[Row], format_: Format) -> None:
    """Print text or a table; the summary has the error of a single image."""
    if format_ is Format.TABLE and rows:
        table = Table("image", "label", "probability")
        for row in sorted(rows, key=lambda row: row.image):
            table.add_row(safe(row.image), *_cells(row))
        console.print(table)
    elif format_ is Format.TEXT:
        for row in rows:
            _print_text(row, alone=len(rows) == 1)


def _cells(row: Row) -> tuple[str, str]:
    if not isinstance(row.answer, Classification):
        return f"not classified: {safe(row.problem)}", ""
    predictions = row.answer.labels or row.answer.predictions
    labels = [safe(prediction.label) for prediction in predictions]
    if not row.answer.recognized:
        labels[0] = f"({labels[0]}?)"
    return "\n".join(labels), "\n".join(f"{label.probability:.4f}" for label in predictions)


def _print_text(row: Row, *, alone: bool) -> None:
    answer = row.answer
    if not alone:
        print(f"{printable(row.image)}:")
    if not isinstance(answer, Classification):
        if not alone:
            print(f"not classified: {printable(row.problem or '')}")
        return
    if answer.labels:
        print("labels:", ", ".join(printable(label.label) for label in answer.labels))
    elif not answer.recognized:
        print("nothing recognized")
    for place, label in enumerate(answer.all_labels, start=1):
        print(f"{place}. {printable(label.label)}: {label.probability:.4f}")
