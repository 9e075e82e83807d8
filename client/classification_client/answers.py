"""What the service answers: predictions, labels, an embedding, and which model they are from."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelVersion:
    """Which model answered; `version` is its archive's and changes with everything in it."""

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
    """The service's answer to one image.

    Attributes:
        predictions: most probable first, as many as `RequestOptions.topk`.
        recognized: whether the best class reaches the confidence threshold; of a multi-label
            model, whether any class reaches its own.
        warning: what must be known about the model, such as that it is untrained.
        model: which one answered; None if the server does not report it.
        labels: of a multi-label model, all classes that reach their threshold, best first.
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
        """The best label; without one the top-1 prediction, recognized or not."""
        return (self.labels or self.predictions)[0]

    @property
    def label(self) -> str:
        """The best class's name, recognized or not."""
        return self.best.label

    @property
    def probability(self) -> float:
        """The best class's probability, 0 to 1."""
        return self.best.probability

    @property
    def all_labels(self) -> list[Prediction]:
        """The requested predictions and every label, most probable first."""
        more = [label for label in self.labels or () if label not in self.predictions]
        return sorted([*self.predictions, *more], key=lambda label: -label.probability)

    @classmethod
    def from_answer(
        cls, body: Mapping[str, Any], model: ModelVersion | None = None
    ) -> "Classification":
        """Parse the server's answer to one image; `ValueError` if it is anything else."""
        warning, labels, values = map(body.get, ("warning", "labels", "embedding"))
        try:
            answer = cls(
                predictions=_predictions(body["predictions"]),
                recognized=bool(body["recognized"]),
                warning=None if warning is None else str(warning),
                model=model,
                labels=None if labels is None else _predictions(labels),
                embedding=None if values is None else array("f", values),  # a tenth of a tuple's
            )
            answer.predictions[0]
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"not an answer of this service: {error}") from error
        return answer


def _predictions(rows: Iterable[Any]) -> tuple[Prediction, ...]:
    kinds = {"label": str, "probability": float, "class_id": str, "class_index": int}
    return tuple(Prediction(**{key: kind(row[key]) for key, kind in kinds.items()}) for row in rows)
