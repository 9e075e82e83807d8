"""Asks a running server what pictures show: one, a folder of them, or ten thousand."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    check_address,
)
from scripts.pictures import Found, find_pictures
from scripts.results import Origin, Row, classify_now, csv_columns, csv_line, labels_in_csv
from scripts.results_file import ResultsFile, results_file
from scripts.serve.running import require_running
from scripts.sources import sources, spelt
from scripts.terminal import GIVEN, UserError, command, console, printable, warn

AT_ONCE = 8
STANDARD_INPUT = "-"

# A spreadsheet has 16,384 columns, and a label takes three.
_MOST_LABELS_IN_CSV = 5000

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
_STREAMED: dict[Format, Callable[[Row, Origin], str]] = {
    Format.JSONL: Row.as_json,
    Format.CSV: Row.as_csv,
}
# What has a row for each picture, with one label unless more are asked for.
_WITH_ONE_LABEL = {Format.TABLE, Format.CSV}


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


def _as_text(answer: Classification) -> str:
    """As the tutorials' clients print it."""
    lines = [
        f"{place}. {printable(prediction.label)}: {prediction.probability:.4f}"
        for place, prediction in enumerate(answer.predictions, start=1)
    ]
    return "\n".join(lines if answer.recognized else ["nothing recognised", *lines])


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
    format_: Annotated[
        Format | None, typer.Option("--format", envvar=f"{GIVEN}_FORMAT", help="How to print.")
    ] = None,
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
    pictures = pictures or sources("IMAGE", "IMAGES")
    if output is not None:
        format_ = _format_of(output, format_)
    if pictures == [STANDARD_INPUT]:
        if output is not None:
            raise UserError("A picture on standard input has no name to go into a file.")
        asking = _asking(format_ or Format.TEXT, topk, threshold, patience, key)
        return _classify_standard_input(where_to_send(url, model), asking, format_ or Format.TEXT)
    found = _find(pictures, files_from)
    chosen = format_ or (Format.TEXT if len(found.pictures) == 1 else Format.TABLE)
    asking = _asking(chosen, topk, threshold, patience, key)
    return _classify_files(found, where_to_send(url, model), asking, at_once, chosen, output)


def where_to_send(url: str | None, model: str | None) -> str:
    """The address that was given, or that of the server which runs here."""
    if url is None:
        running = require_running()
        return (running.serving(model) if model else running).predictions_url
    try:
        return check_address(url)
    except ValueError as error:
        raise UserError(str(error)) from error


def _format_of(output: Path, said: Format | None) -> Format:
    by_suffix = {".jsonl": Format.JSONL, ".csv": Format.CSV}
    found = said or by_suffix.get(output.suffix.lower())
    if found is None or found not in by_suffix.values():
        raise UserError(f"{output} must end in .jsonl or .csv.")
    return found


def _asking(
    format_: Format, topk: int | None, threshold: float | None, patience: float, key: str | None
) -> Asking:
    if topk is None and format_ in _WITH_ONE_LABEL:
        topk = 1
    if format_ is Format.CSV and topk is not None and topk > _MOST_LABELS_IN_CSV:
        raise UserError(
            f"{spelt('topk', topk)}: CSV has three columns for each label, and a "
            f"spreadsheet takes no more than {_MOST_LABELS_IN_CSV} labels. JSON lines take any."
        )
    return Asking(topk=topk, threshold=threshold, patience=patience, key=key)


def _find(sources: Sequence[str], files_from: str | None) -> Found:
    with _progress.status("Searching for pictures ..."):
        found = find_pictures(sources, files_from)
    if found.left_out is not None:
        _say(_safe(found.left_out))
    return found


def _origin(url: str, asking: Asking) -> Origin:
    """What is known of the results before anything was asked."""
    path = url.split("?", maxsplit=1)[0].rstrip("/")
    return Origin(path.rsplit("/", maxsplit=1)[-1], "", asking.topk, asking.threshold)


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
    origin = _origin(url, asking)
    _print_header(format_, origin)
    _print_row(row, format_, origin)
    _print_rest([row], format_)
    _show_warnings([row])
    return 0


def _classify_files(
    found: Found, url: str, asking: Asking, at_once: int, format_: Format, output: Path | None
) -> int:
    origin = _origin(url, asking)
    run = _Run(found)
    if output is None:
        _print_header(format_, origin)
        try:
            _ask(run, url, asking, at_once, lambda row: _print_row(row, format_, origin))
        finally:
            _print_rest(run.rows, format_)
    else:
        with results_file(output, as_csv=format_ is Format.CSV, origin=origin) as results:
            _write(run, results, url, asking, at_once)
    _show_warnings(run.rows)
    return run.summary()


def _write(run: "_Run", results: ResultsFile, url: str, asking: Asking, at_once: int) -> None:
    """Asks for all that the file has no row for; `UserError` where it is from another model."""
    run.go_on_from(results)
    model = None
    with run.stopping(), Client(url, asking) as client:
        model = client.model()
    if run.stopped is not None:
        return
    if model is not None:
        results.made_by(model)
    run.say_earlier(results)

    def take(row: Row) -> None:
        if row.is_final:
            results.write(row)

    _ask(run, url, asking, at_once, take)
    with run.stopping():
        results.keep()


