"""Format one row per image as JSON lines or CSV."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from classification_client.errors import RejectedError, ServiceError, TransientError
from classification_client.responses import Classification


@dataclass(frozen=True)
class Row:
    """The result of one image: its name as given, and its classification or error."""

    image: str
    answer: Classification | ServiceError | OSError

    @property
    def is_final(self) -> bool:
        """Return whether another run would have the same result; false after transient errors."""
        if isinstance(self.answer, ServiceError):
            return isinstance(self.answer, RejectedError) and self.answer.is_about_the_image
        return not isinstance(self.answer, TransientError)

    @property
    def problem(self) -> str | None:
        """Return the message of the image's error; None if it has a classification."""
        if isinstance(self.answer, OSError):
            return f"cannot be read: {self.answer.strerror or self.answer}"
        return str(self.answer) if isinstance(self.answer, ServiceError) else None

    @property
    def model(self) -> dict[str, str]:
        """Return the columns with the model that responded; empty if it is unknown."""
        model = getattr(self.answer, "model", None)
        return {"model": model.name, "model_version": model.version} if model else {}


def as_line(row: Row, made_with: Mapping[str, Any], columns: Sequence[str] | None) -> str:
    """Return a row as a line of CSV with these columns, or of JSON if `columns` is None.

    Each row contains `made_with`: `model`, `model_version`, `topk` and `threshold`, so that results
    of different models or options cannot be confused.
    """
    values: dict[str, Any] = {"picture": row.image}
    if isinstance(row.answer, Classification):
        values |= (_json_values if columns is None else _csv_values)(row.answer)
    else:
        values["error"] = row.problem
    values |= {**made_with, **row.model}
    return json.dumps(values) + "\n" if columns is None else csv_line(map(values.get, columns))


def in_words(row: Mapping[str, Any]) -> str:
    """Return a row's model and options as text; raise `KeyError` if the row lacks them."""
    options = {name: row[name] for name in ("topk", "threshold")}
    given = [f"--{name} {value}" for name, value in options.items() if value not in {None, ""}]
    return " ".join([row["model"], row["model_version"], *given])


def csv_columns(topk: int, *, multilabel: bool) -> tuple[str, ...]:
    """Return the names of the CSV columns, three per label."""
    labels = [name for place in range(topk) for name in _label_columns(place)]
    every = ["labels"] if multilabel else []
    made_with = ("model", "model_version", "topk", "threshold")
    return ("picture", *labels, *every, "recognized", "error", "warning", *made_with)


def csv_line(values: Iterable[Any]) -> str:
    """Return a line of CSV with all values quoted."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(values)
    return text.getvalue()


def _json_values(answer: Classification) -> dict[str, Any]:
    labels = None if answer.labels is None else [vars(label) for label in answer.labels]
    optional = {"labels": labels, "warning": answer.warning}
    return {
        "label": answer.label,
        "class_id": answer.best.class_id,
        "probability": answer.probability,
        "recognized": answer.recognized,
        "predictions": [vars(prediction) for prediction in answer.predictions],
        **{name: value for name, value in optional.items() if value is not None},
    }


def _csv_values(answer: Classification) -> dict[str, Any]:
    names = [label.label for label in answer.labels or ()]
    values: dict[str, Any] = {"labels": json.dumps(names, ensure_ascii=False)}
    values |= {"recognized": str(answer.recognized).lower(), "warning": answer.warning}
    # The best label comes first; it need not be the most probable class.
    others = [prediction for prediction in answer.predictions if prediction != answer.best]
    for place, label in enumerate([answer.best, *others]):
        label_values = (label.label, label.probability, label.class_id)
        values |= zip(_label_columns(place), label_values, strict=True)
    return values


def _label_columns(place: int) -> list[str]:
    suffix = f"_{place + 1}" if place else ""
    return [f"{name}{suffix}" for name in ("label", "probability", "class_id")]
