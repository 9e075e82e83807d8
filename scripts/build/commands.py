"""`make archive`: builds a model archive from a model file, or from variables in common cases."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.build.model_file import RANDOM, ModelFile, from_options, read
from scripts.build.pipeline import build, resolved
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, read_card
from scripts.terminal import UserError, console, step

_MODEL_FILES = {".yaml", ".yml", ".json"}


def _option(text: str) -> Any:
    return typer.Option(help=text)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options that name a model; each default is that of the model file."""

    model_file: Annotated[
        Path | None,
        _option("A model file (.yaml), or the model: an ONNX file, a folder, a Python file."),
    ] = None
    arch: Annotated[str | None, _option("Of torchvision, efficientnet_lite0, or timm/NAME.")] = None
    weights: Annotated[str | None, _option("A file of your own, or an address.")] = None
    weights_key: Annotated[str | None, _option("Which state dict of a checkpoint.")] = None
    classes: Annotated[
        Path | None, _option("A list of classes, in the order of the model's outputs.")
    ] = None
    name: Annotated[str | None, _option("Of the archive and of the model.")] = None
    precision: Annotated[str | None, _option("float32, bf16 or int8.")] = None
    images: Annotated[
        Path | None, _option("A folder to calibrate int8 on, and to measure the cost on.")
    ] = None
    channels: Annotated[str | None, _option("rgb, or bgr as OpenCV and Caffe have it.")] = None
    activation: Annotated[str | None, _option("softmax, or sigmoid for multi-label.")] = None

    def spec(self) -> ModelFile:
        """Return the model file for the options."""
        if self.images is not None and self.precision not in {"bf16", "int8"}:
            raise UserError("IMAGES is for PRECISION=int8 or PRECISION=bf16.")
        values = {key: value for key, value in vars(self).items() if value is not None}
        values.pop("model_file", None)
        if self.precision is not None:
            use = "calibration" if self.precision == "int8" else "evaluation"
            images = {use: values.pop("images")} if self.images else {}
            values["precision"] = {"type": self.precision, **images}
        if self.channels is not None:
            values["preprocessing"] = {"channels": values.pop("channels")}
        if self.model_file is None:
            return from_options(**{"arch": DEFAULT_ARCHITECTURE, **values})
        if self.is_model_file:
            return read(self.model_file.expanduser(), values)
        return from_options(model=self.model_file.expanduser(), **values)

    @property
    def is_model_file(self) -> bool:
        """Return whether `model_file` is one, and not the model itself."""
        return self.model_file is not None and self.model_file.suffix in _MODEL_FILES


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `ModelOptions` in place of its first parameter."""
    shared = inspect.signature(ModelOptions).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    def run(**options: Any) -> None:
        model = {key: options.pop(key) for key in shared if key in options}
        command(ModelOptions(**model), **options)

    parameters = [*shared.values(), *(p.replace(kind=p.KEYWORD_ONLY) for p in own)]
    run.__doc__ = command.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@with_model_options
def main(
    options: ModelOptions,
    model_store: Annotated[Path, typer.Option(help="Folder for the archive.")] = MODEL_STORE,
) -> None:
    """Build a model archive with trained weights; without any it stops."""
    spec = options.spec()
    if spec.weights == RANDOM:
        raise UserError("WEIGHTS=random is for make run. A model archive needs trained weights.")
    archive = build(spec, model_store)
    if not options.is_model_file:
        show(spec, archive)


def show(spec: ModelFile, archive: Path) -> None:
    """Print the model file for the given variables, for the user to keep."""
    card = read_card(archive)
    if card is None:
        return
    step(f"Model file: what was built. Kept as {spec.name}.yaml it is MODEL_FILE={spec.name}.yaml")
    console.print(resolved(spec, card.preprocessing).to_yaml(), end="", markup=False)
