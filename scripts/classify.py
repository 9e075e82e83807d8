"""Asks a running server what pictures show: one, a folder of them, or ten thousand."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import stamina
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
from scripts.results import Row, classify_now, results_file
from scripts.server import require_running
from scripts.terminal import UserError, command, console, printable, warn

AT_ONCE = 8
STANDARD_INPUT = "-"

# Exit statuses beside 0, every picture was classified, and those of every command.
NOT_FINISHED = 3
SOME_REFUSED = 4

# Of the pictures that were not classified, so many are named at the end.
_SHOWN_PROBLEMS = 20

_progress = Console(stderr=True, highlight=False, soft_wrap=True)


class Format(str, Enum):
    """How results are printed."""

    TEXT = "text"
    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


# What is printed as soon as it is known.
_STREAMED: dict[Format, Callable[[Row], str]] = {Format.JSONL: Row.as_json, Format.CSV: Row.as_csv}


def show(picture: str, result: Classification) -> None:
    """Prints a result as a table, best label first."""
    name = _safe(picture)
    table = Table(title=name if result.recognized else f"{name}: nothing recognised")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("class id")
    for row in result.predictions:
        table.add_row(_safe(row.label), f"{row.probability:.4f}", _safe(row.class_id))
    console.print(table)
    if result.warning is not None:
        warn(result.warning)


def _as_text(row: Row) -> str:
    """As the tutorials' clients print it."""
    assert isinstance(row.answer, Classification)
    lines = [
        f"{place}. {printable(prediction.label)}: {prediction.probability:.4f}"
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

    Exit status: 0 all were classified, 4 some were refused, 3 some are left to be done, 1 nothing
    could be done, 130 Ctrl-C.
    """
    stamina.instrumentation.set_on_retry_hooks([])  # each try would be a line of a log
    # Names of files need not be text in any encoding.
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    asking = Asking(topk=topk, threshold=threshold, patience=patience, key=key)
    if url is None:
        running = require_running()
        url = (running.serving(model) if model else running).predictions_url
    if pictures == [STANDARD_INPUT]:
        if output is not None:
            raise UserError("A picture on standard input has no name to go into a file.")
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
    except UnavailableError as error:
        _say(f"[bold red]Stopped:[/] {_safe(error)}")
        return NOT_FINISHED
    except ServiceError as error:
        _say(f"[bold red]Refused:[/] {_safe(error)}")
        return SOME_REFUSED
    row = Row(STANDARD_INPUT, answer)
    if format_ in _STREAMED:
        sys.stdout.write(_STREAMED[format_](row))
    else:
        _print([row], format_)
    _show_warnings([row])
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
    before: list[tuple[str, str]] = []
    with ExitStack() as stack:
        if output is not None:
            results = stack.enter_context(results_file(output, as_csv=format_ is Format.CSV))
            done = [str(picture) for picture in pictures if str(picture) in results.done]
            before = [(name, error) for name in done if (error := results.done[name])]
            if done:
                _say(f"{len(done)} of {len(pictures)} are in {_safe(output)} already.")
            pictures = [picture for picture in pictures if str(picture) not in results.done]
        progress = stack.enter_context(_bar(len(pictures)))
        task = progress.add_task("", total=len(pictures))

        def take(row: Row) -> None:
            rows.append(row)
            if output is not None and row.is_final:
                results.write(row)
            elif output is None and format_ in _STREAMED:
                sys.stdout.write(_STREAMED[format_](row))
            progress.advance(task)

        try:
            stopped = _run(pictures, client, at_once, take)
        finally:
            if output is None:
                _print(rows, format_)
            _show_warnings(rows)
    status = _summary(rows, before, len(pictures), time.monotonic() - began, stopped)
    if status == NOT_FINISHED and output is not None:
        _say("Run the same command to go on.")
    return status


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
    try:
        classify_now(pictures, client, at_once, take)
    except ServiceError as error:
        return str(error)
    return None


def _print(rows: Sequence[Row], format_: Format) -> None:
    """Prints texts or a table on standard output; the summary has what was not classified."""
    good = [row for row in rows if isinstance(row.answer, Classification)]
    if format_ is Format.TABLE and good:
        _print_table(good)
    elif format_ is Format.TEXT:
        for row in good:
            if len(rows) > 1:
                print(f"{printable(row.picture)}:")
            print(_as_text(row))


def _show_warnings(rows: Sequence[Row]) -> None:
    """What the server says of its model, once."""
    answers = [row.answer for row in rows if isinstance(row.answer, Classification)]
    for warning in sorted({answer.warning for answer in answers if answer.warning}):
        _say(f"[bold yellow]{_safe(warning)}[/]")


def _print_table(rows: Sequence[Row]) -> None:
    table = Table("picture", "label", "probability")
    for row in sorted(rows, key=lambda row: row.picture):
        assert isinstance(row.answer, Classification)
        label = row.answer.label if row.answer.recognized else f"({row.answer.label}?)"
        table.add_row(_safe(row.picture), _safe(label), f"{row.answer.probability:.4f}")
    console.print(table)


def _summary(
    rows: Sequence[Row],
    before: Sequence[tuple[str, str]],
    wanted: int,
    seconds: float,
    stopped: str | None,
) -> int:
    """Says how it went; `before` are the pictures that an earlier run was refused."""
    problems = [(row.picture, row.problem) for row in rows if row.problem is not None]
    left = wanted - sum(row.is_final for row in rows)
    if wanted > 1 or problems or before or stopped:
        rate = len(rows) / seconds if seconds > 0 else 0
        _say(
            f"{len(rows) - len(problems)} classified, {len(problems) + len(before)} refused or "
            f"failed, {left} left, in {seconds:.1f} s ({rate:.1f}/s)"
        )
    everything = [*before, *problems]
    for name, problem in everything[:_SHOWN_PROBLEMS]:
        _say(f"[bold red]{_safe(name)}[/]: {_safe(problem)}")
    if len(everything) > _SHOWN_PROBLEMS:
        _say(f"and {len(everything) - _SHOWN_PROBLEMS} more")
    if stopped is not None:
        _say(f"[bold red]Stopped:[/] {_safe(stopped)}")
    if stopped is not None or left:
        return NOT_FINISHED
    return SOME_REFUSED if everything else 0


def _say(text: str) -> None:
    """What is no result goes to standard error."""
    _progress.print(text)


def _safe(text: object) -> str:
    return escape(printable(str(text)))


if __name__ == "__main__":
    command(main)
