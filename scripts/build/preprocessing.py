"""Resolve a model's preprocessing: the user's options override the model's own files, and these
the architecture's defaults.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from handler.errors import ArchiveError
from handler.settings import Preprocessing
from scripts.terminal import UserError

Triple = Annotated[
    tuple[float, float, float],
    BeforeValidator(
        lambda value: (value,) * 3 if isinstance(value, (int, float)) else value,
        json_schema_input_type=float | tuple[float, float, float],
    ),
]
Pixels = Annotated[int, Field(ge=1, le=4096)]

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# The modes of `preprocess_input` in Keras' applications/imagenet_utils.py.
PRESETS: dict[str, dict[str, Any]] = {
    "caffe": {
        "channels": "bgr",
        "range": 255,
        "mean": (103.939, 116.779, 123.68),
        "std": (1.0, 1.0, 1.0),
    },
    "tf": {"channels": "rgb", "range": 1, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    "torch": {"channels": "rgb", "range": 1, **_IMAGENET},
}


class PreprocessingOptions(BaseModel):
    """A user's overrides of a model's preprocessing; None for the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["caffe", "tf", "torch"] | None = Field(
        None, description="channels, range, mean and std of a mode of keras.applications"
    )
    fit: Literal["crop", "squash", "pad"] | None = Field(
        None, description="crop the square center, squash the image to a square, or pad it to one"
    )
    resize: Pixels | None = Field(
        None, description="pixels: the shorter side (crop), both (squash) or the longer side (pad)"
    )
    crop: Pixels | None = Field(None, description="pixels: side of the square that the model gets")
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    channels: Literal["rgb", "bgr"] | None = Field(None, description="the model's order")
    range: Literal[1, 255] | None = Field(None, description="the scale of mean and std")
    mean: Triple | None = Field(None, description="subtracted, in the model's order of channels")
    std: Triple | None = Field(None, description="divided by, in the model's order of channels")

    @model_validator(mode="after")
    def _on_one_scale(self) -> "PreprocessingOptions":
        largest = max(map(abs, self.mean or (0,)))
        scale = self.range or PRESETS.get(self.preset or "", {}).get("range", 1)
        if largest > 1 and scale == 1:
            raise ValueError(
                f"mean {self.mean} cannot be on the scale 0 to 1. If it is on the scale 0 to 255, "
                "say so: range: 255"
            )
        if 0 < largest <= 1 and scale != 1:
            raise ValueError(f"mean {self.mean} is on the scale 0 to 1. Say so: range: 1")
        return self

    def values(self) -> dict[str, Any]:
        """Return the overrides as fields of `Preprocessing`: mean and std on the scale 0 to 1."""
        found = {**PRESETS.get(self.preset or "", {}), **self.model_dump(exclude_none=True)}
        scale = found.pop("range", 1)
        for key in found.keys() & {"mean", "std"}:
            found[key] = tuple(value / scale for value in found[key])
        found.pop("preset", None)
        return found


def resolve(
    options: PreprocessingOptions,
    defaults: Mapping[str, Any],
    fixed: Mapping[str, Any],
    model: str,
) -> Preprocessing:
    """Return the preprocessing of a model from the user's options and fields of `Preprocessing`.

    Args:
        options: the user's overrides.
        defaults: from the model's own files or the architecture; some may be missing.
        fixed: those that the model allows no other value for.
        model: its name, for errors.
    """
    overrides = options.values()
    for key in overrides.keys() & fixed.keys():
        if overrides[key] != fixed[key]:
            raise UserError(
                f"preprocessing: {key} of {model} is {fixed[key]} and cannot be changed: leave it "
                "out."
            )
    values = {**defaults, **fixed, **overrides}
    if overrides.get("fit") in {"squash", "pad"} and "crop" in values:
        values["resize"] = overrides.get("resize", values["crop"])
    missing = [key for key in ("resize", "crop", "mean", "std") if key not in values]
    if missing:
        raise UserError(
            f"{model} does not state how images were preprocessed in training. Set it in a "
            f"model file, under preprocessing: {', '.join(missing)} (resize and crop in pixels; "
            "mean and std with range: 1 or 255; or preset: caffe, tf or torch)."
        )
    try:
        return Preprocessing(**values)
    except ArchiveError as error:
        raise UserError(f"preprocessing of {model}: {error}.") from error


def summary(preprocessing: Preprocessing) -> str:
    """Return one line to compare with the training's preprocessing."""
    side = {"crop": "shorter side", "squash": "both sides", "pad": "longer side"}[preprocessing.fit]
    crop = f", center {preprocessing.crop} x {preprocessing.crop}"
    mean = ", ".join(f"{number:g}" for number in preprocessing.mean)
    std = ", ".join(f"{number:g}" for number in preprocessing.std)
    return (
        f"{side} to {preprocessing.resize} pixels ({preprocessing.interpolation})"
        f"{crop if preprocessing.fit == 'crop' else ''}, {preprocessing.channels.upper()}, "
        f"mean {mean}, std {std}"
    )
