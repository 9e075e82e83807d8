"""Builds an archive: exports the model, checks it, packs it with its classes and the handler.

What is still up to date is used again: the export while weights and exporter are the same, the
archive while nothing that goes into it has changed. The same inputs give the same bytes.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.status import Status
from torch import nn

from handler.labels import Label
from handler.settings import ModelCard, Preprocessing
from scripts.build import export, heads, lower_precision, onnx_model
from scripts.build.activation import SOFTMAX, Activation
from scripts.build.architectures import official_preprocessing
from scripts.build.lower_precision import LowerPrecision, make
from scripts.build.packing import (
    BUILD,
    HANDLER,
    Contents,
    Said,
    check_choices,
    customized,
    files_that_matter,
    labels_of,
    pack,
    summary_of_classes,
    summary_of_preprocessing,
)
from scripts.build.weights import Weights, build_model, with_two_outputs
from scripts.samples import sample_batch
from scripts.store import MODEL_STORE, read_card
from scripts.terminal import UserError, console, step

_RANDOM_CHECK_IMAGES = 8


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
        activation: how logits become probabilities, of `ACTIVATIONS`.
        thresholds: of each class with sigmoid, 0 to 1; empty with softmax.
        trained_model: with random weights, the name of a trained model that is served with this
            one; empty if there is none.
    """

    weights: Weights
    name: str
    labels: Sequence[Label]
    preprocessing: Preprocessing
    engine: str = "onnx"
    lower: LowerPrecision | None = None
    activation: str = SOFTMAX.name
    thresholds: tuple[float, ...] = ()
    trained_model: str = ""

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
    activation: Activation = SOFTMAX,
) -> Recipe:
    """Fills in what a person need not say.

    Args:
        weights: what to pack.
        name: of the archive; None for the architecture's.
        classes: the list of classes; None for ImageNet's.
        preprocessing: None for what torchvision does for this architecture.
        engine: "onnx" or "torch".
        lower: instead of float32; None for float32.
        activation: how logits become probabilities, and from where on a class is a label.

    Raises:
        UserError: the list or the thresholds do not fit the weights, or the name or the engine
            cannot be used.
    """
    check_choices(name, engine, lower)
    several = activation.name != SOFTMAX.name
    labels = labels_of(weights.classes, weights.file, classes, several=several)
    return Recipe(
        with_two_outputs(weights) if weights.classes < len(labels) else weights,
        weights.architecture if name is None else name,
        labels,
        preprocessing or official_preprocessing(weights.architecture),
        engine,
        lower,
        activation.name,
        activation.thresholds(labels),
    )


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
        activation=recipe.activation,
        thresholds=recipe.thresholds,
        trained_model=recipe.trained_model,
    )
    last_name = weights.last_layer.removesuffix(".weight")
    subject = export.Exportable(model, card.preprocessing, card.features, last_name)
    model_file = _model_file(subject, card, recipe.engine, images)
    classifier = None
    if recipe.engine == "onnx":
        channels = onnx_model.embedding_channels(model_file)
        card = dataclasses.replace(card, embedding=channels)
    if card.features:
        assert isinstance(last, nn.Linear)
        classifier = last.weight.detach().float().numpy()
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        if recipe.lower is not None:
            make(recipe.lower, model_file, card, recipe.labels, Path(folder))
        with Status("Packing the archive ...", console=console):
            pack(
                Contents(
                    card,
                    recipe.name,
                    recipe.labels,
                    model_file,
                    classifier,
                    sorted(Path(folder).iterdir()),
                ),
                archive,
            )
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
    engine = {"onnx": "ONNX Runtime (CPU)", "torch": "PyTorch (GPU, or CPU)"}[recipe.engine]
    if recipe.lower is not None:
        engine = f"OpenVINO (CPU, {recipe.precision})"
    return [
        f"{weights.architecture} on {engine}, weights {weights.file} in {precision}",
        summary_of_preprocessing(wanted),
        *([f"a head of its own, {heads.described(weights.head)}"] if weights.head else []),
        summary_of_classes(recipe.labels, recipe.thresholds),
    ]


def _inputs_digest(recipe: Recipe) -> str:
    """Changes whenever the archive would."""
    weights = recipe.weights
    said = [
        (weights.architecture, weights.classes, weights.trained, weights.file, weights.sha256),
        weights.head,
        (recipe.name, recipe.labels, dataclasses.asdict(recipe.preprocessing), recipe.engine),
        recipe.lower and recipe.lower.digest(),
        (recipe.activation, recipe.thresholds, recipe.trained_model),
        _exporter_digest(),
    ]
    digest = hashlib.sha256(json.dumps(said).encode())
    for path in (*files_that_matter(), Path(__file__), Path(lower_precision.__file__)):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _exporter_digest() -> str:
    """Changes whenever an export of the same weights might."""
    digest = hashlib.sha256()
    modules = (export.__file__, str(onnx_model.__file__))
    for path in (HANDLER / "torch_models.py", *map(Path, modules)):
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
    # Another process may make the same: each has a folder of its own.
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        unchecked = Path(folder, exported.name)
        with Status("Exporting the model to ONNX (about 10 seconds) ...", console=console):
            export.export(subject, unchecked)
            if isinstance(subject.model.get_submodule(subject.last), nn.Linear):
                onnx_model.add_embedding(unchecked)
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


def preprocessing_of(architecture: str, said: Said) -> Preprocessing:
    """What torchvision does for the architecture, with what a person says instead.

    Raises:
        UserError: a value cannot be used.
    """
    return customized(dataclasses.asdict(official_preprocessing(architecture)), said)
