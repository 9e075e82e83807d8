"""Builds an archive: exports the model, checks it, packs it with its classes and the handler.

What is still up to date is used again: the export while weights and exporter are the same, the
archive while nothing that goes into it has changed. The same inputs give the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.status import Status
from torch import nn

from handler.errors import ArchiveError
from handler.explain import CLASSIFIER
from handler.labels import CLASS_INDEX, Label, load_class_index
from handler.settings import MODEL_CARD, ModelCard, Preprocessing
from scripts.build import export, heads, lower_precision
from scripts.build.architectures import official_preprocessing
from scripts.build.class_index import as_json
from scripts.build.class_names import read_class_names
from scripts.build.lower_precision import LowerPrecision, make
from scripts.build.weights import (
    IMAGENET_CLASSES,
    HostUnreachableError,
    Weights,
    build_model,
    obtain,
    untrained,
    with_two_outputs,
)
from scripts.samples import sample_batch
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step, warn

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

# So many classes are printed; of more the first two and the last.
_SHOWN_CLASSES = 4

# Classes that one output tells apart.
_BINARY = 2

# A model's name is part of addresses and of file names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Recipe:
    """What goes into an archive.

    Attributes:
        weights: what to pack.
        name: of the archive and of the model that it becomes.
        labels: a class for each position of the logits.
        preprocessing: how a picture becomes the model's input.
        engine: "onnx" for ONNX Runtime, "torch" for PyTorch.
        lower: instead of float32; None for float32.
    """

    weights: Weights
    name: str
    labels: Sequence[Label]
    preprocessing: Preprocessing
    engine: str = "onnx"
    lower: LowerPrecision | None = None

    @property
    def precision(self) -> str:
        """What the model computes in."""
        return self.lower.name if self.lower else "float32"


def recipe(
    weights: Weights,
    name: str | None = None,
    classes: Path | None = None,
    preprocessing: Preprocessing | None = None,
    engine: str = "onnx",
    lower: LowerPrecision | None = None,
) -> Recipe:
    """Fills in what a person need not say.

    Args:
        weights: what to pack.
        name: of the archive; None for the architecture's.
        classes: the list of classes; None for ImageNet's.
        preprocessing: None for what torchvision does for this architecture.
        engine: "onnx" or "torch".
        lower: instead of float32; None for float32.

    Raises:
        UserError: the list does not fit the weights, or the name or the engine cannot be used.
    """
    check_choices(name, engine, lower)
    labels = _labels(weights, classes)
    return Recipe(
        with_two_outputs(weights) if weights.classes < len(labels) else weights,
        weights.architecture if name is None else name,
        labels,
        preprocessing or official_preprocessing(weights.architecture),
        engine,
        lower,
    )


def check_choices(name: str | None, engine: str, lower: LowerPrecision | None = None) -> None:
    """Checks what needs no weights to be checked; raises `UserError`."""
    if name is not None and _NAME.fullmatch(name) is None:
        raise UserError(
            "NAME must be 1 to 64 letters, digits, - and _, the first one a letter or a digit, got "
            f"{name!r}."
        )
    if engine not in {"onnx", "torch"}:
        raise UserError(f"ENGINE must be onnx or torch, got {engine!r}.")
    if engine == "torch" and lower is not None:
        raise UserError(f"PRECISION={lower.name} is OpenVINO's. Leave ENGINE=torch out.")


def _labels(weights: Weights, classes: Path | None) -> Sequence[Label]:
    if classes is None:
        if weights.classes != IMAGENET_CLASSES:
            raise UserError(
                f"{weights.file} tells {weights.classes} classes apart, and nothing names them. "
                "Give a list of them: CLASSES=classes.txt"
            )
        return load_class_index(HANDLER / CLASS_INDEX, IMAGENET_CLASSES)
    labels = read_class_names(classes)
    if weights.classes == 1:
        if len(labels) != _BINARY:
            raise UserError(
                f"{weights.file} has one output: it tells two classes apart, so CLASSES must name "
                "two, first the one for which the output is near 0."
            )
        return labels
    if len(labels) != weights.classes:
        raise UserError(
            f"{classes} names {len(labels)} classes, but {weights.file} tells {weights.classes} "
            "apart. The list must have the model's classes, in the order of its training."
        )
    return labels


def build(recipe: Recipe, model_store: Path = MODEL_STORE) -> Path:
    """Builds the archive, unless the one in the model store was made from the same inputs.

    Args:
        recipe: what goes into it.
        model_store: the folder to put it into.

    Returns:
        the archive.
    """
    weights = recipe.weights
    archive = model_store / f"{recipe.name}.mar"
    for line in _summary(recipe):
        step(f"Archive: {line}")
    packed = read_card(archive)
    inputs_sha256 = _inputs_digest(recipe)
    if packed is not None and packed.inputs_sha256 == inputs_sha256:
        step(f"Archive: {archive} is up to date")
        return archive
    model_store.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    model = build_model(weights)
    last = model.get_submodule(weights.last_layer.removesuffix(".weight"))
    images = sample_batch(recipe.preprocessing)
    try:
        features = export.features_node(model, last, recipe.preprocessing, images)
    except (RuntimeError, ValueError, AssertionError) as error:
        crop = recipe.preprocessing.crop
        raise UserError(
            f"{weights.architecture} cannot take pictures of {crop} x {crop} pixels: {error}. "
            "Choose another CROP."
        ) from error
    card = ModelCard(
        architecture=weights.architecture,
        classes=weights.classes,
        trained=weights.trained,
        weights_file=weights.file,
        weights_sha256=weights.sha256,
        inputs_sha256=inputs_sha256,
        preprocessing=recipe.preprocessing,
        features=features,
        precision=recipe.precision,
        head=weights.head,
    )
    subject = export.Exportable(model, card.preprocessing, card.features)
    model_file = _model_file(subject, card, recipe.engine, images)
    classifier = None
    if card.features:
        assert isinstance(last, nn.Linear)
        classifier = last.weight.detach().float().numpy()
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if recipe.lower is not None:
            make(recipe.lower, model_file, card, recipe.labels, Path(folder))
        with Status("Packing the archive ...", console=console):
            _pack(card, recipe, model_file, classifier, sorted(Path(folder).iterdir()), archive)
    step(f"Archive: wrote {archive}, {archive.stat().st_size / 1e6:.1f} MB")
    return archive


def _summary(recipe: Recipe) -> list[str]:
    """What goes into the archive, for a person to compare with what the model was trained with."""
    weights, wanted = recipe.weights, recipe.preprocessing
    precision = ", ".join(
        sorted(
            {
                str(t.dtype).removeprefix("torch.")
                for t in weights.state_dict.values()
                if t.is_floating_point()
            }
        )
    )
    names = [label.class_name for label in recipe.labels]
    shown = names if len(names) <= _SHOWN_CLASSES else [*names[:2], "...", names[-1]]
    mean, std = (", ".join(f"{n:g}" for n in values) for values in (wanted.mean, wanted.std))
    engine = {"onnx": "ONNX Runtime (CPU)", "torch": "PyTorch (GPU, or CPU)"}[recipe.engine]
    if recipe.lower is not None:
        engine = f"OpenVINO (CPU, {recipe.precision})"
    square = f"{wanted.crop} x {wanted.crop} from the centre"
    return [
        f"{weights.architecture} on {engine}, weights {weights.file} in {precision}",
        f"shorter side to {wanted.resize} pixels ({wanted.interpolation}), {square}, "  # noqa: ISC004
        f"mean {mean}, std {std}",
        *([f"a head of its own, {heads.described(weights.head)}"] if weights.head else []),
        f"{weights.classes} classes: {', '.join(shown)}",
    ]


def _handler_files() -> list[Path]:
    """All that the handler needs at run time, in a fixed order."""
    return sorted(path for path in HANDLER.iterdir() if path.is_file())


def _inputs_digest(recipe: Recipe) -> str:
    """Changes whenever the archive would."""
    weights = recipe.weights
    said = [
        (weights.architecture, weights.classes, weights.trained, weights.file, weights.sha256),
        weights.head,
        (recipe.name, recipe.labels, dataclasses.asdict(recipe.preprocessing), recipe.engine),
        recipe.lower and recipe.lower.digest(),
        _exporter_digest(),
    ]
    digest = hashlib.sha256(json.dumps(said).encode())
    for path in (*_handler_files(), Path(__file__), Path(lower_precision.__file__)):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _exporter_digest() -> str:
    """Changes whenever an export of the same weights might."""
    digest = hashlib.sha256()
    for path in (HANDLER / "torch_models.py", Path(export.__file__)):
        digest.update(path.read_bytes())
    for package in ("torch", "torchvision", "onnx", "onnxscript"):
        digest.update(f"{package}=={version(package)};".encode())
    return digest.hexdigest()


def _model_file(
    subject: export.Exportable, card: ModelCard, engine: str, images: NDArray[np.uint8]
) -> Path:
    said = [
        (card.weights_sha256, card.classes, card.head),
        dataclasses.asdict(card.preprocessing),
        _exporter_digest(),
    ]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    if engine == "torch":
        state_dict_file = BUILD / f"{card.architecture}-{key}.pth"
        torch.save(subject.model.state_dict(), state_dict_file)
        return state_dict_file
    exported = BUILD / f"{card.architecture}-{key}.onnx"
    if exported.exists():
        step(f"Model: using the checked export {exported}")
        return exported
    unchecked = exported.with_suffix(".unchecked")
    with Status("Exporting the model to ONNX (about 10 seconds) ...", console=console):
        export.export(subject, unchecked)
    with Status("Comparing the exported model with PyTorch ...", console=console):
        crop = card.preprocessing.crop
        noise = np.random.default_rng(0).integers(
            0, 256, (_RANDOM_CHECK_IMAGES, 3, crop, crop), dtype=np.uint8
        )
        export.check(
            subject,
            unchecked,
            np.concatenate([images, noise]),
            lambda text: step(f"Model: {text}"),
        )
    unchecked.replace(exported)
    return exported


def _pack(
    card: ModelCard,
    recipe: Recipe,
    model_file: Path,
    classifier: NDArray[np.float32] | None,
    others: Sequence[Path],
    archive: Path,
) -> None:
    """Lets `torch-model-archiver` lay the archive out, then zips it the same way every time."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        work = Path(folder)
        extra = work / "extra"
        (extra / HANDLER).mkdir(parents=True)
        (extra / MODEL_CARD).write_text(card.to_json())
        if classifier is not None:
            np.save(extra / CLASSIFIER, classifier, allow_pickle=False)
        (extra / CLASS_INDEX).write_text(as_json(recipe.labels), "utf-8")
        for path in others:
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
                *("--model-name", recipe.name),
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
        laid_out = work / recipe.name
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


