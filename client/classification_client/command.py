"""The command `classify`: asks a server what pictures show, one of them or ten thousand."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from classification_client import embeddings
from classification_client.client import (
    PATIENCE,
    Classification,
    Client,
    ModelVersion,
    RequestOptions,
    ServiceError,
    UnavailableError,
    check_address,
)
from classification_client.pictures import Found, find_pictures
from classification_client.printing import Format, print_header, print_rest, print_row, safe
from classification_client.results import Origin, Row, classify_all
from classification_client.results_file import ResultsFile, results_file
from classification_client.terminal import UserError, program, run, spelt

# Where `make run` serves, if nothing else is said.
URL = "http://127.0.0.1:8080/predictions/densenet121"

AT_ONCE = 8
STANDARD_INPUT = "-"

# A spreadsheet has 16,384 columns, and a label takes three.
_MOST_LABELS_IN_CSV = 5000

# Exit statuses beside 0, every picture was classified, and those of every command.
NOT_FINISHED = 3
SOME_REFUSED = 4

# What has a row for each picture, with one label unless more are asked for.
_WITH_ONE_LABEL = {Format.TABLE, Format.CSV}

# Of the pictures that were not classified, so many are named at the end.
_SHOWN_PROBLEMS = 20

_progress = Console(stderr=True, highlight=False, soft_wrap=True)


FormatOption = Annotated[Format | None, typer.Option(help="How to print.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="A .jsonl or .csv to go on with; vectors as .npy, .parquet."),
]
TopkOption = Annotated[int | None, typer.Option(min=1, help="Predictions for each.")]
ThresholdOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Least probability that counts.")
]
KeyOption = Annotated[
    str | None, typer.Option(envvar="CLASSIFY_KEY", help="For a gateway.", show_envvar=True)
]


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
    url: Annotated[str, typer.Option(envvar="CLASSIFY_URL", help="Where to send them.")] = URL,
    format: FormatOption = None,  # noqa: A002  # as the option is called
    output: OutputOption = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = AT_ONCE,
    topk: TopkOption = None,
    threshold: ThresholdOption = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is busy or gone.")
    ] = PATIENCE,
    key: KeyOption = None,
) -> int:
    """Classifies pictures with a running server.

    Exit status: 0 all were classified, 4 some were refused, 3 some are left to be done, 1 nothing
    could be done, 130 Ctrl-C.
    """
    options = RequestOptions(topk=topk, threshold=threshold, patience=patience, key=key)
    try:
        check_address(url)
    except ValueError as error:
        raise UserError(str(error)) from error
    return classify(pictures or [], url, options, files_from, format, output, at_once)


def start() -> NoReturn:
    """Runs the command."""
    run(program(main))


def classify(
    pictures: Sequence[str],
    url: str,
    options: RequestOptions,
    files_from: str | None = None,
    format_: Format | None = None,
    output: Path | None = None,
    at_once: int = AT_ONCE,
) -> int:
    """Classifies what a person named, and prints or writes the results.

    Args:
        pictures: files, folders, patterns; alone "-", a picture on standard input.
        url: where to send them.
        options: how to ask; None for `topk` is one label for each in tables and CSV.
        files_from: a list of files, one a line, or "-" for standard input.
        format_: how to print or write them; None for what suits their number, or the output.
        output: a .jsonl or .csv to write to, and to go on with.
        at_once: requests at a time.

    Returns:
        the exit status.

    Raises:
        UserError: nothing could be done.
    """
    # Names of files need not be text in any encoding.
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if output is not None:
        if output.suffix.lower() in embeddings.SUFFIXES:
            return _write_embeddings(_find(pictures, files_from), url, options, at_once, output)
        format_ = _format_of(output, format_)
    if list(pictures) == [STANDARD_INPUT]:
        if output is not None:
            raise UserError("A picture on standard input has no name to go into a file.")
        chosen = format_ or Format.TEXT
        return _classify_standard_input(url, _fitting(options, chosen), chosen)
    found = _find(pictures, files_from)
    chosen = format_ or (Format.TEXT if len(found.pictures) == 1 else Format.TABLE)
    return _classify_files(found, url, _fitting(options, chosen), at_once, chosen, output)


def _format_of(output: Path, said: Format | None) -> Format:
    by_suffix = {".jsonl": Format.JSONL, ".csv": Format.CSV}
    found = said or by_suffix.get(output.suffix.lower())
    if found is None or found not in by_suffix.values():
        raise UserError(f"{output} must end in .jsonl or .csv.")
    return found


def _write_embeddings(
    found: Found, url: str, options: RequestOptions, at_once: int, output: Path
) -> int:
    """Asks for all embeddings, and writes them in the order of the pictures."""
    embeddings.check_writable(output)
    run = _Run(found)
    _ask(run, url, replace(options, embedding=True, topk=1), at_once, lambda _: None)
    vectors = {
        row.picture: row.answer.embedding
        for row in run.rows
        if isinstance(row.answer, Classification) and row.answer.embedding is not None
    }
    if run.stopped is None:
        names = [str(picture) for picture in run.pictures if str(picture) in vectors]
        embeddings.write(output, [(name, vectors[name]) for name in names])
        _say(f"{len(names)} embeddings are in {safe(output)}")
    _show_warnings(run.rows)
    return run.summary()


def _fitting(options: RequestOptions, format_: Format) -> RequestOptions:
    """With as many labels as the format has room for; `UserError` where more were asked for."""
    if options.topk is None and format_ in _WITH_ONE_LABEL:
        return replace(options, topk=1)
    if format_ is Format.CSV and options.topk is not None and options.topk > _MOST_LABELS_IN_CSV:
        raise UserError(
            f"{spelt('topk', options.topk)}: CSV has three columns for each label, and a "
            f"spreadsheet takes no more than {_MOST_LABELS_IN_CSV} labels. JSON lines take any."
        )
    return options


def _find(sources: Sequence[str], files_from: str | None) -> Found:
    with _progress.status("Searching for pictures ..."):
        found = find_pictures(sources, files_from)
    if found.left_out is not None:
        _say(safe(found.left_out))
    return found


def _origin(url: str, options: RequestOptions) -> Origin:
    """What is known of the results before anything was asked."""
    path = url.split("?", maxsplit=1)[0].rstrip("/")
    return Origin(path.rsplit("/", maxsplit=1)[-1], "", options.topk, options.threshold)


def _classify_standard_input(url: str, options: RequestOptions, format_: Format) -> int:
    try:
        with Client(url, options) as client:
            answer = client.classify(sys.stdin.buffer.read())
    except UnavailableError as error:
        _say(f"[bold red]Stopped:[/] {safe(error)}")
        return NOT_FINISHED
    except ServiceError as error:
        _say(f"[bold red]Refused:[/] {safe(error)}")
        return SOME_REFUSED
    row = Row(STANDARD_INPUT, answer)
    origin = replace(_origin(url, options), multilabel=answer.labels is not None)
    print_header(format_, origin)
    print_row(row, format_, origin)
    print_rest([row], format_)
    _show_warnings([row])
    return 0


def _classify_files(
    found: Found,
    url: str,
    options: RequestOptions,
    at_once: int,
    format_: Format,
    output: Path | None,
) -> int:
    origin = _origin(url, options)
    run = _Run(found)
    if output is None:
        if format_ is Format.CSV:
            model = run.ask_for_model(url, options)
            # The columns depend on that; what else is known of the model says each row of its own.
            origin = replace(origin, multilabel=model is not None and model.multilabel)
        print_header(format_, origin)
        try:
            _ask(run, url, options, at_once, lambda row: print_row(row, format_, origin))
        finally:
            print_rest(run.rows, format_)
    else:
        with results_file(output, as_csv=format_ is Format.CSV, origin=origin) as results:
            _write(run, results, url, options, at_once)
    _show_warnings(run.rows)
    return run.summary()


def _write(
    run: "_Run", results: ResultsFile, url: str, options: RequestOptions, at_once: int
) -> None:
    """Asks for all that the file has no row for; `UserError` where it is from another model."""
    run.go_on_from(results)
    model = run.ask_for_model(url, options)
    if run.stopped is not None:
        return
    if model is not None:
        results.made_by(model)
    run.say_earlier(results)

    def take(row: Row) -> None:
        if row.is_final:
            results.write(row)

    _ask(run, url, options, at_once, take)
    with run.stopping():
        results.keep()


def _ask(
    run: "_Run", url: str, options: RequestOptions, at_once: int, take: Callable[[Row], None]
) -> None:
    """Asks for all pictures of the run, with a progress bar; `take` is given each row."""
    if run.stopped is not None:
        return
    with _bar(len(run.pictures)) as progress, run.stopping():
        task = progress.add_task("", total=len(run.pictures))

        def take_and_count(row: Row) -> None:
            take(row)
            run.rows.append(row)
            progress.advance(task)

        with Client(url, options, at_once) as client:
            classify_all(run.pictures, client, at_once, take_and_count)


def _bar(count: int) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_progress,
        transient=True,
        disable=count < 2 or not _progress.is_terminal,  # noqa: PLR2004  # one is done at once
    )


def _show_warnings(rows: Sequence[Row]) -> None:
    """What the server says of its model, once."""
    answers = [row.answer for row in rows if isinstance(row.answer, Classification)]
    for warning in sorted({answer.warning for answer in answers if answer.warning}):
        _say(f"[bold yellow]{safe(warning)}[/]")


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

    def ask_for_model(self, url: str, options: RequestOptions) -> ModelVersion | None:
        """Which model answers there, if the server says so."""
        with self.stopping(), Client(url, options) as client:
            return client.model()
        return None

    def say_earlier(self, results: ResultsFile) -> None:
        """What earlier runs did, and with which model."""
        if not self._earlier:
            return
        refused = len(self._refused_earlier)
        _say(
            f"{self._earlier} of {self._earlier + len(self.pictures)} are in "
            f"{safe(results.path)} already: {self._earlier - refused} classified, {refused} "
            f"refused, by {safe(results.origin.model)} {safe(results.origin.model_version)}"
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
            _say(f"[bold red]{safe(name)}[/]: {safe(problem)}")
        if len(everything) > _SHOWN_PROBLEMS:
            _say(f"and {len(everything) - _SHOWN_PROBLEMS} more")
        if self.stopped is not None:
            _say(f"[bold red]Stopped:[/] {safe(self.stopped)}")
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
