"""Quantize a float32 model to int8, and find the layers whose quantization costs most.

NNCF's post-training quantization, calibrated on images as the model gets them. Imports OpenVINO and
NNCF, which only the precision int8 needs.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# NNCF reports its use to its maker, except on machines that set these two.
os.environ.setdefault("NNCF_CI", "1")
os.environ.setdefault("CI", "true")

import logging

import nncf
import numpy as np
import openvino
from numpy.typing import NDArray

nncf.set_log_level(logging.ERROR)

# To rank layers on: noise is a mean over thousands of values of each image.
_RANKING_IMAGES = 8

_QUANTIZED = ("Convolution", "GroupConvolution", "MatMul")
# What may stand between a layer and its weights, as a GroupConvolution's Reshape.
_RESHAPING = ("Convert", "Reshape", "Transpose", "Unsqueeze")


class Layer(NamedTuple):
    """A layer that is quantized.

    Attributes:
        name: for `quantize`.
        weights: name of its weights, such as "features.conv0"; empty if the model file has none.
        noise: mean square of the error that quantizing this layer adds, relative to its output's.
    """

    name: str
    weights: str
    noise: float


def quantize(
    model_file: Path,
    images: Sequence[NDArray[np.uint8]],
    target: Path,
    kept: Collection[str] = (),
) -> None:
    """Write an int8 model.

    Args:
        model_file: the float32 model, as ONNX.
        images: to calibrate on, each uint8 (3, crop, crop).
        target: OpenVINO's `.xml`; a `.bin` is written beside it.
        kept: names of layers that stay in float32, as `costliest` returns them.
    """
    result = nncf.quantize(
        _read(model_file),
        nncf.Dataset([image[None] for image in images]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=list(kept)),
    )
    for number, op in enumerate(result.get_ordered_ops()):
        # OpenVINO numbers operators through the process: the same model would have other bytes.
        if op.get_type_name() not in (*_QUANTIZED, "Parameter"):
            op.set_friendly_name(f"{op.get_type_name()}_{number}")
    openvino.save_model(result, target, compress_to_fp16=False)


def costliest(
    model_file: Path, quantized: Path, images: Sequence[NDArray[np.uint8]]
) -> list[Layer]:
    """Return the layers by the noise that each adds to that of its input, most first.

    Args:
        model_file: the float32 model, as ONNX.
        quantized: the same in int8, with all layers quantized.
        images: each uint8 (3, crop, crop).
    """
    exact, lower = _read(model_file), openvino.Core().read_model(quantized)
    layers = _layers(exact)
    names = [op.get_friendly_name() for op in layers]
    runs = [_probe(model, names) for model in (exact, lower)]
    noise = np.zeros((len(images[:_RANKING_IMAGES]), len(layers), 2))
    for row, image in zip(noise, images, strict=False):
        for index, (wanted, got) in enumerate(
            zip(*(run(image[None]) for run in runs), strict=True)
        ):
            scale = max(float(np.mean(wanted**2)), np.finfo(np.float32).tiny)
            row[index // 2, index % 2] = np.mean((got - wanted) ** 2) / scale
    added = (noise[..., 1] - noise[..., 0]).mean(axis=0)
    found = map(Layer, names, map(_weights_name, layers), added.tolist())
    return sorted(found, key=lambda layer: -layer.noise)


def _read(model_file: Path) -> Any:
    """Read the float32 model; its layers get the same names each time."""
    model = openvino.Core().read_model(model_file)
    model.reshape([1, *list(model.input().partial_shape)[1:]])
    for number, op in enumerate(_layers(model)):
        op.set_friendly_name(f"layer_{number}")
    return model


def _layers(model: Any) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() in _QUANTIZED]


def _weights_name(layer: Any) -> str:
    node = layer.input_value(1).get_node()
    while node.get_type_name() in _RESHAPING:
        node = node.input_value(0).get_node()
    name: str = node.get_friendly_name()
    # Others are made up by an exporter or by OpenVINO, as in "val_17" and "Constant_41785".
    if node.get_type_name() != "Constant" or not {".", "/"} & set(name):
        return ""
    return name.removeprefix("classifier.").removeprefix("model.").removesuffix(".weight")


def _probe(model: Any, layers: Sequence[str]) -> Any:
    """Return a function from an image to each layer's input and output, one after the other."""
    by_name = {op.get_friendly_name(): op for op in _layers(model)}
    watched = []
    for name in layers:
        source = by_name[name].input_value(0)
        if source.get_node().get_type_name() == "FakeQuantize":
            source = source.get_node().input_value(0)
        watched += [source, by_name[name].output(0)]
    probed = openvino.Model(watched, model.get_parameters(), "probed")
    compiled = openvino.Core().compile_model(probed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        found = compiled([image])
        return [found[index] for index in range(len(watched))]

    return run
