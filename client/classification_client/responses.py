"""The service's responses: predictions, labels, an embedding, and the model they are from."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelVersion:
    """The model that responded; `version` changes with every change of its archive."""

    name: str
    version: str
    multilabel: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class Prediction:
    """One class, its probability, 0 to 1, and its position in the model's logits."""

    label: str
    probability: float
    class_id: str
    class_index: int


@dataclass(frozen=True)
class Classification:
    """The service's response for one image.

    Attributes:
        predictions: the `RequestOptions.topk` most probable classes, most probable first.
        recognized: whether the most probable class reaches the confidence threshold; for a
            multi-label model, whether any class reaches its own threshold.
        warning: a warning about the model, such as that it is untrained.
        model: the model that responded; None if the server does not report it.
        labels: for a multi-label model, all classes that reach their threshold, most probable
            first.
        embedding: float32 (channels,), the pooled last features; None unless requested.
    """

    predictions: tuple[Prediction, ...]
    recognized: bool
    warning: str | None = None
    model: ModelVersion | None = None
    labels: tuple[Prediction, ...] | None = None
    embedding: Sequence[float] | None = None

    @property
    def best(self) -> Prediction:
        """Return the most probable label, or without labels the top-1 prediction."""
        return (self.labels or self.predictions)[0]

    @property
    def label(self) -> str:
        """Return the name of `best`, recognized or not."""
        return self.best.label

    @property
    def probability(self) -> float:
        """Return the probability of `best`, 0 to 1."""
        return self.best.probability

    @property
    def all_labels(self) -> list[Prediction]:
        """Return the requested predictions and all labels, most probable first."""
        more = [label for label in self.labels or () if label not in self.predictions]
        return sorted([*self.predictions, *more], key=lambda label: -label.probability)

    @classmethod
    def from_response(
        cls, body: Mapping[str, Any], model: ModelVersion | None = None
    ) -> "Classification":
        """Parse the server's response for one image; raise `ValueError` for any other body."""
        warning, labels, values = map(body.get, ("warning", "labels", "embedding"))
        try:
            answer = cls(
                predictions=_predictions(body["predictions"]),
                recognized=bool(body["recognized"]),
                warning=None if warning is None else str(warning),
                model=model,
                labels=None if labels is None else _predictions(labels),
                embedding=None if values is None else array("f", values),  # a tenth of a tuple
            )
            answer.predictions[0]
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"not an answer of this service: {error}") from error
        return answer


def _predictions(rows: Iterable[Any]) -> tuple[Prediction, ...]:
    kinds = {"label": str, "probability": float, "class_id": str, "class_index": int}
    return tuple(Prediction(**{key: kind(row[key]) for key, kind in kinds.items()}) for row in rows)
