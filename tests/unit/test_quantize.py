"""An int8 model of a small float32 one, and the layer that this costs most."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from handler.cores import Cores
from handler.onnx_engine import OnnxEngine
from handler.openvino_engine import OpenVinoEngine
from scripts.build.quantize import costliest, quantise

SIDE = 16
CHANNELS = (3, 16, 16, 16)
SPOILT = "classifier.block.conv2.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three convolutions; the second has a channel that 8 bits leave nothing for the others of."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "most"], ["x0"]),
    ]
    values = [numpy_helper.from_array(np.array(255, np.float32), "most")]
    for number, (before, after) in enumerate(itertools.pairwise(CHANNELS), 1):
        name = f"classifier.block.conv{number}.weight"
        weights = random.normal(0, 0.2, (after, before, 3, 3)).astype(np.float32)
        if name == SPOILT:
            weights[:, 0] *= 300
        values.append(numpy_helper.from_array(weights, name))
        nodes.append(
            helper.make_node("Conv", [f"x{number - 1}", name], [f"c{number}"], pads=[1] * 4)
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"x{number}"]))
    nodes += [
        helper.make_node("Identity", ["x3"], ["features"]),
        helper.make_node("GlobalAveragePool", ["x3"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    shapes: dict[str, list[str | int]] = {"logits": ["n", 16], "features": ["n", 16, SIDE, SIDE]}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()],
        values,
    )
    opset = helper.make_opsetid("", 17)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


@pytest.fixture
def pictures() -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(1).integers(0, 256, (40, 3, SIDE, SIDE), np.uint8))


def test_int8_is_near_float32_nearer_without_the_costliest_layer(
    model: Path, pictures: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    cores, images = Cores(1, 1, tmp_path / "busy"), np.stack(pictures[20:])
    exact = OnnxEngine(model, cores).logits(images)

    def error(kept: tuple[str, ...]) -> float:
        quantise(model, pictures[:20], tmp_path / "int8.xml", kept)
        found = OpenVinoEngine(tmp_path / "int8.xml", "int8", cores).logits(images)
        return float(np.abs(found - exact).mean() / np.abs(exact).mean())

    everything = error(())
    ranking = costliest(model, tmp_path / "int8.xml", pictures)
    assert {name for name, _ in ranking} == {f"block.conv{number}" for number in (1, 2, 3)}
    assert ranking[0][0] == "block.conv2"
    assert 0 < error((ranking[0][0],)) < everything < 0.2


def test_the_same_pictures_give_the_same_bytes(
    model: Path, pictures: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    made = []
    for name in ("first", "second"):
        quantise(model, pictures, tmp_path / f"{name}.xml")
        made.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("xml", "bin")])
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in made[0][0]