def _ask(run: "_Run", url: str, asking: Asking, at_once: int, take: Callable[[Row], None]) -> None:
    """Asks for all pictures of the run, with a progress bar; `take` is given each row."""
    with _bar(len(run.pictures)) as progress, run.stopping():
        task = progress.add_task("", total=len(run.pictures))

        def take_and_count(row: Row) -> None:
            take(row)
            run.rows.append(row)
            progress.advance(task)

        classify_now(run.pictures, AsyncClient(url, asking, at_once), at_once, take_and_count)


def _bar(count: int) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_progress,
        transient=True,
        disable=count < 2 or not _progress.is_terminal,  # noqa: PLR2004  # one is done at once
    )


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


def _print_header(format_: Format, origin: Origin) -> None:
    if format_ is Format.CSV:
        with _standard_output():
            sys.stdout.write(csv_line(csv_columns(labels_in_csv(origin))))


def _print_row(row: Row, format_: Format, origin: Origin) -> None:
    """Prints what is printed at once, on standard output."""
    if format_ in _STREAMED:
        with _standard_output():
            sys.stdout.write(_STREAMED[format_](row, origin))


def _print_rest(rows: Sequence[Row], format_: Format) -> None:
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


def _show_warnings(rows: Sequence[Row]) -> None:
    """What the server says of its model, once."""
    answers = [row.answer for row in rows if isinstance(row.answer, Classification)]
    for warning in sorted({answer.warning for answer in answers if answer.warning}):
        _say(f"[bold yellow]{_safe(warning)}[/]")


def _print_table(rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table("picture", "label", "probability")
    for row in sorted(rows, key=lambda row: row.picture):
        if isinstance(row.answer, Classification):
            predictions = row.answer.predictions
            labels = [_safe(prediction.label) for prediction in predictions]
            if not row.answer.recognized:
                labels[0] = f"({labels[0]}?)"
            numbers = [f"{prediction.probability:.4f}" for prediction in predictions]
            table.add_row(_safe(row.picture), "\n".join(labels), "\n".join(numbers))
        else:
            table.add_row(_safe(row.picture), f"not classified: {_safe(row.problem)}", "")
    console.print(table)


class _Run:
    """How far a run has come, and how that is said.

    Attributes:
        pictures: what is to be asked for.
        rows: what was.
        stopped: why it ended before all were done, if it did.
        can_go_on: whether the same command would do the rest.
    """

    def __init__(self, found: Found) -> None:
        self.pictures = found.pictures
        self.rows: list[Row] = []
        self.stopped: str | None = None
        self.can_go_on = False
        self._closed = [(f"{folder}", f"cannot be read: {w}") for folder, w in found.closed.items()]
        self._earlier = 0
        self._refused_earlier: list[tuple[str, str]] = []
        self._began = time.monotonic()

    def go_on_from(self, results: ResultsFile) -> None:
        """Leaves out what has a row already."""
        done = [str(picture) for picture in self.pictures if str(picture) in results.done]
        self.pictures = [p for p in self.pictures if str(p) not in results.done]
        self.can_go_on = True
        self._earlier = len(done)
        self._refused_earlier = [(name, why) for name in done if (why := results.done[name])]

    def say_earlier(self, results: ResultsFile) -> None:
        """What earlier runs did, and with which model."""
        if not self._earlier:
            return
        refused = len(self._refused_earlier)
        _say(
            f"{self._earlier} of {self._earlier + len(self.pictures)} are in "
            f"{_safe(results.path)} already: {self._earlier - refused} classified, {refused} "
            f"refused, by {_safe(results.origin.model)} {_safe(results.origin.model_version)}"
        )

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Keeps the reason for which the run cannot go on."""
        try:
            yield
        except ServiceError as error:
            self.stopped = str(error)
        except UserError as error:
            # It says what to do.
            self.stopped, self.can_go_on = str(error), False

    def summary(self) -> int:
        """Says how it went; returns the exit status."""
        problems = [(row.picture, row.problem) for row in self.rows if row.problem is not None]
        left = len(self.pictures) - sum(row.is_final for row in self.rows)
        everything = [*self._closed, *self._refused_earlier, *problems]
        if len(self.pictures) > 1 or everything or self._earlier or self.stopped:
            self._say_counts(len(problems), left)
        for name, problem in everything[:_SHOWN_PROBLEMS]:
            _say(f"[bold red]{_safe(name)}[/]: {_safe(problem)}")
        if len(everything) > _SHOWN_PROBLEMS:
            _say(f"and {len(everything) - _SHOWN_PROBLEMS} more")
        if self.stopped is not None:
            _say(f"[bold red]Stopped:[/] {_safe(self.stopped)}")
        if self.stopped is None and not left:
            return SOME_REFUSED if everything else 0
        if self.can_go_on:
            _say("Run the same command to go on.")
        return NOT_FINISHED

    def _say_counts(self, problems: int, left: int) -> None:
        seconds = time.monotonic() - self._began
        rate = len(self.rows) / seconds if seconds > 0 else 0
        good = len(self.rows) - problems
        _say(
            f"{good} classified, {problems} refused or failed, {left} left, "
            f"in {seconds:.1f} s ({rate:.1f}/s)"
        )
        if self._earlier:
            refused = len(self._refused_earlier)
            _say(
                f"with earlier runs: {good + self._earlier - refused} classified, "
                f"{problems + refused} refused or failed"
            )


def _say(text: str) -> None:
    """What is no result goes to standard error."""
    _progress.print(text)


def _safe(text: object) -> str:
    return escape(printable(str(text)))


if __name__ == "__main__":
    command(main)
