"""`make archive`: builds a model archive of a model file, or of variables for the common cases."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.build import model_file as model_files
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.pipeline import build, resolved
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step

ModelFileOption = Annotated[
    Path | None,
    typer.Option(help="A model file (.yaml), or the model: an ONNX file, a folder, a Python file."),
]
ArchOption = Annotated[
    str | None, typer.Option(help="Of torchvision, efficientnet_lite0, or timm/NAME.")
]
WeightsOption = Annotated[str | None, typer.Option(help="A file of your own, or an address.")]
WeightsKeyOption = Annotated[str | None, typer.Option(help="Which state dict of a checkpoint.")]
ClassesOption = Annotated[
    Path | None, typer.Option(help="A list of classes, in the order of the model's outputs.")
]
NameOption = Annotated[str | None, typer.Option(help="Of the archive and of the model.")]
PrecisionOption = Annotated[str | None, typer.Option(help="float32, bf16 or int8.")]
ImagesOption = Annotated[
    Path | None, typer.Option(help="A folder to calibrate int8 on, and to measure the cost on.")
]
ChannelsOption = Annotated[
    str | None, typer.Option(help="rgb, or bgr as OpenCV and Caffe have it.")
]
ActivationOption = Annotated[str | None, typer.Option(help="softmax, or sigmoid for multi-label.")]

_MODEL_FILES = {".yaml", ".yml", ".json"}


def main(
    model_file: ModelFileOption = None,
    arch: ArchOption = None,
    weights: WeightsOption = None,
    weights_key: WeightsKeyOption = None,
    classes: ClassesOption = None,
    name: NameOption = None,
    precision: PrecisionOption = None,
    images: ImagesOption = None,
    channels: ChannelsOption = None,
    activation: ActivationOption = None,
    model_store: Annotated[Path, typer.Option(help="Folder for the archive.")] = MODEL_STORE,
) -> None:
    """Build a model archive with trained weights; without any it stops."""
    spec = spec_of(
        model_file=model_file,
        arch=arch,
        weights=weights,
        weights_key=weights_key,
        classes=classes,
        name=name,
        precision=precision,
        images=images,
        channels=channels,
        activation=activation,
    )
    if spec.weights == RANDOM:
        raise UserError("WEIGHTS=random is for make run. A model archive needs trained weights.")
    show(spec, build(spec, model_store), model_file)


def spec_of(
    *,
    model_file: Path | None = None,
    precision: str | None = None,
    images: Path | None = None,
    channels: str | None = None,
    **options: Any,
) -> ModelFile:
    """Return the model file that a command line amounts to.

    Args:
        model_file: a model file, whose keys the others replace; or the model itself.
        precision: see `scripts.build.model_file.Precision`.
        images: calibration images of int8, evaluation images of bf16.
        channels: of the preprocessing.
        options: other keys of a model file; None for what is not said.

    Raises:
        UserError: with the key and what is allowed.
    """
    said = {key: value for key, value in options.items() if value is not None}
    if images is not None and precision not in {"bf16", "int8"}:
        raise UserError("IMAGES is for PRECISION=int8 or PRECISION=bf16.")
    if precision is not None:
        use = "calibration" if precision == "int8" else "evaluation"
        said["precision"] = {"type": precision, **({use: images} if images else {})}
    if channels is not None:
        said["preprocessing"] = {"channels": channels}
    if model_file is None:
        return model_files.from_options(**{"arch": DEFAULT_ARCHITECTURE, **said})
    model_file = model_file.expanduser()
    if model_file.suffix not in _MODEL_FILES:
        return model_files.from_options(model=model_file, **said)
    return model_files.read(model_file, said)


def show(spec: ModelFile, archive: Path, model_file: Path | None) -> None:
    """Print the model file that variables amounted to, for the user to keep."""
    card = read_card(archive)
    if card is None or (model_file is not None and model_file.suffix in _MODEL_FILES):
        return
    step(f"Model file: what was built. Kept as {spec.name}.yaml it is MODEL_FILE={spec.name}.yaml")
    console.print(resolved(spec, card.preprocessing).to_yaml(), end="", markup=False)
