"""`ACTIVATION=sigmoid`: each class for itself, from its own threshold on.

A threshold is one number for all classes, or a file of them: JSON, such as
{"cat": 0.4, "dog": 0.55}, with each class by its id or its name.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handler.labels import Label
from handler.settings import ACTIVATIONS
from scripts.terminal import UserError

# Where a class is as probable as not.
EVEN = 0.5

_FORM = (
    'It must be JSON with a number from 0 to 1 for each class, such as {"cat": 0.4, "dog": 0.55}.'
)
_SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Activation:
    """How logits become probabilities.

    Attributes:
        name: of `ACTIVATIONS`.
        threshold: from which on a class is a label, for sigmoid: one number, or the file of them.
    """

    name: str = "softmax"
    threshold: float | Path = EVEN

    def thresholds(self, labels: Sequence[Label]) -> tuple[float, ...]:
        """One for each class with sigmoid, none with softmax; `UserError` where one is missing."""
        if self.name != "sigmoid":
            return ()
        if isinstance(self.threshold, Path):
            return read_thresholds(self.threshold, labels)
        return (self.threshold,) * len(labels)


SOFTMAX = Activation()


def choose(name: str, thresholds: str | None = None) -> Activation:
    """What a person asked for, checked as far as the classes are not needed.

    Args:
        name: of `ACTIVATIONS`.
        thresholds: a number, or the name of a file; None for one half.

    Raises:
        UserError: there is no such activation, or it has no thresholds, or these cannot be used.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"ACTIVATION must be {' or '.join(ACTIVATIONS)}, got {name!r}.")
    if thresholds is None:
        return Activation(name)
    if name != "sigmoid":
        raise UserError(
            "THRESHOLDS is for models that give several labels a picture: ACTIVATION=sigmoid. With "
            "softmax the threshold is a setting of the server, in handler/model-config.yaml."
        )
    try:
        number = float(thresholds)
    except ValueError:
        if Path(thresholds).is_file():
            return Activation(name, Path(thresholds))
        raise UserError(
            "THRESHOLDS must be a number from 0 to 1 or a file of them, and there is no file "
            f"{thresholds}."
        ) from None
    if not 0 <= number <= 1:
        raise UserError(f"THRESHOLDS must be from 0 to 1, got {thresholds}.")
    return Activation(name, number)


def read_thresholds(path: Path, labels: Sequence[Label]) -> tuple[float, ...]:
    """The threshold of each class, by position.

    Args:
        path: JSON, an object with a number from 0 to 1 for each class by its id or its name.
        labels: the classes.

    Raises:
        UserError: the file cannot be read, or names other classes than these, or other numbers.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"The thresholds {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The thresholds {path} are no JSON: {error}. {_FORM}") from error
    if not isinstance(content, dict):
        raise UserError(f"The thresholds {path} name no classes. {_FORM}")
    found = _by_position(content, labels, path)
    missing = [label.class_id for index, label in enumerate(labels) if index not in found]
    if missing:
        raise UserError(f"{path} has no threshold for {_some(missing)}. {_FORM}")
    return tuple(found[index] for index in range(len(labels)))


def _by_position(
    content: Mapping[str, object], labels: Sequence[Label], path: Path
) -> dict[int, float]:
    positions = positions_of(labels)
    strange = [name for name in content if name not in positions]
    if strange:
        raise UserError(
            f"{path} has thresholds for what is no class of the model: {_some(strange)}. Its "
            f"classes are {_some([label.class_id for label in labels])}."
        )
    found: dict[int, float] = {}
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(
                f"{path}: the threshold of {name} must be a number from 0 to 1, got {value!r}."
            )
        if positions[name] in found:
            raise UserError(f"{path} has two thresholds for the class {name}.")
        found[positions[name]] = float(value)
    return found


def positions_of(labels: Sequence[Label]) -> dict[str, int]:
    """The positions of classes by id, and by each name that only one of them has."""
    counts = Counter(label.class_name for label in labels)
    unique = {
        label.class_name: index
        for index, label in enumerate(labels)
        if counts[label.class_name] == 1
    }
    return unique | {label.class_id: index for index, label in enumerate(labels)}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return ", ".join(names[:_SHOWN_CLASSES]) + more
