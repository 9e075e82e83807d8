"""Pack a model archive (`.mar`): the same inputs give the same bytes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from handler.labels import CLASS_INDEX, Label
from handler.settings import MODEL_CARD, ModelCard
from scripts.build.convert import Converted
from scripts.terminal import UserError

BUILD = Path("build")
HANDLER = Path("handler")
ENTRY = HANDLER / "densenet_handler.py"
# Python imports it by its name, so it must be in the same folder as the entry.
AT_START = HANDLER / "sitecustomize.py"
MODEL_CONFIG = HANDLER / "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
VERSION = "1.0"

# The earliest time of zip files; the time of the build would make every build different.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_CREATED_ON = "01/01/1980 00:00:00"


def handler_files() -> list[Path]:
    """Return all that the handler needs at run time, in a fixed order."""
    return sorted(
        path
        for path in HANDLER.rglob("*")
        if path.suffix in {".py", ".html", ".yaml", ".json"} and path.is_file()
    )


def pack(
    card: ModelCard,
    name: str,
    labels: Sequence[Label],
    model: Converted,
    extra: Path,
    archive: Path,
    threshold: float | None = None,
) -> None:
    """Run `torch-model-archiver`, and zip its result so that the same files give the same bytes.

    Args:
        card: the model card.
        name: of the model.
        labels: a class per position of the logits.
        model: as the engine reads it; the file is called model.onnx or model.pth.
        extra: a folder of further files for the archive; those of the handler are added to it.
        archive: the file to write.
        threshold: of this model; None for that of `MODEL_CONFIG`.
    """
    (extra / MODEL_CARD).write_text(card.to_json())
    (extra / CLASS_INDEX).write_text(class_index(labels), "utf-8")
    if model.classifier.exists():
        shutil.copy(model.classifier, extra)
    for path in handler_files():
        if path.suffix in {".py", ".html"} and path != ENTRY:
            target = extra / (path.name if path == AT_START else path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    config = MODEL_CONFIG
    if threshold is not None:
        values = yaml.safe_load(config.read_text())
        values["handler"]["threshold"] = threshold
        config = extra.parent / MODEL_CONFIG.name
        config.write_text(yaml.safe_dump(values, sort_keys=False))
    with tempfile.TemporaryDirectory(dir=extra.parent) as work:
        _run_archiver(
            [
                *("--model-name", name),
                *("--version", VERSION if card.trained else f"{VERSION}-untrained"),
                *("--handler", str(ENTRY)),
                *("--serialized-file", str(model.file)),
                *("--config-file", str(config)),
                *("--extra-files", str(extra)),
                *("--export-path", work),
                *("--archive-format", "no-archive"),
            ]
        )
        manifest = Path(work, name, MANIFEST)
        content = json.loads(manifest.read_text()) | {"createdOn": _CREATED_ON}
        manifest.write_text(json.dumps(content, indent=2) + "\n")
        # Two builds may write the same archive: each writes a file of its own, and then renames it.
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".") as unfinished:
            _zip(Path(work, name), Path(unfinished, archive.name))
            Path(unfinished, archive.name).replace(archive)


def class_index(labels: Iterable[Label]) -> str:
    """Return the text of `CLASS_INDEX`: one class per line, so that a change can be read."""
    rows = [f'  "{index}": {json.dumps(label)}' for index, label in enumerate(labels)]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _run_archiver(arguments: list[str]) -> None:
    # It clears a folder in TMPDIR that others may use.
    with tempfile.TemporaryDirectory(dir=BUILD.resolve()) as temporary:
        result = subprocess.run(
            [sys.executable, "-m", "model_archiver.model_packaging", *arguments],
            env={**os.environ, "TMPDIR": temporary},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        raise UserError(f"torch-model-archiver failed: {result.stderr.strip()[-1000:]}")


def _zip(folder: Path, target: Path) -> None:
    """Zip a folder's files in a fixed order, with fixed times and permissions."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
