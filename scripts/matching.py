"""Which of a model's classes a person means, by id or by name, however it is spelt."""

import difflib
from collections.abc import Collection, Iterable, Sequence

from handler.labels import Label
from scripts.terminal import UserError

# Of the classes that a name may be meant for, or of a model that has few.
_SHOWN_CLASSES = 12
# Of two names, from 0 to 1: `other` and `otter` reach 0.8, `zebras` and `zebra` 0.9.
_SIMILAR = 0.84


def match(
    names: Collection[str], labels: Sequence[Label], called: str, instead: str
) -> dict[str, int]:
    """The position of the class that each name means: by id, else by name, however it is spelt.

    Args:
        names: as a person wrote them.
        labels: the model's classes, by position.
        called: where the names stand, for messages: "as a folder is called".
        instead: what to do where a name could be several classes: "Call the folder by id".

    Raises:
        UserError: a name is no class, or could be several.
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
    """The positions of the classes that each name can mean, none or several too: see `match`."""
    by_id = {label.class_id: index for index, label in enumerate(labels)}
    by_name: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_name.setdefault(_plain(label.class_name), []).append(index)
    return {
        name: [by_id[name]] if name in by_id else by_name.get(_plain(name), []) for name in names
    }


def _similar(name: str, labels: Sequence[Label]) -> str:
    """A sentence on the classes that a name may be meant for; on all of them if they are few."""
    by_name = {_plain(label.class_name): label for label in labels}
    words = _words(name)
    # A folder `cat` means the cats; one whose name is nearly that of a class is misspelt.
    found = [label for other, label in by_name.items() if words and words <= _words(other)]
    found = found or [
        by_name[other] for other in difflib.get_close_matches(_plain(name), by_name, 3, _SIMILAR)
    ]
    if found:
        return f"Similar are: {', '.join(map(_shown, found[:_SHOWN_CLASSES]))}."
    if len(labels) <= _SHOWN_CLASSES:
        return f"Its classes are: {', '.join(map(_shown, labels))}."
    examples = ", ".join(map(_shown, labels[:2]))
    return f"It has {len(labels)} classes, such as {examples}. Call classes by name or by id."


def _shown(label: Label) -> str:
    same = label.class_id == label.class_name
    return label.class_name if same else f"{label.class_name} ({label.class_id})"


def _words(name: str) -> set[str]:
    """In the singular, as far as that is a matter of an s."""
    return {word.removesuffix("s") for word in _plain(name).split()}


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").strip().lower()
