"""Build a model archive: source -> ONNX and facts -> optional quantization -> model card -> pack.

The same inputs give the same bytes. The archive is rebuilt only if one of its inputs has changed,
and the model is converted again only if the model or the build's code has.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.status import Status

from handler.labels import Label
from handler.settings import ModelCard, Preprocessing
from scripts import samples
from scripts.build import packing, preprocessing, reduced_precision, thresholds
from scripts.build.classes import IMAGENET_CLASSES, given_classes, imagenet_classes
from scripts.build.convert import Converted, convert
from scripts.build.model_file import ModelFile
from scripts.build.packing import BUILD, pack
from scripts.build.reduced_precision import add_reduced_precision
from scripts.build.sources import open_source
from scripts.build.sources.source import Source
from scripts.groups import require
from scripts.store import MODEL_STORE, WEIGHTS_NOTICE, read_card, sha256
from scripts.terminal import UserError, console, step

# Of more classes, the first two and the last are printed.
_MAX_SHOWN_CLASSES = 4

# Packages that a build uses, the latter as far as they are installed.
_PACKAGES = ("onnx", "onnxruntime")
_PACKAGES_WITH_PYTORCH = (*_PACKAGES, "onnxscript", "torch", "torchvision", "timm", "transformers")
_CODE = Path(__file__).parent


def build(
    spec: ModelFile,
    model_store: Path = MODEL_STORE,
    source: Source | None = None,
    trained_model: str = "",
) -> Path:
    """Build the archive, unless the one in the model store was made from the same inputs.

    Args:
        spec: the model file.
        model_store: for the archive.
        source: the model itself; None to read what `spec` names.
        trained_model: with random weights, the name of a trained model that is served as well.
    """
    archive = model_store / f"{spec.name}.mar"
    inputs = _inputs_digest(spec, source, trained_model)
    packed = read_card(archive)
    if packed is not None and packed.inputs_sha256 == inputs:
        step(f"Archive: {archive} is up to date")
        return archive
    given = given_classes(spec.classes)
    source = source or open_source(spec)
    labels = _labels(spec, source, given)
    card = ModelCard(
        architecture=source.architecture,
        classes=len(labels),
        trained=source.trained,
        weights_file=source.file,
        weights_sha256=source.sha256,
        inputs_sha256=inputs,
        preprocessing=preprocessing.resolve(
            spec.preprocessing, source.preprocessing, source.fixed, source.file
        ),
        precision=spec.precision.type,
        activation=spec.activation,
        thresholds=thresholds.resolve(spec.thresholds, labels) if spec.multilabel else (),
        trained_model=trained_model,
    )
    for line in _summary(spec, source, card, labels):
        step(f"Archive: {line}")
    model_store.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        extra = Path(folder, "extra")
        extra.mkdir()
        if spec.engine == "torch":
            model = Converted(Path(folder, "model.pth"))
            features = source.for_pytorch(card.preprocessing, model)
        else:
            model = _converted(spec, source, card, Path(folder))
            features = "features" if model.classifier.exists() else ""
        card = dataclasses.replace(card, features=features, embedding=model.channels)
        if spec.precision.type != "float32":
            require("precision", why=f"OpenVINO makes {spec.precision.type} and runs it")
            add_reduced_precision(spec.precision, model.file, card, labels, extra)
        if source.notice:
            (extra / WEIGHTS_NOTICE).write_text(source.notice, "utf-8")
        with Status("Packing the archive ...", console=console):
            pack(card, spec.name, labels, model, extra, archive, spec.threshold)
    step(f"Archive: wrote {archive}, {archive.stat().st_size / 1e6:.1f} MB")
    return archive


def _converted(spec: ModelFile, source: Source, card: ModelCard, folder: Path) -> Converted:
    """Return the converted model from the last build of this name, or convert it and keep it."""
    facts = (
        (source.architecture, source.sha256, card.classes, card.multilabel, spec.allow_saturated),
        dataclasses.asdict(card.preprocessing),
        _build_digest(spec),
    )
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    kept, made = BUILD / f"converted-{spec.name}-{key}", folder / "converted"
    file, channels = made / "model.onnx", made / "channels"
    try:
        # Links, since another build of this name may remove the kept files at the same time.
        shutil.copytree(kept, made, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    else:
        step(f"Model: using the checked conversion {kept}")
        return Converted(file, int(channels.read_text()))
    found = convert(
        source.to_onnx(card.preprocessing, folder),
        card,
        file,
        allow_saturated=spec.allow_saturated or not source.trained,
    )
    source.check(file, card.preprocessing)
    channels.write_text(str(found.channels))
    for other in BUILD.glob(f"converted-{spec.name}-*"):
        shutil.rmtree(other, ignore_errors=True)
    with contextlib.suppress(OSError):  # another build of this name was first
        shutil.copytree(made, folder / "kept", copy_function=os.link).rename(kept)
    return found


def _labels(spec: ModelFile, source: Source, given: Sequence[Label] | None) -> Sequence[Label]:
    """Return a class per output: the user's, the model's own, or ImageNet's."""
    labels, outputs, file = given or source.labels, source.outputs, source.file
    if labels is None:
        if outputs not in {None, IMAGENET_CLASSES, IMAGENET_CLASSES + 1}:
            raise UserError(
                f"{file} has {outputs} classes, and nothing names them. Give a list, in the order "
                "of the model's outputs: CLASSES=classes.txt"
            )
        return imagenet_classes(outputs or IMAGENET_CLASSES)
    if outputs == 1 and not spec.multilabel:
        if len(labels) != 2:
            raise UserError(
                f"{file} has one output, for two classes, so classes must name two, first the one "
                "for which the output is near 0."
            )
    elif outputs not in {None, len(labels)}:
        whose = spec.classes if isinstance(spec.classes, Path) else "The list of classes"
        raise UserError(
            f"{whose} names {len(labels)} classes, but {file} has {outputs}. The list must have "
            "the model's classes, in the order of its outputs."
        )
    return labels


