"""Classify the images of an evaluation on the server, with a progress bar."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from classification_client import (
    Classification,
    Client,
    RejectedError,
    RequestOptions,
    Row,
    ServiceError,
    classify_all,
)
from handler.labels import Label
from scripts.terminal import UserError, console

# `topk` for all classes: no model has more.
ALL_CLASSES = 1_000_000
# If the server rejects this many images, the cause is not a few corrupt ones.
_MAX_TRIES = 20


class Model(NamedTuple):
    """A served model: its classes by position, its kind, the server's warning, name and version."""

    labels: Sequence[Label]
    multilabel: bool
    warning: str | None
    name: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The server's answers to images whose classes are known.

    Attributes:
        model: the model, with its classes by position.
        images: the classified images, in the order of the rows of the arrays.
        rejected: images without a result, which are not counted.
    """

    model: Model
    images: Sequence[Path]
    rejected: Sequence[Row]

    @property
    def names(self) -> list[str]:
        """Return the names of the classes by position."""
        return [label.class_name for label in self.model.labels]


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        raise UserError(str(error)) from error


@_user_errors()
def describe(images: Iterable[Path], url: str, options: RequestOptions) -> Model:
    """Return the model's description from the response to the first accepted image.

    Raises `UserError` if the server is not available or rejects the first `_MAX_TRIES` images.
    """
    problem: Exception | None = None
    with Client(url, replace(options, topk=ALL_CLASSES)) as client:
        for image in islice(images, _MAX_TRIES):
            try:
                answer = client.classify(image)
            except (OSError, RejectedError) as error:
                problem = error
                continue
            rows = sorted(answer.predictions, key=lambda row: row.class_index)
            labels = [Label(row.class_id, row.label) for row in rows]
            name = "" if answer.model is None else str(answer.model)
            return Model(labels, answer.labels is not None, answer.warning, name)
    raise UserError(f"The server classified none of the first images: {problem}")


@_user_errors()
def classify(
    images: Iterable[Path], url: str, options: RequestOptions, at_once: int
) -> tuple[dict[Path, Classification], list[Row]]:
    """Return the images' classifications, and a row for each image without one.

    Raises `UserError` if the server is not available or classifies no image, or its model changes.
    """
    images, rows = list(images), list[Row]()
    with (
        Client(url, options, at_once) as client,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("Classifying ...", total=len(images))

        def take(row: Row) -> None:
            rows.append(row)
            progress.advance(task)

        classify_all(images, client, at_once, take)
    found = {Path(row.image): row.answer for row in rows if isinstance(row.answer, Classification)}
    if not found:
        raise UserError(f"The server classified none of the images: {rows[0].problem}")
    models = sorted({str(answer.model) for answer in found.values() if answer.model is not None})
    if len(models) > 1:
        raise UserError(f"The model was changed meanwhile: {', then '.join(models)}. Run it again.")
    return found, [row for row in rows if row.problem is not None]
