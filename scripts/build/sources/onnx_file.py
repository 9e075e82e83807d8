"""`MODEL_FILE=model.onnx`: a model that is ONNX already. Does not import PyTorch."""

import re
from pathlib import Path
from typing import Any

from scripts.build import onnx_model
from scripts.build.classes import classes_from_text
from scripts.build.sources.source import Source
from scripts.store import sha256

# The keys under which exporters keep class names: Ultralytics' is the first.
_CLASS_KEYS = ("names", "classes", "labels")


def open_source(path: Path) -> Source:
    """Read the file with its metadata: the classes and the size of the input."""
    model = onnx_model.read(path)
    metadata = {entry.key: entry.value for entry in model.proto.metadata_props}
    names = next((metadata[key] for key in _CLASS_KEYS if metadata.get(key)), None)
    side = re.fullmatch(r"\[(\d+), ?\1\]", metadata.get("imgsz", ""))
    fixed: dict[str, Any] = {}
    if model.input.side:
        fixed["crop"] = model.input.side
    if model.input.dtype == "uint8":
        # The model itself normalizes images.
        fixed |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return Source(
        architecture=path.name,
        file=path.name,
        sha256=sha256(path),
        outputs=model.outputs,
        preprocessing={"crop": int(side[1])} if side else {},
        fixed=fixed,
        labels=classes_from_text(names, f"metadata of {path.name}") if names else None,
        model=model,
    )
