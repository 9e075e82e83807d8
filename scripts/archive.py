"""Builds `model_store/densenet121.mar`: exports the model, checks it, packs it with the handler.

What is still up to date is used again: the export while weights and exporter are the same, the
archive while nothing that goes into it has changed. The same inputs give the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.status import Status

from handler.errors import ArchiveError
from handler.explain import CLASSIFIER
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts import export
from scripts.photographs import sample_batch
from scripts.terminal import UserError, command, console, step, warn
from scripts.weights import (
    ARCHITECTURE,
    CLASSES,
    HostUnreachableError,
    Weights,
    build_model,
    obtain,
    untrained,
)

MODEL_STORE = Path("model_store")
BUILD = Path("build")
HANDLER = Path("handler")
ENTRY = HANDLER / "densenet_handler.py"
# Python finds it by its name, so that it must lie beside the entry.
AT_START = HANDLER / "sitecustomize.py"
MODEL_CONFIG = HANDLER / "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
VERSION = "1.0"

# Zip files cannot say an earlier time; a build's own time would make every build different.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_CREATED_ON = "01/01/1980 00:00:00"

_RANDOM_CHECK_IMAGES = 8


def build(weights: Weights, model_store: Path = MODEL_STORE, engine: str = "onnx") -> Path:
    """Builds the archive, unless the one in the model store was made from the same inputs.

    Args:
        weights: what to pack.
        model_store: the folder to put `densenet121.mar` into.
        engine: "onnx" for ONNX Runtime, "torch" for PyTorch.

    Returns:
        the archive.
    """
    archive = model_store / f"{ARCHITECTURE}.mar"
    card = ModelCard(
        architecture=ARCHITECTURE,
        classes=CLASSES,
        trained=weights.trained,
        weights_file=weights.file,
        weights_sha256=weights.sha256,
        inputs_sha256="",
        preprocessing=Preprocessing(),
    )
    card = dataclasses.replace(card, inputs_sha256=_inputs_digest(card, engine))
    packed = read_card(archive)
    if packed is not None and packed.inputs_sha256 == card.inputs_sha256:
        step(f"Archive: {archive} is up to date")
        return archive
    model_store.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    model_file = _model_file(weights, card, engine)
    with Status("Packing the archive ...", console=console):
        _pack(card, model_file, weights.state_dict["classifier.weight"].float().numpy(), archive)
    step(f"Archive: wrote {archive}, {archive.stat().st_size / 1e6:.1f} MB")
    return archive


def read_card(archive: Path) -> ModelCard | None:
    """The model card inside an archive; None where there is no sound archive of ours."""
    try:
        with zipfile.ZipFile(archive) as content:
            return ModelCard.from_json(content.read(MODEL_CARD))
    except (OSError, zipfile.BadZipFile, KeyError, ArchiveError):
        return None


def _handler_files() -> list[Path]:
    """All that the handler needs at run time, in a fixed order."""
    return sorted(path for path in HANDLER.iterdir() if path.is_file())


def _inputs_digest(card: ModelCard, engine: str) -> str:
    """Changes whenever the archive would."""
    digest = hashlib.sha256(json.dumps([card.to_json(), engine, _exporter_digest()]).encode())
    for path in (*_handler_files(), Path(__file__)):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _exporter_digest() -> str:
    """Changes whenever an export of the same weights might."""
    digest = hashlib.sha256(Path(export.__file__).read_bytes())
    for package in ("torch", "torchvision", "onnx", "onnxscript"):
        digest.update(f"{package}=={version(package)};".encode())
    return digest.hexdigest()


def _model_file(weights: Weights, card: ModelCard, engine: str) -> Path:
    key = hashlib.sha256((card.weights_sha256 + _exporter_digest()).encode()).hexdigest()[:16]
    if engine == "torch":
        return _state_dict_file(weights, BUILD / f"{ARCHITECTURE}-{key}.pth")
    exported = BUILD / f"{ARCHITECTURE}-{key}.onnx"
    if exported.exists():
        step(f"Model: using the checked export {exported}")
        return exported
    unchecked = exported.with_suffix(".unchecked")
    model = build_model(weights)
    with Status("Exporting the model to ONNX (about 10 seconds) ...", console=console):
        export.export(model, card.preprocessing, unchecked)
    with Status("Comparing the exported model with PyTorch ...", console=console):
        crop = card.preprocessing.crop
        noise = np.random.default_rng(0).integers(
            0, 256, (_RANDOM_CHECK_IMAGES, 3, crop, crop), dtype=np.uint8
        )
        images = np.concatenate([sample_batch(card.preprocessing), noise])
        export.check(
            model, card.preprocessing, unchecked, images, lambda text: step(f"Model: {text}")
        )
    unchecked.replace(exported)
    return exported


def _state_dict_file(weights: Weights, target: Path) -> Path:
    torch.save(weights.state_dict, target)
    return target


def _pack(
    card: ModelCard, model_file: Path, classifier: NDArray[np.float32], archive: Path
) -> None:
    """Lets `torch-model-archiver` lay the archive out, then zips it the same way every time."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        work = Path(folder)
        extra = work / "extra"
        (extra / HANDLER).mkdir(parents=True)
        (extra / MODEL_CARD).write_text(card.to_json())
        np.save(extra / CLASSIFIER, classifier, allow_pickle=False)
        for path in _handler_files():
            if path.suffix == ".json" or path == AT_START:
                shutil.copy(path, extra)
            elif path.suffix in {".py", ".html"} and path != ENTRY:
                shutil.copy(path, extra / HANDLER)
        packed_model = work / f"model{model_file.suffix}"
        shutil.copy(model_file, packed_model)
        (work / "tmp").mkdir()
        _run_archiver(
            [
                *("--model-name", ARCHITECTURE),
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
        laid_out = work / ARCHITECTURE
        _fix_creation_time(laid_out / MANIFEST)
        unfinished = work / "unfinished.mar"
        _zip(laid_out, unfinished)
        unfinished.replace(archive)


def _run_archiver(arguments: list[str], temporary: Path) -> None:
    """The archiver clears a folder of its own in TMPDIR: two builds must not share one."""
    result = subprocess.run(
        [sys.executable, "-m", "model_archiver.model_packaging", *arguments],
        env={**os.environ, "TMPDIR": str(temporary.resolve())},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(f"torch-model-archiver failed: {result.stderr.strip()[-1000:]}")


def _fix_creation_time(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    content["createdOn"] = _CREATED_ON
    manifest.write_text(json.dumps(content, indent=2) + "\n")


def _zip(folder: Path, target: Path) -> None:
    """Zips a folder so that the same files give the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())


def build_for_trial(path: Path | None, url: str | None) -> Path:
    """Builds with trained weights, or with random ones where the weights' host is unreachable."""
    try:
        weights = obtain(path, url)
    except HostUnreachableError as error:
        warn(str(error))
        warn("Going on with UNTRAINED random weights: everything works, but answers mean nothing.")
        weights = untrained()
    return build(weights)


def main(
    weights: Annotated[Path | None, typer.Option(help="A file of your own.")] = None,
    url: Annotated[str | None, typer.Option(help="A mirror of torchvision's file.")] = None,
    model_store: Annotated[Path, typer.Option(help="Folder for the archive.")] = MODEL_STORE,
    engine: Annotated[str, typer.Option(help="onnx (CPU) or torch (GPU).")] = "onnx",
) -> None:
    """Builds the archive with trained weights; without any it stops."""
    if engine not in ("onnx", "torch"):
        raise UserError(f"ENGINE must be onnx or torch, got {engine!r}.")
    build(obtain(weights, url), model_store, engine)


if __name__ == "__main__":
    command(main)
