"""An archive without files, for tests of what depends on its model card, labels or settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.archive import Archive
from handler.labels import Label
from handler.settings import ModelCard, Settings


def archive(labels: Sequence[Label] = (), settings: Settings | None = None, **card: Any) -> Archive:
    """Return an archive of these parts; without labels it has one class."""
    fields: dict[str, Any] = {
        "architecture": "densenet121",
        "classes": max(1, len(labels)),
        "trained": True,
        "weights_file": "",
        "weights_sha256": "",
        "inputs_sha256": "",
    }
    return Archive(
        Path("model.onnx"),
        ModelCard(**{**fields, **card}),
        labels,
        settings or Settings(),
        "m",
        "1",
    )
