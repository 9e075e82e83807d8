"""Write `handler/index_to_name.json` from the ImageNet class ids and names that timm contains."""

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from handler.labels import Label
from scripts.terminal import command, step

TARGET = Path("handler/index_to_name.json")


def class_index() -> list[Label]:
    """Return 1,000 classes, such as `("n01440764", "tench")`, by their position in the logits.

    As in the class index of Keras' and PyTorch's tutorials, the name is the first lemma of the
    class's WordNet synset with underscores for spaces.
    """
    info = files("timm") / "data" / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text("utf-8").split()
    lemmas = dict(
        line.split("\t", 1)
        for line in (info / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    )
    return [
        Label(synset, lemmas[synset].split(",")[0].strip().replace(" ", "_")) for synset in synsets
    ]


def as_json(labels: Iterable[Label]) -> str:
    """Return the file's text: one class per line, so that a change can be read."""
    rows = [f'  "{index}": {json.dumps(label)}' for index, label in enumerate(labels)]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main() -> None:
    """Write the class index."""
    text = as_json(class_index())
    TARGET.write_text(text, "utf-8")
    step(f"Class index: wrote {TARGET}, {text.count('[')} classes")


if __name__ == "__main__":
    command(main)