def _summary(
    spec: ModelFile, source: Source, card: ModelCard, labels: Sequence[Label]
) -> list[str]:
    """Return lines on the archive's content, to compare with the model's training."""
    engine = {"onnx": "ONNX Runtime (CPU)", "torch": "PyTorch (GPU, or CPU)"}[spec.engine]
    if card.precision != "float32":
        engine = f"OpenVINO (CPU, {card.precision})"
    names = [label.class_name for label in labels]
    shown = names if len(names) <= _MAX_SHOWN_CLASSES else [*names[:2], "...", names[-1]]
    classes = f"{len(names)} classes, in the order of the model's outputs: {', '.join(shown)}"
    if card.multilabel:
        limits = dict.fromkeys((min(card.thresholds), max(card.thresholds)))
        between = " to ".join(f"{limit:g}" for limit in limits)
        classes += f"; multi-label (sigmoid), thresholds {between}"
    elif spec.threshold is not None:
        classes += f"; threshold {spec.threshold:g}"
    first = f"{source.architecture} on {engine}, from {source.file}"
    return [first, preprocessing.summary(card.preprocessing), classes]


def resolved(spec: ModelFile, used: Preprocessing) -> ModelFile:
    """Return a model file with the preprocessing that was used in place of its defaults."""
    overrides = spec.preprocessing.model_dump(exclude_none=True)
    keys = {"resize", "crop", "fit", "interpolation"}
    if "preset" not in overrides:
        keys |= {"channels", "mean", "std"}
    values = {key: value for key, value in dataclasses.asdict(used).items() if key in keys}
    options = type(spec.preprocessing)(**{**values, **overrides})
    return spec.replace(preprocessing=options)


def _inputs_digest(spec: ModelFile, source: Source | None, trained_model: str) -> str:
    """Return a digest of all inputs of the archive; reads files, but loads no model."""
    values = spec.model_dump(mode="json")
    files = [(path.name, sha256(path)) for path in _files(spec)]
    images = reduced_precision.digest(spec.precision) if spec.precision.type != "float32" else ""
    for key in ("model", "weights", "classes", "thresholds"):
        value = getattr(spec, key)
        if isinstance(value, Path) or (key == "weights" and value and Path(value).is_file()):
            values[key] = Path(value).name
    values.pop("precision")
    inputs = [
        values,
        (spec.precision.type, images, files, trained_model),
        source and (source.architecture, source.sha256, source.trained),
        _build_digest(spec),
    ]
    digest = hashlib.sha256(json.dumps(inputs).encode())
    for path in packing.handler_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _files(spec: ModelFile) -> list[Path]:
    """Return the files that a model file names, and others of their folders that are read too."""
    named = [spec.model, spec.classes, spec.thresholds, Path(spec.weights or "")]
    files = [path for path in named if isinstance(path, Path) and path.is_file()]
    if spec.is_python and spec.model is not None:
        files += spec.model.parent.glob("*.py")
    elif spec.model is not None and spec.model.is_dir():
        files += [*spec.model.glob("*.json"), *spec.model.glob("*.safetensors")]
    return sorted(set(files))


def _build_digest(spec: ModelFile) -> str:
    """Return a digest of the code and the packages that convert models."""
    digest = hashlib.sha256()
    files = (path for path in _CODE.rglob("*") if path.suffix in {".py", ".onnx"})
    for path in (*sorted(files), Path(samples.__file__), *sorted(samples.FOLDER.glob("*.[jp]*g"))):
        digest.update(path.name.encode() + path.read_bytes())
    for package in _PACKAGES if spec.has_graph else _PACKAGES_WITH_PYTORCH:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{package}=={version(package)};".encode())
    return digest.hexdigest()
