"""Asks a running server what pictures show: one, a folder of them, or ten thousand."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from scripts.client import (
    PATIENCE,
    Asking,
    AsyncClient,
    Classification,
    Client,
    ServiceError,
    UnavailableError,
)
from scripts.pictures import find_pictures
from scripts.results import Row, classify_all, results_file
from scripts.server import require_running
from scripts.terminal import UserError, command, console, warn

AT_ONCE = 8
STANDARD_INPUT = "-"

# Exit statuses beside 0: every picture was classified.
SOME_REFUSED = 1
NOT_FINISHED = 3

# Of the pictures that were not classified, so many are named at the end.
_SHOWN_PROBLEMS = 20

_progress = Console(stderr=True, highlight=False, soft_wrap=True)


class Format(str, Enum):
    """How results are printed."""

    TEXT = "text"
    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


def show(picture: str, result: Classification) -> None:
    """Prints a result as a table, best label first."""
    table = Table(title=picture if result.recognized else f"{picture}: nothing recognised")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("class id")
    for row in result.predictions:
        table.add_row(escape(row.label), f"{row.probability:.4f}", escape(row.class_id))
    console.print(table)
    if result.warning is not None:
        warn(result.warning)


def _as_text(row: Row) -> str:
    """As the tutorials' clients print it."""
    assert isinstance(row.answer, Classification)
    lines = [
        f"{place}. {prediction.label}: {prediction.probability:.4f}"
        for place, prediction in enumerate(row.answer.predictions, start=1)
    ]
    return "\n".join(lines if row.answer.recognized else ["nothing recognised", *lines])


def main(
    pictures: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, patterns in quotes; - is a picture on standard input."
        ),
    ] = None,
    files_from: Annotated[
        str | None, typer.Option(help="A list of files, one a line; - is standard input.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Where to send them.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of this server's models.")] = None,
    format_: Annotated[Format | None, typer.Option("--format", help="How to print.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="A .jsonl or .csv to write to, and to go on with.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = AT_ONCE,
    topk: Annotated[int | None, typer.Option(min=1, help="Predictions for each.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least probability that counts.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is busy or gone.")
    ] = PATIENCE,
    key: Annotated[
        str | None, typer.Option(envvar="CLASSIFY_KEY", help="For a gateway.", show_envvar=True)
    ] = None,
) -> int:
    """Classifies pictures with a running server.

    Exit status: 0 all were classified, 1 some were refused, 3 the server was gone too long.
    """
    asking = Asking(topk=topk, threshold=threshold, patience=patience, key=key)
    if url is None:
        running = require_running()
        url = (running.serving(model) if model else running).predictions_url
    if pictures == [STANDARD_INPUT]:
        return _classify_standard_input(url, asking, format_ or Format.TEXT)
    found = find_pictures(pictures or [], files_from)
    if output is not None:
        format_ = _format_of(output, format_)
    chosen = format_ or (Format.TEXT if len(found) == 1 else Format.TABLE)
    return _classify_files(found, AsyncClient(url, asking, at_once), at_once, chosen, output)


def _format_of(output: Path, said: Format | None) -> Format:
    by_suffix = {".jsonl": Format.JSONL, ".csv": Format.CSV}
    found = said or by_suffix.get(output.suffix.lower())
    if found is None or found not in by_suffix.values():
        raise UserError(f"{output} must end in .jsonl or .csv.")
    return found


def _classify_standard_input(url: str, asking: Asking, format_: Format) -> int:
    try:
        with Client(url, asking) as client:
            answer = client.classify(sys.stdin.buffer.read())
    except ServiceError as error:
        raise UserError(str(error)) from error
    _print([Row(STANDARD_INPUT, answer)], format_)
    return 0


def _classify_files(
    pictures: Sequence[Path],
    client: AsyncClient,
    at_once: int,
    format_: Format,
    output: Path | None,
) -> int:
    began = time.monotonic()
    rows: list[Row] = []
    with ExitStack() as stack:
        keep: Callable[[Row], None] = rows.append
        if output is not None:
            results = stack.enter_context(results_file(output, as_csv=format_ is Format.CSV))
            before = len(pictures)
            pictures = [picture for picture in pictures if str(picture) not in results.done]
            if before > len(pictures):
                _progress.print(f"{before - len(pictures)} of {before} are in {output} already.")

            def keep(row: Row) -> None:
                results.write(row)
                rows.append(row)

        progress = stack.enter_context(_bar(len(pictures)))
        task = progress.add_task("", total=len(pictures))

        def take(row: Row) -> None:
            keep(row)
            progress.advance(task)

        gone = _run(pictures, client, at_once, take)
    if output is None:
        _print(rows, format_)
    return _summary(rows, len(pictures), time.monotonic() - began, gone)


def _bar(count: int) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_progress,
        transient=True,
        disable=count < 2 or not _progress.is_terminal,  # noqa: PLR2004  # one is done at once
    )


def _run(
    pictures: Sequence[Path], client: AsyncClient, at_once: int, take: Callable[[Row], None]
) -> str | None:
    """Why it ended before all were done, if it did."""

    async def all_of_them() -> None:
        async with client:
            await classify_all(pictures, client, at_once, take)

    try:
        asyncio.run(all_of_them())
    except UnavailableError as error:
        return str(error)
    return None


def _print(rows: Sequence[Row], format_: Format) -> None:
    """On standard output; what was not classified is in rows of JSON and CSV, else in the end."""
    if format_ is Format.CSV:
        sys.stdout.writelines(row.as_csv() for row in rows)
    elif format_ is Format.JSONL:
        sys.stdout.writelines(row.as_json() for row in rows)
    else:
        good = [row for row in rows if isinstance(row.answer, Classification)]
        if format_ is Format.TABLE:
            _print_table(good)
        else:
            for row in good:
                if len(rows) > 1:
                    print(f"{row.picture}:")
                print(_as_text(row))
    warnings = Counter(row.answer.warning for row in rows if isinstance(row.answer, Classification))
    for warning in filter(None, warnings):
        _progress.print(f"[bold yellow]{escape(warning)}[/]")


def _print_table(rows: Sequence[Row]) -> None:
    table = Table("picture", "label", "probability")
    for row in sorted(rows, key=lambda row: row.picture):
        assert isinstance(row.answer, Classification)
        label = row.answer.label if row.answer.recognized else f"({row.answer.label}?)"
        table.add_row(escape(row.picture), escape(label), f"{row.answer.probability:.4f}")
    console.print(table)


def _summary(rows: Sequence[Row], wanted: int, seconds: float, gone: str | None) -> int:
    problems = [row for row in rows if row.problem is not None]
    if wanted > 1 or problems or gone:
        good = len(rows) - len(problems)
        rate = len(rows) / seconds if seconds > 0 else 0
        _progress.print(
            f"{good} classified, {len(problems)} not, {wanted - len(rows)} not done, in "
            f"{seconds:.1f} s ({rate:.1f}/s)"
        )
    for row in problems[:_SHOWN_PROBLEMS]:
        _progress.print(f"[bold red]{escape(row.picture)}[/]: {escape(row.problem or '')}")
    if len(problems) > _SHOWN_PROBLEMS:
        _progress.print(f"and {len(problems) - _SHOWN_PROBLEMS} more")
    if gone is not None:
        _progress.print(f"[bold red]Stopped:[/] {escape(gone)}. Run the same command to go on.")
        return NOT_FINISHED
    return SOME_REFUSED if problems else 0


if __name__ == "__main__":
    command(main)
