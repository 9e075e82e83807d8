"""Pack a model archive (`.mar`): the same inputs give the same bytes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handler.inference.explain import CLASSIFIER
from handler.labels import CLASS_INDEX, Label
from handler.settings import MODEL_CARD, ModelCard
from scripts.build.class_index import as_json
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


@dataclass(frozen=True)
class Contents:
    """All that an archive holds in addition to the handler.

    Attributes:
        card: the model card.
        name: of the archive and of the model that it becomes.
        labels: a class for each position of the logits.
        model_file: as the engine reads it.
        classifier: float32 (classes, channels), for class activation maps; None without any.
        others: more files.
    """

    card: ModelCard
    name: str
    labels: Sequence[Label]
    model_file: Path
    classifier: NDArray[np.float32] | None = None
    others: Sequence[Path] = ()


def handler_files() -> list[Path]:
    """Return all that the handler needs at run time, in a fixed order."""
    return sorted(
        path
        for path in HANDLER.rglob("*")
        if path.suffix in {".py", ".html", ".yaml", ".json"} and path.is_file()
    )


def pack(contents: Contents, archive: Path) -> None:
    """Run `torch-model-archiver`, and zip its result so that the same files give the same bytes."""
    card, model_file = contents.card, contents.model_file
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        work = Path(folder)
        extra = work / "extra"
        extra.mkdir()
        (extra / MODEL_CARD).write_text(card.to_json())
        if contents.classifier is not None:
            np.save(extra / CLASSIFIER, contents.classifier, allow_pickle=False)
        (extra / CLASS_INDEX).write_text(as_json(contents.labels), "utf-8")
        for path in contents.others:
            shutil.copy(path, extra)
        for path in handler_files():
            if path == AT_START:
                shutil.copy(path, extra)
            elif path.suffix in {".py", ".html"} and path != ENTRY:
                (extra / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, extra / path)
        packed_model = work / f"model{model_file.suffix}"
        shutil.copy(model_file, packed_model)
        (work / "tmp").mkdir()
        _run_archiver(
            [
                *("--model-name", contents.name),
                *("--version", VERSION if card.trained else f"{VERSION}-untrained"),
                *("--handler", str(ENTRY)),
                *("--serialized-file", str(packed_model)),
                *("--config-file", str(MODEL_CONFIG)),
                *("--extra-files", str(extra)),
                *("--export-path", str(work)),
                *("--archive-format", "no-archive"),
            ],
            work / "tmp",
        )
        laid_out = work / contents.name
        manifest = json.loads((laid_out / MANIFEST).read_text())
        manifest["createdOn"] = _CREATED_ON
        (laid_out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        # Two builds may write the same archive: each writes a file of its own, and then renames it.
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".") as unfinished:
            _zip(laid_out, Path(unfinished, archive.name))
            Path(unfinished, archive.name).replace(archive)


def _run_archiver(arguments: list[str], temporary: Path) -> None:
    """Run the archiver in a TMPDIR of its own: it clears a folder there that others may use."""
    result = subprocess.run(
        [sys.executable, "-m", "model_archiver.model_packaging", *arguments],
        env={**os.environ, "TMPDIR": str(temporary.resolve())},
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
