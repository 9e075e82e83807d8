"""The confidence thresholds of a multi-label model: one number, or one for each class."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from handler.labels import Label
from scripts.build.messages import listed, read_bytes
from scripts.matching import match
from scripts.terminal import UserError

# The default threshold.
EVEN = 0.5

_FORM = '{"cat": 0.4, "dog": 0.55}: a number from 0 to 1 for each class by its id or name'


def resolve(
    given: float | Path | Mapping[str, object] | None, labels: Sequence[Label]
) -> tuple[float, ...]:
    """Return the threshold of each class, by position.

    `given` is a number for all classes, a mapping of class to number, or a JSON file of that; None
    is one half.
    """
    if given is None or isinstance(given, float):
        return (EVEN if given is None else given,) * len(labels)
    source, content = "thresholds", given
    if isinstance(given, Path):
        source, data = str(given), read_bytes(given, "thresholds")
        try:
            content = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"The thresholds {given} cannot be read: {error}.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"The thresholds {source} must hold {_FORM}.")
    positions = match(list(content), labels, f"as {source} has it", "Use its id")
    found: dict[int, float] = {}
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(
                f"{source}: the threshold of {name} must be a number from 0 to 1, got {value!r}."
            )
        if positions[name] in found:
            raise UserError(f"{source} has two thresholds for the class {name}.")
        found[positions[name]] = float(value)
    missing = [label.class_id for index, label in enumerate(labels) if index not in found]
    if missing:
        raise UserError(f"{source} has no threshold for {listed(missing)}. It must hold {_FORM}.")
    return tuple(found[index] for index in range(len(labels)))