def obtain_for_trial(
    path: Path | None,
    url: str | None,
    architecture: str = DEFAULT_ARCHITECTURE,
    head: str | None = None,
) -> Weights:
    """Trained weights, or random ones where the host of torchvision's is unreachable."""
    try:
        return obtain(path, url, architecture, head)
    except HostUnreachableError as error:
        warn(str(error))
        warn("Going on with UNTRAINED random weights: everything works, but answers mean nothing.")
        return untrained(architecture)


def customized(  # as many as there are to say
    architecture: str,
    resize: int | None = None,
    crop: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """What torchvision does for the architecture, with what a person says instead.

    Args:
        architecture: name in torchvision's registry.
        resize: length of the shorter side, in pixels.
        crop: side of the square from the centre, in pixels.
        mean: three numbers with commas between, on the scale 0 to 1; one counts three times.
        std: likewise.
        interpolation: nearest, bilinear or bicubic.

    Raises:
        UserError: a value cannot be used.
    """
    said: dict[str, Any] = {
        "resize": resize,
        "crop": crop,
        "mean": _numbers("MEAN", mean),
        "std": _numbers("STD", std),
        "interpolation": interpolation,
    }
    chosen = {key: value for key, value in said.items() if value is not None}
    try:
        return dataclasses.replace(official_preprocessing(architecture), **chosen)
    except ArchiveError as error:
        raise UserError(f"The preprocessing cannot be used: {error}.") from error


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{name} must be numbers with commas between, got {text!r}.") from error
    return numbers * 3 if len(numbers) == 1 else numbers
