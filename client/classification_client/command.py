"""The command `classify`: classify any number of images, and print or save the results."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from classification_client import embeddings
from classification_client.bulk import classify_all
from classification_client.client import Client, RequestOptions, check_address
from classification_client.errors import ClientError, ServiceError, UserError
from classification_client.images import Found, find_images
from classification_client.printing import LINES, Format, print_results
from classification_client.responses import Classification
from classification_client.results import Row, as_line, csv_columns, csv_line
from classification_client.results_file import results_file
from classification_client.terminal import errors, program, run, safe

# The address of `make run`.
URL = "http://127.0.0.1:8080/predictions/densenet121"
AT_ONCE = 8
# Exit statuses in addition to 0 (all images were classified) and those of `terminal.run`.
NOT_FINISHED, SOME_REJECTED = 3, 4
# Maximum number of images listed in the summary because they were not classified.
_SHOWN_PROBLEMS = 20

FormatOption = Annotated[Format | None, typer.Option(help="How to print.")]
OutputOption = Annotated[
    Path | None, typer.Option(help="A .jsonl or .csv to resume; embeddings as .npy, .parquet.")
]
TopkOption = Annotated[int | None, typer.Option(min=1, help="Predictions per image.")]
ThresholdOption = Annotated[float | None, typer.Option(min=0, max=1, help="Confidence threshold.")]
KeyOption = Annotated[
    str | None, typer.Option(envvar="CLASSIFY_KEY", help="For a gateway.", show_envvar=True)
]


def main(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders, patterns in quotes; - is an image on standard input."),
    ] = None,
    files_from: Annotated[
        str | None, typer.Option(help="A list of files, one per line; - is standard input.")
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="CLASSIFY_URL", help="URL to which images are sent.")
    ] = URL,
    format: FormatOption = None,  # the option's name
    output: OutputOption = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = AT_ONCE,
    topk: TopkOption = None,
    threshold: ThresholdOption = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is busy or gone.")
    ] = RequestOptions.patience,
    key: KeyOption = None,
) -> int:
    """Classify images with a running server.

    Exit status: 0 all were classified, 4 some were rejected, 3 some are left, 1 nothing could be
    done, 130 Ctrl-C.
    """
    options = RequestOptions(topk=topk, threshold=threshold, patience=patience, key=key)
    try:
        check_address(url)
    except ValueError as error:
        raise UserError(str(error)) from error
    return classify(images or [], url, options, files_from, format, output, at_once)


def start() -> NoReturn:
    """Run the command."""
    run(program(main))


def classify(
    images: Sequence[str],
    url: str,
    options: RequestOptions,
    files_from: str | None = None,
    format_: Format | None = None,
    output: Path | None = None,
    at_once: int = AT_ONCE,
) -> int:
    """Classify the named images, print or save the results, and return the exit status.

    The parameters are those of `main`. If `options.topk` is None, tables and CSV have one label per
    image.

    Raises:
        UserError: no image could be classified.
    """
    suffix = output.suffix.lower() if output else ""
    if output and suffix in embeddings.PACKAGES:
        embeddings.check_writable(output)
        options = replace(options, embedding=True, topk=1)
    elif output:
        format_ = format_ or {".jsonl": Format.JSONL, ".csv": Format.CSV}.get(suffix)
        if format_ not in LINES:
            raise UserError(f"{output} must end in .jsonl, .csv, .npy or .parquet.")
    if output and [*images] == ["-"]:
        raise UserError("An image on standard input has no name to go into a file.")
    with errors.status("Searching for images ..."):
        found = find_images(images, files_from)
    if found.left_out is not None:
        errors.print(safe(found.left_out))
    format_ = format_ or (Format.TEXT if len(found.images) == 1 else Format.TABLE)
    if format_ in {Format.TABLE, Format.CSV}:
        options = replace(options, topk=options.topk or 1)
    with Client(url, options, at_once) as client:
        batch = _Batch(found, client, at_once)
        if output and suffix in embeddings.PACKAGES:
            batch.write_embeddings(output)
        else:
            batch.write_rows(format_, output)
    return batch.summary()


class _Batch:
    """The images of a run and their results."""

    def __init__(self, found: Found, client: Client, at_once: int) -> None:
        self._images, self._client, self._at_once = found.images, client, at_once
        self._closed = [(str(folder), f"cannot be read: {w}") for folder, w in found.closed.items()]
        self._earlier: dict[str, str | None] = {}
        self._rows: list[Row] = []
        self._stopped: ClientError | None = None
        self._began = time.monotonic()

    def write_rows(self, format_: Format, output: Path | None) -> None:
        """Classify the images; print the results, or append those that are missing in a file."""
        options, columns = self._client.options, None
        name = self._client.url.partition("?")[0].rstrip("/").rpartition("/")[2]
        made_with: dict[str, Any] = {"model": name, "model_version": ""}
        made_with |= {"topk": options.topk, "threshold": options.threshold}
        try:
            model = self._client.model() if output or format_ is Format.CSV else None
        except ServiceError as error:
            self._stopped = error
            return
        if model:
            made_with |= {"model": model.name, "model_version": model.version}
        if format_ is Format.CSV:
            columns = csv_columns(options.topk or 1, multilabel=bool(model and model.multilabel))
        if output:
            with results_file(output, made_with, columns) as results:
                self._skip(results.done, output)
                self._classify(lambda row: results.write(row) if row.is_final else None)
            return
        print(csv_line(columns) if columns else "", end="")
        try:
            self._classify(
                lambda row: (
                    format_ in LINES and print(as_line(row, made_with, columns), end="", flush=True)
                )
            )
        finally:
            print_results(self._rows, format_)

    def write_embeddings(self, output: Path) -> None:
        """Classify the images, then write all embeddings in the same order."""
        self._classify(lambda _: None)
        vectors = {
            row.image: row.answer.embedding
            for row in self._rows
            if isinstance(row.answer, Classification) and row.answer.embedding is not None
        }
        if self._stopped is None:
            names = [str(image) for image in self._images if str(image) in vectors]
            embeddings.write(output, names, [vectors[name] for name in names])
            errors.print(f"{len(names)} embeddings are in {safe(output)}")

    def _skip(self, done: Mapping[str, str | None], output: Path) -> None:
        """Skip the images that the file of results holds."""
        self._earlier = {name: done[name] for name in map(str, self._images) if name in done}
        if self._earlier:
            errors.print(f"{len(self._earlier)} of {len(self._images)} are in {safe(output)}")
        self._images = [image for image in self._images if str(image) not in done]

    def _classify(self, take: Callable[[Row], object]) -> None:
        """Classify the images with a progress bar, and call `take` with each row."""

        def take_and_count(row: Row) -> None:
            take(row)
            self._rows.append(row)
            progress.advance(task)

        bar = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = errors.is_terminal and len(self._images) > 1
        try:
            with Progress(*bar, console=errors, transient=True, disable=not shown) as progress:
                task = progress.add_task("", total=len(self._images))
                classify_all(self._images, self._client, self._at_once, take_and_count)
        except (ServiceError, UserError) as error:
            self._stopped = error

    def summary(self) -> int:
        """Print the counts and the images without a classification; return the exit status."""
        answers = [row.answer for row in self._rows if isinstance(row.answer, Classification)]
        for warning in sorted({answer.warning for answer in answers if answer.warning}):
            errors.print(f"[bold yellow]{safe(warning)}[/]")
        now = {row.image: row.problem for row in self._rows}
        failed = [(name, why) for name, why in [*self._earlier.items(), *now.items()] if why]
        left = len(self._images) - sum(row.is_final for row in self._rows)
        problems = [*self._closed, *failed]
        if len(self._images) > 1 or problems or self._earlier or self._stopped:
            seconds = time.monotonic() - self._began
            errors.print(
                f"{len(now) + len(self._earlier) - len(failed)} classified, {len(failed)} failed, "
                f"{left} left; {len(now)} by this run, {seconds:.1f} s ({len(now) / seconds:.1f}/s)"
            )
        for name, problem in problems[:_SHOWN_PROBLEMS]:
            errors.print(f"[bold red]{safe(name)}[/]: {safe(problem)}")
        if len(problems) > _SHOWN_PROBLEMS:
            errors.print(f"and {len(problems) - _SHOWN_PROBLEMS} more")
        if self._stopped is not None:
            errors.print(f"[bold red]Stopped:[/] {safe(self._stopped)}")
        elif not left:
            return SOME_REJECTED if problems else 0
        if self._stopped is None or not self._stopped.is_permanent:
            errors.print("Run the same command again to do the rest.")
        return NOT_FINISHED
