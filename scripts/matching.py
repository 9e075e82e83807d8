"""Match class names, as users write them, to a model's classes."""

import difflib
from collections.abc import Collection, Iterable, Sequence

from handler.labels import Label
from scripts.terminal import UserError

# Classes that a message lists: similar ones, or all if the model has no more than this.
_MAX_SHOWN_CLASSES = 12
# difflib's ratio, 0 to 1: `other` and `otter` reach 0.8, `zebras` and `zebra` 0.9.
_MIN_SIMILARITY = 0.84


def match(
    names: Collection[str], labels: Sequence[Label], called: str, instead: str
) -> dict[str, int]:
    """Return the position of each name's class; ids take precedence over names.

    In names, case is ignored, and `_` and `-` count as spaces.

    Args:
        names: ids or names, as the user wrote them.
        labels: the model's classes, by position.
        called: origin of the names, for messages, such as "as a folder is called".
        instead: remedy if several classes share a name, such as "Call the folder by id".

    Raises:
        UserError: a name matches no class, or several.
    """
    found = {}
    for name, matches in meanings(sorted(names), labels).items():
        if not matches:
            raise UserError(f"The model has no class {name!r}, {called}. {_similar(name, labels)}")
        if len(matches) > 1:
            ids = ", ".join(labels[index].class_id for index in matches)
            raise UserError(f"Several classes are called {name!r}. {instead}: {ids}.")
        found[name] = matches[0]
    return found


def meanings(names: Iterable[str], labels: Sequence[Label]) -> dict[str, list[int]]:
    """Return the positions, possibly none, of all classes that match each name as in `match`."""
    by_id = {label.class_id: index for index, label in enumerate(labels)}
    by_name: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_name.setdefault(_plain(label.class_name), []).append(index)
    return {
        name: [by_id[name]] if name in by_id else by_name.get(_plain(name), []) for name in names
    }


def _similar(name: str, labels: Sequence[Label]) -> str:
    """Return a sentence that lists similar classes; if there are none, all classes or examples."""
    by_name = {_plain(label.class_name): label for label in labels}
    words = _words(name)
    # Classes with all words of the name (`cat`: `tiger_cat`); if there are none, similar spellings.
    found = [label for other, label in by_name.items() if words and words <= _words(other)]
    close = difflib.get_close_matches(_plain(name), by_name, cutoff=_MIN_SIMILARITY)
    found = found or [by_name[other] for other in close]
    if found:
        return f"Similar are: {', '.join(map(_shown, found[:_MAX_SHOWN_CLASSES]))}."
    if len(labels) <= _MAX_SHOWN_CLASSES:
        return f"Its classes are: {', '.join(map(_shown, labels))}."
    examples = ", ".join(map(_shown, labels[:2]))
    return f"It has {len(labels)} classes, such as {examples}. Call classes by name or by id."


def _shown(label: Label) -> str:
    same = label.class_id == label.class_name
    return label.class_name if same else f"{label.class_name} ({label.class_id})"


def _words(name: str) -> set[str]:
    """Return a name's words, each without the s of a plural."""
    return {word.removesuffix("s") for word in _plain(name).split()}


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").strip().lower()
