"""An int8 model of a small float32 one, and the layer that this costs most."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from handler.inference.cores import Cores
from handler.inference.onnx_engine import OnnxEngine
from handler.inference.openvino_engine import OpenVinoEngine
from handler.inference.precision import CHECK_IMAGES, CHECK_LABELS
from handler.labels import Label
from handler.settings import Preprocessing
from scripts.build.model_file import Precision
from scripts.build.quantize import costliest, quantize
from scripts.build.reduced_precision import add_reduced_precision, digest
from scripts.terminal import UserError
from tests.unit.parts import archive

SIDE = 16
CHANNELS = (3, 16, 16, 16)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return three convolutions: of the second, one channel's weights leave no precision to the
    others; the third is depthwise.
    """
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "most"], ["x0"]),
    ]
    values = [numpy_helper.from_array(np.array(255, np.float32), "most")]
    for number, (before, after) in enumerate(itertools.pairwise(CHANNELS), 1):
        name = f"classifier.block.conv{number}.weight"
        groups = before if number == 3 else 1
        shape = (after, before // groups, 3, 3)
        weights = random.normal(0, 0.2, shape).astype(np.float32)
        if number == 2:
            weights[:, 0] *= 300
        values.append(numpy_helper.from_array(weights, name))
        inputs, output = [f"x{number - 1}", name], f"c{number}"
        nodes.append(helper.make_node("Conv", inputs, [output], pads=[1] * 4, group=groups))
        nodes.append(helper.make_node("Relu", [output], [f"x{number}"]))
    nodes += [
        helper.make_node("Identity", ["x3"], ["features"]),
        helper.make_node("GlobalAveragePool", ["x3"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    shapes: dict[str, list[str | int]] = {"logits": ["n", 16], "features": ["n", 16, SIDE, SIDE]}
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, SIDE, SIDE])
    outputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()]
    graph = helper.make_graph(nodes, "small", [given], outputs, values)
    path, opset = tmp_path / "model.onnx", helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


@pytest.fixture
def images() -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(1).integers(0, 256, (40, 3, SIDE, SIDE), np.uint8))


def test_int8_is_near_float32_and_nearer_without_the_costliest_layer(
    model: Path, images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    cores, held_out = Cores(1, 1, tmp_path / "busy"), np.stack(images[20:])
    exact = OnnxEngine(model, cores).run(held_out).logits

    def error(*kept: str) -> float:
        quantize(model, images[:20], tmp_path / "int8.xml", kept)
        found = OpenVinoEngine(tmp_path / "int8.xml", "int8", cores).run(held_out).logits
        return float(np.abs(found - exact).mean() / np.abs(exact).mean())

    everything = error()
    ranking = costliest(model, tmp_path / "int8.xml", images)
    by_weights = {layer.weights: layer.name for layer in ranking}
    assert by_weights.keys() == {f"block.conv{number}" for number in (1, 2, 3)}
    assert ranking[0].weights == "block.conv2"
    assert 0 < error(ranking[0].name) < everything < 0.2
    # The weights of a depthwise layer pass a Reshape, which OpenVINO numbers anew each time.
    kept = [error(*list(by_weights.values())[:count]) for count in (2, 3)]
    assert kept[1] < kept[0]


def test_the_same_images_give_the_same_bytes(
    model: Path, images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    made = []
    for name in ("first", "second"):
        quantize(model, images, tmp_path / f"{name}.xml")
        made.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("xml", "bin")])
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in made[0][0]


# --- Multi-label models ---

LABELS = [Label(f"n{number}", f"name {number}") for number in range(CHANNELS[-1])]
SOFTMAX_CARD = archive(LABELS, preprocessing=Preprocessing(SIDE, SIDE)).card
CARD = dataclasses.replace(SOFTMAX_CARD, activation="sigmoid", thresholds=(0.5,) * len(LABELS))


