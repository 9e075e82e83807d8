"""Write the report of an evaluation: `report.md`, two CSV files and plots; print the tables."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from scripts.evaluation.evaluation import Evaluation
from scripts.terminal import console, printable, step, warn

# With more classes, their table is written but not printed, and the plots have no legend.
MAX_SHOWN_CLASSES = 20

_MAX_SHOWN_REJECTIONS = 10
_MAX_SHOWN_MISTAKES = 10
# Columns of the table of classes that fit into a terminal of 80 characters.
_TERMINAL_COLUMNS = [
    *("class", "images", "average_precision", "auroc", "f1", "threshold", "f1_at_threshold")
]

# Cells by column name; floats are written with four decimals.
Cells = Mapping[str, str | int | float]


def write(
    evaluation: Evaluation,
    folder: Path,
    *,
    metrics: Cells,
    tables: Mapping[str, Sequence[Cells]],
    classes: Mapping[int, Cells],
    mistakes: Sequence[Cells],
    plots: Mapping[str, Figure],
    warning: str | None = None,
) -> None:
    """Write the report to the folder, creating it if necessary, and print the tables.

    Args:
        evaluation: its counts, its model's warning and its rejected images are reported.
        folder: the folder of all files.
        metrics: the first table, by name.
        tables: other tables by title, with the same columns in all rows; empty ones are omitted.
        classes: metrics of each class by position, for the last table and `classes.csv`.
        mistakes: wrongly classified images, worst first, for `mistakes.csv` and a table of the
            first ones.
        plots: figures by file name; a title is added to each.
        warning: a warning about the results.
    """
    model, images, rejected = evaluation.model, len(evaluation.images), evaluation.rejected
    by_class = []
    for index, cells in classes.items():
        class_id, name = model.labels[index]
        by_class.append(_text({"class_index": index, "class_id": class_id, "class": name, **cells}))
    metrics = {"images": images, "not counted": len(rejected), **metrics}
    texts = {
        "Metrics": [{"metric": name, "value": value} for name, value in _text(metrics).items()],
        **{title: [*map(_text, rows)] for title, rows in tables.items()},
        "Mistakes": [*map(_text, mistakes[:_MAX_SHOWN_MISTAKES])],
        "Classes": by_class,
    }
    texts = {title: rows for title, rows in texts.items() if rows}
    warnings = [text for text in (model.warning, warning) if text]
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "classes.csv", by_class)
    _write_csv(folder / "mistakes.csv", [*map(_text, mistakes)])
    title = f"{model.name or 'The model'} on {images} images"
    for name, figure in plots.items():
        figure.suptitle(plot_label(title))
        figure.savefig(folder / name, dpi=100)
    lines = [f"# Evaluation: {printable(title)}", *(f"\n**{text}**" for text in warnings)]
    for heading, rows in texts.items():
        lines += _markdown(heading, rows)
    lines += [f"\n![{Path(name).stem}]({name})" for name in plots]
    (folder / "report.md").write_text("\n".join(lines) + "\n", "utf-8")

    columns = [name for name in _TERMINAL_COLUMNS if name in by_class[0]]
    texts["Classes"] = [{name: row[name] for name in columns} for row in by_class]
    for heading, rows in texts.items():
        if heading != "Classes" or len(rows) <= MAX_SHOWN_CLASSES:
            _print(heading, rows)
    for row in rejected[:_MAX_SHOWN_REJECTIONS]:
        warn(f"Not counted: {row.image}: {row.problem}")
    if len(rejected) > _MAX_SHOWN_REJECTIONS:
        warn(f"Not counted: {len(rejected) - _MAX_SHOWN_REJECTIONS} more images")
    for text in warnings:
        warn(text)
    files = ", ".join(("report.md", "classes.csv", "mistakes.csv", *plots))
    step(f"Evaluation: wrote {files} to {folder}")


def _write_csv(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a table as CSV; without rows the file is empty."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        if rows:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _text(cells: Cells) -> dict[str, str]:
    return {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in cells.items()
    }


def _markdown(title: str, rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield f"| {' | '.join(rows[0]).replace('_', ' ')} |"
    yield "|---" * len(rows[0]) + "|"
    for row in rows:
        cells = (printable(cell).replace("|", r"\|") for cell in row.values())
        yield f"| {' | '.join(cells)} |"


def _print(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row.values()))
    console.print(table)


def plot_label(class_name: str) -> str:
    """Return a class name for a plot, with `$` escaped, which begins a formula."""
    return printable(class_name).replace("$", r"\$")
