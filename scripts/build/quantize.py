"""Makes an int8 model of a float32 one, and finds the layers that this costs most.

NNCF's post-training quantisation, calibrated on pictures as the model gets them. Imports OpenVINO
and NNCF, which only `PRECISION=int8` needs.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

# NNCF would report its use to its maker; these two it takes for machines that must not.
os.environ.setdefault("NNCF_CI", "1")
os.environ.setdefault("CI", "true")

import logging

import nncf
import numpy as np
import openvino
from numpy.typing import NDArray

nncf.set_log_level(logging.ERROR)

# Pictures to rank layers with: noise is a mean over thousands of values of each.
_RANKED_ON = 8

_QUANTISED = ("Convolution", "GroupConvolution", "MatMul")


def quantise(
    model_file: Path,
    pictures: Sequence[NDArray[np.uint8]],
    target: Path,
    kept: Collection[str] = (),
) -> None:
    """Writes an int8 model.

    Args:
        model_file: the float32 model, as ONNX.
        pictures: to calibrate on, each uint8 (3, crop, crop).
        target: OpenVINO's `.xml`; a `.bin` is written beside it.
        kept: names of layers that stay in float32, as `costliest` gives them.
    """
    model = _read(model_file)
    result = nncf.quantize(
        model,
        nncf.Dataset([picture[None] for picture in pictures]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pictures),
        ignored_scope=nncf.IgnoredScope(
            names=[op.get_friendly_name() for op in _layers(model) if _name(op) in kept]
        ),
    )
    for number, op in enumerate(result.get_ordered_ops()):
        # What OpenVINO made is numbered through the process: the same model would have other bytes.
        if op.get_type_name() not in (*_QUANTISED, "Parameter"):
            op.set_friendly_name(f"{op.get_type_name()}_{number}")
    openvino.save_model(result, target, compress_to_fp16=False)


def costliest(
    model_file: Path, quantised: Path, pictures: Sequence[NDArray[np.uint8]]
) -> list[tuple[str, float]]:
    """Layers by the noise that each adds, most first.

    Noise is the mean square of what quantisation changes, as a part of the mean square itself; a
    layer adds what its output has more of than its input.

    Args:
        model_file: the float32 model, as ONNX.
        quantised: the same in int8.
        pictures: each uint8 (3, crop, crop).

    Returns:
        names, as of the layers' weights, and noise, a part of 1.
    """
    exact, lower = _read(model_file), openvino.Core().read_model(quantised)
    names = [_name(op) for op in _layers(exact)]
    order = [op.get_friendly_name() for op in _layers(exact)]
    runs = [_looked_into(model, order) for model in (exact, lower)]
    noise = np.zeros((len(pictures[:_RANKED_ON]), len(names), 2))
    for row, picture in zip(noise, pictures, strict=False):
        found = [run(picture[None]) for run in runs]
        for index, (wanted, got) in enumerate(zip(*found, strict=True)):
            row[index // 2, index % 2] = np.mean((got - wanted) ** 2) / np.mean(wanted**2)
    added = noise[..., 1].mean(axis=0) - noise[..., 0].mean(axis=0)
    return sorted(zip(names, added.tolist(), strict=True), key=lambda item: -item[1])


def _read(model_file: Path) -> Any:
    model = openvino.Core().read_model(model_file)
    model.reshape([1, *list(model.input().partial_shape)[1:]])
    return model


def _layers(model: Any) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() in _QUANTISED]


def _name(layer: Any) -> str:
    """What the layer's weights are called, as in "features.conv0.weight"."""
    name: str = layer.input_value(1).get_node().get_friendly_name()
    return name.removeprefix("classifier.").removeprefix("model.").removesuffix(".weight")


def _looked_into(model: Any, layers: Sequence[str]) -> Any:
    """A function from a picture to each layer's input and output, one after the other."""
    by_name = {op.get_friendly_name(): op for op in _layers(model)}
    watched = []
    for name in layers:
        source = by_name[name].input_value(0)
        if source.get_node().get_type_name() == "FakeQuantize":
            source = source.get_node().input_value(0)
        watched += [source, by_name[name].output(0)]
    looked_into = openvino.Model(watched, model.get_parameters(), "looked into")
    compiled = openvino.Core().compile_model(
        looked_into, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(picture: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        found = compiled([picture])
        return [found[index] for index in range(len(watched))]

    return run