@pytest.fixture
def known(model: Path, tmp_path: Path) -> Path:
    """Images of many colors, and the list of what float32 sees on each."""
    random = np.random.default_rng(2)
    colors = random.integers(0, 256, (80, 1, 1, 3))
    pixels = (colors + random.integers(-9, 10, (80, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    engine = OnnxEngine(model, Cores(1, 1, tmp_path / "busy"))
    logits = engine.run(pixels.transpose(0, 3, 1, 2)).logits
    _spread(model, logits)
    folder = tmp_path / "known"
    folder.mkdir()
    lines = []
    for number, (image, row) in enumerate(zip(pixels, logits > logits.mean(axis=0), strict=True)):
        Image.fromarray(image).save(folder / f"{number}.png")
        lines.append([f"{number}.png", *(LABELS[index].class_id for index in np.flatnonzero(row))])
    (folder / "labels.csv").write_text("\n".join(map(",".join, lines)))
    return folder


def _spread(model: Path, logits: NDArray[np.float32]) -> None:
    """Give the model logits about 0, so that each class passes on half of the images."""
    proto = onnx.load(model)
    proto.graph.node[-1].output[0] = "flat"
    for name, values in (("mean", logits.mean(axis=0)), ("spread", logits.std(axis=0))):
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    proto.graph.node.append(helper.make_node("Sub", ["flat", "mean"], ["centered"]))
    proto.graph.node.append(helper.make_node("Div", ["centered", "spread"], ["logits"]))
    onnx.save(proto, model)


def test_the_cost_of_int8_is_reported_as_mean_average_precision_if_labels_are_known(
    model: Path, known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "\n".join((known / "labels.csv").read_text().splitlines()[:70])
    (known / "labels.csv").write_text(few)
    add_reduced_precision(
        Precision(type="int8", calibration=known, max_loss=5), model, CARD, LABELS, tmp_path
    )
    printed = " ".join("".join(capsys.readouterr()).split())
    (points,) = re.findall(
        r"100.00% in float32, \S+ in reduced precision, a loss of (\S+) percentage points",
        printed,
    )
    assert 0 < float(points) < 5
    # Half is held back, and the list names no labels of the last ten.
    measured = int(re.findall(r"same labels as float32: \d+ of (\d+) images", printed)[0])
    assert 30 <= measured < 40
    assert f"labels.csv does not name {40 - measured} of the images" in printed
    assert (tmp_path / "int8.xml").exists()
    labels = np.load(tmp_path / CHECK_LABELS)
    assert (labels.dtype, labels.shape[1]) == (np.bool_, len(LABELS))
    assert len(np.load(tmp_path / CHECK_IMAGES)) == len(labels) > 1


def test_int8_that_ranks_images_otherwise_is_rejected(
    model: Path, known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrated on dark images, it takes all that is bright for equally bright."""
    dark = tmp_path / "dark"
    dark.mkdir()
    for number, pixels in enumerate(np.random.default_rng(3).integers(0, 9, (9, SIDE, SIDE, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(dark / f"{number}.png")
    wanted = Precision(type="int8", calibration=dark, evaluation=known)
    with pytest.raises(
        UserError,
        match=r"int8 costs too much, and no archive was written: mean average precision loses \S+ "
        r"percentage points, and the limit is 0.5. Most noise is added by block.conv.* Calibrate "
        "on more images .*, or change max_loss under precision in the model file",
    ):
        add_reduced_precision(wanted, model, CARD, LABELS, tmp_path)
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "9 images are few to calibrate on" in printed


@pytest.mark.parametrize("in_folders", [True, False])
def test_a_limit_of_top_1_or_of_agreement_that_is_exceeded_stops_the_build(
    in_folders: bool,
    model: Path,
    known: Path,
    tmp_path: Path,
) -> None:
    """In folders named as the classes the accuracy decides, in one folder the agreement."""
    proto = onnx.load(model)
    (spread,) = (value for value in proto.graph.initializer if value.name == "spread")
    spread.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(spread) / 9, "spread"))
    onnx.save(proto, model)
    engine = OnnxEngine(model, Cores(1, 1, tmp_path / "busy"))
    folder = tmp_path / "classes"
    for file in sorted(known.glob("*.png")):
        pixels = np.asarray(Image.open(file)).transpose(2, 0, 1)
        best = int(engine.run(pixels[None]).logits.argmax())
        target = folder.joinpath(*([LABELS[best].class_id] * in_folders), file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    wanted = Precision(type="int8", calibration=folder, agreement=1)
    message = r"top-1 accuracy loses" if in_folders else r"float32's top-1 prediction, .* 100.00%"
    with pytest.raises(UserError, match=f"costs too much, .* written: .*{message}"):
        add_reduced_precision(wanted, model, SOFTMAX_CARD, LABELS, tmp_path)


def test_agreement_is_not_judged_on_near_ties(model: Path, known: Path, tmp_path: Path) -> None:
    for file in list(known.glob("*.png"))[30:]:
        file.unlink()
    with pytest.raises(UserError, match=r"bf16 .* cannot be judged, .*: \d+ of 30 images are not"):
        add_reduced_precision(
            Precision(type="bf16", evaluation=known), model, SOFTMAX_CARD, LABELS, tmp_path
        )


def test_a_list_that_does_not_fit_stops_before_anything_is_quantized(
    model: Path, known: Path, tmp_path: Path
) -> None:
    wanted, listed = Precision(type="int8", calibration=known), known / "labels.csv"
    before = digest(wanted)
    listed.write_text("0.png,nmae 3\n")
    assert digest(wanted) != before
    with pytest.raises(UserError, match=r"no class 'nmae 3', as .*labels.csv has it. It has 16"):
        add_reduced_precision(wanted, model, CARD, LABELS, tmp_path)
    listed.write_text("".join(f"{number}.png\n" for number in range(80)))
    with pytest.raises(UserError, match="has no label for the 40 images used"):
        add_reduced_precision(wanted, model, CARD, LABELS, tmp_path)
    assert not (tmp_path / "int8.xml").exists()
