"""Packs an archive: what every model goes through, whatever it was made of.

Imports nothing of PyTorch, which an ONNX file does without.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import ArchiveError
from handler.explain import CLASSIFIER
from handler.labels import CLASS_INDEX, Label, load_class_index
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts.build import class_names
from scripts.build.class_index import as_json
from scripts.build.class_names import IMAGENET_CLASSES, read_class_names
from scripts.build.lower_precision import LowerPrecision
from scripts.terminal import UserError

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

# So many classes are printed; of more the first two and the last.
_SHOWN_CLASSES = 4

# Classes that one output tells apart.
_BINARY = 2

# A model's name is part of addresses and of file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Contents:
    """What an archive holds beside the handler.

    Attributes:
        card: the model card.
        name: of the archive and of the model that it becomes.
        labels: a class for each position of the logits.
        model_file: as the engine reads it.
        classifier: float32 (classes, channels), what maps are made with; None where there are none.
        others: more files.
    """

    card: ModelCard
    name: str
    labels: Sequence[Label]
    model_file: Path
    classifier: NDArray[np.float32] | None = None
    others: Sequence[Path] = ()


@dataclass(frozen=True)
class Said:
    """What a person says of a model's preprocessing; None for what is not said.

    Attributes:
        resize: see `handler.settings.Preprocessing`, and so are `crop` and `interpolation`.
        crop: may be left out where the model takes one size only.
        mean: three numbers with commas between, or one.
        std: likewise.
        interpolation: bilinear where it is not said.
        fit: crop where it is not said; with squash and pad resize is as crop.
    """

    resize: int | None = None
    crop: int | None = None
    mean: str | None = None
    std: str | None = None
    interpolation: str | None = None
    fit: str | None = None


def check_choices(name: str | None, engine: str, lower: LowerPrecision | None = None) -> None:
    """Checks what needs no weights to be checked; raises `UserError`."""
    if name is not None and NAME.fullmatch(name) is None:
        raise UserError(
            "NAME must be 1 to 64 letters, digits, - and _, the first one a letter or a digit, got "
            f"{name!r}."
        )
    if engine not in {"onnx", "torch"}:
        raise UserError(f"ENGINE must be onnx or torch, got {engine!r}.")
    if engine == "torch" and lower is not None:
        raise UserError(f"PRECISION={lower.name} is OpenVINO's. Leave ENGINE=torch out.")


def labels_of(
    outputs: int, file: str, classes: Path | None, *, several: bool = False
) -> Sequence[Label]:
    """A class for each position of the logits.

    Args:
        outputs: how many the model has; one tells two classes apart, unless a picture can have
            several labels.
        file: of the model or its weights, for errors.
        classes: a list; None for ImageNet's.
        several: whether a picture can have several labels.

    Raises:
        UserError: the list does not fit the model.
    """
    if classes is None:
        if outputs != IMAGENET_CLASSES:
            raise UserError(
                f"{file} tells {outputs} classes apart, and nothing names them. "
                "Give a list of them: CLASSES=classes.txt"
            )
        return load_class_index(HANDLER / CLASS_INDEX, IMAGENET_CLASSES)
    labels = read_class_names(classes)
    if outputs == 1 and not several:
        if len(labels) != _BINARY:
            raise UserError(
                f"{file} has one output: it tells two classes apart, so CLASSES must name "
                "two, first the one for which the output is near 0."
            )
        return labels
    if len(labels) != outputs:
        raise UserError(
            f"{classes} names {len(labels)} classes, but {file} tells {outputs} "
            "apart. The list must have the model's classes, in the order of its training."
        )
    return labels


def summary_of_preprocessing(wanted: Preprocessing) -> str:
    """For a person, to compare with training."""
    mean, std = (", ".join(f"{n:g}" for n in values) for values in (wanted.mean, wanted.std))
    side = {"crop": "shorter side", "squash": "both sides", "pad": "longer side"}[wanted.fit]
    square = f"{wanted.crop} x {wanted.crop} from the centre"
    return (
        f"{side} to {wanted.resize} pixels ({wanted.interpolation}), {square}, "
        f"mean {mean}, std {std}"
    )


def summary_of_classes(labels: Sequence[Label], thresholds: Sequence[float]) -> str:
    """The classes for a person, of many some, and from where on each is a label."""
    names = [label.class_name for label in labels]
    shown = names if len(names) <= _SHOWN_CLASSES else [*names[:2], "...", names[-1]]
    return f"{len(names)} classes: {', '.join(shown)}{_in_words(thresholds)}"


def _in_words(thresholds: Sequence[float]) -> str:
    """From where on each class counts for itself; empty where one class of all is meant."""
    if not thresholds:
        return ""
    low, high = (f"{number:g}" for number in (min(thresholds), max(thresholds)))
    return f"; each for itself (sigmoid), from {low if low == high else f'{low} to {high}'} on"


def files_that_matter() -> list[Path]:
    """The files of which a change makes other archives."""
    return [*_handler_files(), Path(__file__), Path(class_names.__file__)]


def _handler_files() -> list[Path]:
    """All that the handler needs at run time, in a fixed order."""
    return sorted(path for path in HANDLER.iterdir() if path.is_file())


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Three numbers from a text with commas between; one counts three times."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{name} must be numbers with commas between, got {text!r}.") from error
    return found * 3 if len(found) == 1 else found


def customized(official: Mapping[str, Any], said: Said) -> Preprocessing:
    """A model's preprocessing, with what a person says instead.

    Args:
        official: the fields of a `Preprocessing`, which need not fit one another.
        said: with fit squash or pad resize is as crop where it is not said.

    Raises:
        UserError: a value cannot be used, or what comes of it does not fit.
    """
    given = {
        **dataclasses.asdict(said),
        "mean": numbers("MEAN", said.mean),
        "std": numbers("STD", said.std),
    }
    values = {**official, **{key: value for key, value in given.items() if value is not None}}
    if said.fit in {"squash", "pad"} and said.resize is None:
        values["resize"] = values["crop"]
    try:
        return Preprocessing(**values)
    except ArchiveError as error:
        raise UserError(
            f"The preprocessing cannot be used: {error}. RESIZE, CROP, MEAN, STD, INTERPOLATION "
            "and FIT change it."
        ) from error


def pack(contents: Contents, archive: Path) -> None:
    """Lets `torch-model-archiver` lay the archive out, then zips it the same way every time."""
    card, model_file = contents.card, contents.model_file
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        work = Path(folder)
        extra = work / "extra"
        (extra / HANDLER).mkdir(parents=True)
        (extra / MODEL_CARD).write_text(card.to_json())
        if contents.classifier is not None:
            np.save(extra / CLASSIFIER, contents.classifier, allow_pickle=False)
        (extra / CLASS_INDEX).write_text(as_json(contents.labels), "utf-8")
        for path in contents.others:
            shutil.copy(path, extra)
        for path in _handler_files():
            if path == AT_START:
                shutil.copy(path, extra)
            elif path.suffix in {".py", ".html"} and path != ENTRY:
                shutil.copy(path, extra / HANDLER)
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
        _fix_creation_time(laid_out / MANIFEST)
        unfinished = archive.with_suffix(".unfinished")
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
