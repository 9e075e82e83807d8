"""Translate an image processor of transformers into the preprocessing of this service."""

from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from handler.decoding.transform import resize_and_crop
from handler.errors import ArchiveError
from handler.settings import Preprocessing
from scripts.build.differences import MAX_DIFFERENCE, scaled_difference
from scripts.build.onnx_model import Input
from scripts.samples import sample_photographs
from scripts.terminal import UserError

# Pillow's numbers of filters, which transformers uses.
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}

# From this size on, ConvNeXt's processor squashes the image; below, it crops.
_CONVNEXT_SQUASHES_FROM = 384


def preprocessing_of(processor: Any, file: str) -> dict[str, Any]:
    """Return the fields of the `Preprocessing` that does what an image processor does.

    The processor is of transformers' "pil" backend; messages name `file`, its configuration.
    """
    resample = 2 if processor.resample is None else int(processor.resample)
    if resample not in _INTERPOLATIONS:
        allowed = ", ".join(f"{number} ({name})" for number, name in _INTERPOLATIONS.items())
        raise UserError(f"{file}: resample {resample} cannot be represented. It must be {allowed}.")
    values = {
        **_geometry(processor, file),
        **_normalization(processor, file),
        "interpolation": _INTERPOLATIONS[resample],
        "crop_rounding": "down",
    }
    if getattr(processor, "do_flip_channel_order", False):  # MobileViT
        values["channels"] = "bgr"
    try:
        difference = _difference(processor, Preprocessing(**values))
    except (ArchiveError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be used: {error}.") from error
    if not difference <= MAX_DIFFERENCE:
        name = type(processor).__name__.removesuffix("Pil")
        raise UserError(
            f"{file}: {name} does more to an image than resize, crop, rescale and normalize. "
            "Export the model to ONNX, which takes a preprocessing of your own: "
            "MODEL_FILE=model.onnx"
        )
    return values


def _geometry(processor: Any, file: str) -> dict[str, Any]:
    """Return resize, crop and fit."""
    if not processor.do_resize:
        raise UserError(
            f"{file}: do_resize is false, but the model takes one size only. Set do_resize to "
            'true and size to that, such as {"height": 224, "width": 224}.'
        )
    if processor.do_pad:
        raise UserError(f"{file}: do_pad cannot be represented. Set it to false.")
    sides = _sides(processor.size)
    crop = None
    if processor.do_center_crop:
        crop = _square(_sides(processor.crop_size), "crop_size", file)
    if sides.keys() == {"height", "width"}:
        resize = _square(sides, "size", file)
        return {"resize": resize, "crop": crop or resize, "fit": "squash"}
    if sides.keys() != {"shortest_edge"}:
        raise UserError(
            f"{file}: size {sides} cannot be represented. It must have shortest_edge, or height "
            "and width."
        )
    edge = sides["shortest_edge"]
    if getattr(processor, "crop_pct", None):
        if edge >= _CONVNEXT_SQUASHES_FROM:
            return {"resize": edge, "crop": crop or edge, "fit": "squash"}
        return {"resize": int(edge / processor.crop_pct), "crop": crop or edge, "fit": "crop"}
    if crop is None:
        raise UserError(
            f"{file}: without do_center_crop an image keeps its aspect ratio, but the model gets "
            "squares only here. Set do_center_crop to true and crop_size to the model's size."
        )
    return {"resize": edge, "crop": crop, "fit": "crop"}


def _sides(size: Any) -> dict[str, int]:
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _square(sides: Mapping[str, int], key: str, file: str) -> int:
    if sides.keys() != {"height", "width"} or sides["height"] != sides["width"]:
        raise UserError(f"{file}: {key} {sides} is not square, as images must be here.")
    return sides["height"]


def _normalization(processor: Any, file: str) -> dict[str, tuple[float, ...]]:
    """Return mean and std, on the scale 0 to 1, of one step equal to the processor's.

    It computes (x * factor - offset - mean) / std, and EfficientNet's divides by std again.
    """
    means, stds = _triple(processor.image_mean), _triple(processor.image_std)
    factor, offset = 1.0, 0.0
    if processor.do_rescale:
        factor = float(processor.rescale_factor)
        offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    if not factor > 0:
        raise UserError(f"{file}: rescale_factor must be above 0, got {factor}.")
    shifts = means if processor.do_normalize else (0.0,) * 3
    times = bool(processor.do_normalize) + bool(getattr(processor, "include_top", False))
    scale = 255 * factor
    return {
        "mean": tuple((shift + offset) / scale for shift in shifts),
        "std": tuple(std**times / scale for std in stds),
    }


def _triple(value: Any) -> tuple[float, ...]:
    """Return three numbers; None, of a processor that does not normalize, counts as 1."""
    values = value if isinstance(value, (list, tuple)) else (1 if value is None else value,)
    return tuple(float(number) for number in values) * (3 if len(values) == 1 else 1)


def _difference(processor: Any, preprocessing: Preprocessing) -> float:
    """Return the largest difference over three views of a photograph, two of them not square."""
    normalized = Input("", "float32", ("NCHW",), None)
    differences = []
    for content in islice(sample_photographs(), 3, 6):
        image = Image.open(BytesIO(content)).convert("RGB")
        expected = np.asarray(processor(image)["pixel_values"][0])
        pixels = np.asarray(resize_and_crop(image, preprocessing)).transpose(2, 0, 1)
        got = normalized.prepare(pixels[None], preprocessing)[0]
        if got.shape != expected.shape:
            return float("inf")
        differences.append(scaled_difference(got, expected))
    return max(differences)
