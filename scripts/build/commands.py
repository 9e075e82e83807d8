"""`make archive`, and the options that say what goes into an archive."""

from pathlib import Path
from typing import Annotated

import typer

from scripts.build import onnx_archive
from scripts.build.activation import SOFTMAX, Activation, choose
from scripts.build.guard import Bounds
from scripts.build.lower_precision import LowerPrecision, chosen
from scripts.build.packing import Said, check_choices
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, PACKAGED_ARCHITECTURE
from scripts.terminal import UserError, command

ArchOption = Annotated[str, typer.Option(help="Of torchvision, efficientnet_lite0, or timm/NAME.")]
Pixels = Annotated[int | None, typer.Option(min=1, max=4096, help="In pixels.")]
Channels = Annotated[str | None, typer.Option(help="Red, green, blue, as in 0.485,0.456,0.406.")]
InterpolationOption = Annotated[str | None, typer.Option(help="As in bicubic.")]
FitOption = Annotated[str | None, typer.Option(help="crop, squash or pad.")]
RevisionOption = Annotated[str | None, typer.Option(help="Of timm's weights, a commit.")]
HeadOption = Annotated[str | None, typer.Option(help="As in linear,relu,dropout,linear.")]
NameOption = Annotated[str | None, typer.Option(help="Of the archive.")]
EngineOption = Annotated[str, typer.Option(help="onnx (CPU) or torch (GPU).")]
PrecisionOption = Annotated[str, typer.Option(help="float32, bf16 or int8.")]
CalibrateOption = Annotated[Path | None, typer.Option(help="Pictures to calibrate int8 on.")]
EvaluateOption = Annotated[Path | None, typer.Option(help="Pictures to measure its cost on.")]
MaxLossOption = Annotated[
    float, typer.Option(min=0, max=100, help="Of top 1 and top 5, in percentage points.")
]
AgreementOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of first labels that must stay.")
]
ActivationOption = Annotated[str, typer.Option(help="softmax, or sigmoid for several labels.")]
ThresholdsOption = Annotated[
    str | None, typer.Option(help="Of labels with sigmoid: a number, or a file of them.")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="A mirror of torchvision's file.")]
ModelFileOption = Annotated[Path | None, typer.Option(help="An ONNX file, instead of weights.")]

# As WEIGHTS, in the place of a file: only to try the service.
RANDOM = Path("random")


def main(
    model_file: ModelFileOption = None,
    weights: Annotated[Path | None, typer.Option(help="A file of your own.")] = None,
    weights_url: UrlOption = None,
    arch: ArchOption = DEFAULT_ARCHITECTURE,
    classes: Annotated[Path | None, typer.Option(help="A list of your own classes.")] = None,
    name: NameOption = None,
    model_store: Annotated[Path, typer.Option(help="Folder for the archive.")] = MODEL_STORE,
    revision: RevisionOption = None,
    head: HeadOption = None,
    engine: EngineOption = "onnx",
    resize: Pixels = None,
    crop: Pixels = None,
    mean: Channels = None,
    std: Channels = None,
    interpolation: InterpolationOption = None,
    fit: FitOption = None,
    precision: PrecisionOption = "float32",
    calibrate: CalibrateOption = None,
    evaluate: EvaluateOption = None,
    max_loss: MaxLossOption = Bounds.max_loss,
    agreement: AgreementOption = Bounds.agreement,
    activation: ActivationOption = SOFTMAX.name,
    thresholds: ThresholdsOption = None,
) -> None:
    """Builds the archive with trained weights; without any it stops."""
    lower = chosen(precision, calibrate, evaluate, max_loss, agreement)
    check_choices(name, engine, lower)
    labelling = choose(activation, thresholds)
    said = Said(resize, crop, mean, std, interpolation, fit)
    if weights == RANDOM:
        raise UserError("WEIGHTS=random is for make run. A model archive needs trained weights.")
    if model_file is not None:
        others = {
            "WEIGHTS": weights is not None,
            "WEIGHTS_URL": weights_url is not None,
            "HEAD": head is not None,
            "REVISION": revision is not None,
            "ARCH": arch != DEFAULT_ARCHITECTURE,
            "ENGINE": engine != "onnx",
        }
        for variable, value in others.items():
            if value:
                raise UserError(f"MODEL_FILE is a whole model. Leave {variable} out.")
        onnx_archive.build(model_file, said, name, classes, lower, model_store, labelling)
        return
    # PyTorch is not needed before here.
    if is_timm(arch):
        check_timm(arch, weights_url, head, engine)
        build_timm(
            arch, weights, said, name, classes, lower, model_store, labelling, revision=revision
        )
        return
    if revision is not None:
        raise UserError("REVISION is for ARCH=timm/... Leave it out.")
    from scripts.build.architectures import check_architecture  # noqa: PLC0415
    from scripts.build.archive import build, preprocessing_of, recipe  # noqa: PLC0415
    from scripts.build.weights import obtain  # noqa: PLC0415

    check_architecture(arch)
    preprocessing = preprocessing_of(arch, said)
    found = obtain(weights, weights_url, arch, head)
    build(recipe(found, name, classes, preprocessing, engine, lower, labelling), model_store)


def is_timm(arch: str) -> bool:
    """Return whether timm makes this architecture, and not torchvision."""
    return arch == PACKAGED_ARCHITECTURE or arch.startswith("timm/")


def check_timm(arch: str, weights_url: str | None, head: str | None, engine: str) -> None:
    """Raise `UserError` if a variable is set that only torchvision's architectures have."""
    others = {"WEIGHTS_URL": weights_url, "HEAD": head, "ENGINE": engine != "onnx"}
    for variable, value in others.items():
        if value:
            raise UserError(f"ARCH={arch} has no {variable}. Leave it out.")


def build_timm(
    arch: str,
    weights: Path | None = None,
    said: Said | None = None,
    name: str | None = None,
    classes: Path | None = None,
    lower: LowerPrecision | None = None,
    model_store: Path = MODEL_STORE,
    labelling: Activation = SOFTMAX,
    *,
    revision: str | None = None,
) -> Path:
    """Build the model archive of one of timm's models; arguments as in `timm_models.build`.

    Raises:
        UserError: with the reason and what to do.
    """
    from scripts.build import efficientnet_lite0, timm_models  # noqa: PLC0415

    said = said or Said()
    if arch == PACKAGED_ARCHITECTURE:
        if revision is not None:
            raise UserError("REVISION is for ARCH=timm/... Leave it out.")
        preprocessing = timm_models.preprocessing_of(efficientnet_lite0.TIMM_ARCHITECTURE, said)
        model = efficientnet_lite0.obtain(weights)
    else:
        if weights is not None and revision is not None:
            raise UserError("REVISION is of weights on the hub. Leave it out, or WEIGHTS.")
        preprocessing = timm_models.preprocessing_of(arch, said)
        model = timm_models.obtain(arch, weights, revision)
    return timm_models.build(model, preprocessing, name, classes, lower, model_store, labelling)


if __name__ == "__main__":
    command(main)
