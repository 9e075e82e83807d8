"""Asks a server about all pictures of an evaluation, with a progress bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from classification_client import Classification, Client, RefusedError, Row, classify_all
from handler.labels import Label
from scripts.terminal import UserError, console, warn

# Asks for all classes: more than a model can have.
ALL = 1_000_000
# Pictures to learn the model's classes from; more than these are not all damaged.
_TRIES_FOR_CLASSES = 20
_SHOWN_REFUSALS = 10


@dataclass(frozen=True)
class Answers:
    """What the server said.

    Attributes:
        pictures: those that it classified.
        answers: what it said of each.
        refused: those without an answer.
        warning: what the server says of the model, if anything.
    """

    pictures: Sequence[Path]
    answers: Sequence[Classification]
    refused: Sequence[Row]
    warning: str | None


def first_answer(pictures: Sequence[Path], client: Client) -> Classification:
    """What the server says of the first picture that it does not refuse, with all its classes."""
    problem: Exception | None = None
    with client:
        for picture in pictures[:_TRIES_FOR_CLASSES]:
            try:
                return client.classify(picture)
            except (OSError, RefusedError) as error:  # noqa: PERF203  # each on its own
                problem = error
    raise UserError(f"The server classified none of the first pictures: {problem}")


def classes(answer: Classification) -> list[Label]:
    """The model's classes by position, from an answer that has all of them."""
    rows = sorted(answer.predictions, key=lambda row: row.class_index)
    return [Label(row.class_id, row.label) for row in rows]


def ask(pictures: Sequence[Path], client: Client, at_once: int) -> Answers:
    """Classifies all pictures.

    Raises:
        UserError: none was classified, or by several versions of the model.
        ServiceError: the server cannot be asked.
    """
    rows = _classify(pictures, client, at_once)
    good = [(Path(row.image), row.answer) for row in rows]
    found = [(path, answer) for path, answer in good if isinstance(answer, Classification)]
    if not found:
        raise UserError(f"The server classified none of the pictures: {rows[0].problem}")
    answers = [answer for _, answer in found]
    models = sorted({str(answer.model) for answer in answers if answer.model is not None})
    if len(models) > 1:
        raise UserError(f"The model was changed meanwhile: {', then '.join(models)}. Run it again.")
    return Answers(
        [path for path, _ in found],
        answers,
        [row for row in rows if row.problem is not None],
        answers[0].warning,
    )


def _classify(pictures: Sequence[Path], client: Client, at_once: int) -> list[Row]:
    rows: list[Row] = []

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Asking the server ...", total=len(pictures))

        def take(row: Row) -> None:
            rows.append(row)
            progress.advance(task)

        with client:
            classify_all(pictures, client, at_once, take)
    return rows


def warn_of_refused(refused: Sequence[Row]) -> None:
    """Names the pictures that count nowhere, or how many there are."""
    for row in refused[:_SHOWN_REFUSALS]:
        warn(f"Not counted: {row.image}: {row.problem}")
    if len(refused) > _SHOWN_REFUSALS:
        warn(f"Not counted: {len(refused) - _SHOWN_REFUSALS} more pictures")
