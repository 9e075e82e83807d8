"""ONNX files of other tools: packed so that they answer as before, or rejected with the reason."""

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from scipy.special import expit

from handler.inference.activation import softmax
from handler.inference.cores import Cores
from handler.inference.engines import Extra, load_engine
from handler.labels import CLASS_INDEX
from handler.settings import Preprocessing
from scripts import samples
from scripts.build.convert import convert
from scripts.build.model_file import from_options
from scripts.build.onnx_model import read
from scripts.build.pipeline import build
from scripts.store import read_card
from scripts.terminal import UserError
from tests.onnx_files import CLASSES, Made, model, quantized, with_data_elsewhere, with_operator
from tests.unit.parts import archive

SAID = {"resize": 72, "crop": 64, "mean": 0.5, "std": 0.25}
sample_images = cache(samples.sample_batch)


@pytest.fixture(autouse=True)
def _images_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding the sample images would take most of the time of these tests."""
    monkeypatch.setattr("scripts.build.convert.sample_batch", sample_images)


def packed(proto: ModelProto, folder: Path, **options: Any) -> Path:
    (folder / "mine.onnx").write_bytes(proto.SerializeToString())
    keys: dict[str, Any] = {
        "model": folder / "mine.onnx",
        "classes": [f"class {i}" for i in range(CLASSES)],
        "preprocessing": SAID,
        **options,
    }
    return build(from_options(**keys), folder)


class Converted(NamedTuple):
    """What would be packed, and what it gives for the sample images."""

    images: Any
    logits: Any
    classifier: Any
    features: Any


def converted(
    proto: ModelProto,
    folder: Path,
    *,
    classes: int = CLASSES,
    multilabel: bool = False,
    channels: str = "rgb",
) -> Converted:
    file = folder / "mine.onnx"
    file.write_bytes(proto.SerializeToString())
    normalizes = proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    mean, std = (0.0, 1.0) if normalizes else (0.5, 0.25)
    preprocessing = Preprocessing(72, 64, (mean,) * 3, (std,) * 3, channels=channels)
    target = folder / "converted.onnx"
    card = archive(classes=classes, preprocessing=preprocessing).card
    if multilabel:
        card = replace(card, activation="sigmoid", thresholds=(0.5,) * classes)
    made = convert(read(file), card, target)
    names = {value.name for value in onnx.load(target).graph.output}
    assert made.channels == (16 if "embedding" in names else 0)
    engine = load_engine(target, card, Cores(1, 1, folder / "busy"))
    images = sample_images(preprocessing, 3)
    classifier = features = None
    if made.classifier.exists():
        classifier, features = np.load(made.classifier), engine.run(images, Extra.FEATURES)[1]
    return Converted(images, engine.run(images).logits, classifier, features)


def plain(proto: ModelProto, images: np.ndarray[Any, Any], made: Made) -> np.ndarray[Any, Any]:
    """What ONNX Runtime gives of the file itself."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values = images if made.dtype == TensorProto.UINT8 else (images / np.float32(255) - 0.5) / 0.25
    if made.dtype != TensorProto.UINT8:
        values = values.astype(np.float16 if made.dtype == TensorProto.FLOAT16 else np.float32)
    values = values.transpose(0, 2, 3, 1) if made.nhwc else values
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in values])


@pytest.mark.parametrize(
    ("made", "largest", "has_maps"),
    [
        pytest.param(Made(), 1e-4, True, id="plain"),
        pytest.param(Made(shape=(1, 3, 64, 64), fixed=True), 1e-4, True, id="batch of one"),
        pytest.param(Made(shape=(1, 3, 64, 64)), 1e-4, True, id="batch of one in its shape only"),
        pytest.param(Made(shape=("N", 64, 64, 3), nhwc=True), 1e-4, True, id="channels last"),
        pytest.param(Made(shape=(-1, -1, -1, -1)), 1e-4, True, id="sizes of -1"),
        pytest.param(Made(shape=("N", "c", "h", "w")), 1e-4, True, id="no shape"),
        pytest.param(
            Made(shape=("N", "a", "b", "c"), nhwc=True), 1e-4, True, id="no shape, channels last"
        ),
        pytest.param(Made(dtype=TensorProto.FLOAT16), 0.05, False, id="half precision"),
        pytest.param(Made(dtype=TensorProto.UINT8), 1e-4, True, id="whole numbers"),
        pytest.param(Made(names=("images", "features")), 1e-4, True, id="the handler's names"),
        pytest.param(Made(names=("logits", "embedding")), 1e-4, True, id="its names for others"),
        pytest.param(Made(hidden=True), 1e-4, False, id="a hidden layer"),
        pytest.param(Made(end=("LogSoftmax",)), 1e-4, False, id="log softmax"),
    ],
)
def test_logits_equal_those_of_the_file_and_so_do_maps_if_the_last_layer_is_linear(
    made: Made,
    largest: float,
    has_maps: bool,
    tmp_path: Path,
) -> None:
    found = converted(model(made), tmp_path)
    expected = plain(model(made), found.images, made)
    assert np.abs(found.logits - expected).max() < largest
    assert np.ptp(expected, axis=0).max() > 0.5
    assert (found.classifier is not None) is has_maps
    if has_maps:
        difference = found.features.mean((2, 3)) @ found.classifier.T - expected
        assert np.abs(difference - difference[0]).max() < 1e-4


@pytest.mark.parametrize("end", [("Softmax", "Flatten"), ("Softmax", "Neg", "Neg")])
def test_probabilities_become_logits(end: tuple[str, ...], tmp_path: Path) -> None:
    made = Made(end=end)
    found = converted(model(made), tmp_path)
    expected = plain(model(made), found.images, made)
    assert np.abs(softmax(found.logits) - expected).max() < 1e-5
    assert (found.classifier is not None) is ("Neg" not in end)


@pytest.mark.parametrize("end", [(), ("Sigmoid", "Identity", "Flatten")])
def test_one_output_distinguishes_two_classes(end: tuple[str, ...], tmp_path: Path) -> None:
    made = Made(classes=1, end=end)
    found = converted(model(made), tmp_path, classes=2)
    raw = plain(model(replace(made, end=())), found.images, made)[:, 0]
    assert np.abs(softmax(found.logits)[:, 1] - expit(raw)).max() < 1e-5
    assert found.classifier.shape == (2, 16)


def rescaled(proto: ModelProto, scale: float, shift: float) -> ModelProto:
    """Logits times a number, and another number added."""
    for tensor in proto.graph.initializer:
        if tensor.name in {"weight", "bias"}:
            values = numpy_helper.to_array(tensor) * scale + (tensor.name == "bias") * shift
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return proto


@pytest.mark.parametrize(
    ("classes", "end"),
    [
        (CLASSES, ()),
        (2, ("Sigmoid",)),
        (1, ("Sigmoid",)),
        (CLASSES, ("Sigmoid", "Flatten", "Dropout")),
    ],
)
def test_each_output_is_a_label_of_a_multi_label_model(
    classes: int, end: tuple[str, ...], tmp_path: Path
) -> None:
    made = Made(classes=classes, end=end)
    found = converted(model(made), tmp_path, classes=classes, multilabel=True)
    expected = plain(model(replace(made, end=())), found.images, made)
    assert np.abs(expit(found.logits) - expit(expected)).max() < 1e-5
    assert found.classifier.shape == (classes, 16)


def test_thresholds_are_packed_with_a_multi_label_model(tmp_path: Path) -> None:
    proto = model(Made(end=("Sigmoid",)))
    card = read_card(packed(proto, tmp_path, activation="sigmoid", thresholds=0.3))
    assert card is not None
    assert (card.activation, card.thresholds) == ("sigmoid", (0.3,) * CLASSES)


def test_a_sigmoid_before_a_cast_is_removed(tmp_path: Path) -> None:
    """Files that compute in float16, but take and give float32, are written like this."""
    found = converted(model(Made(half=True, end=("Sigmoid",))), tmp_path, multilabel=True)
    expected = plain(model(Made(half=True)), found.images, Made())
    assert np.abs(found.logits - expected).max() < 0.05


def test_probabilities_near_0_are_not_the_same_for_all(tmp_path: Path) -> None:
    proto = rescaled(model(Made(classes=1, end=("Sigmoid",))), 1, -25)
    found = converted(proto, tmp_path, classes=1, multilabel=True)
    assert np.ptp(found.logits) > 1


def test_outputs_of_a_linear_layer_are_logits_even_if_they_are_from_0_to_1(tmp_path: Path) -> None:
    proto = rescaled(model(), 0.01, 0.5)
    found = converted(proto, tmp_path, multilabel=True)
    assert np.abs(found.logits - plain(proto, found.images, Made())).max() < 1e-4
    assert 0 < found.logits.min() < found.logits.max() < 1


def test_functions_are_resolved(tmp_path: Path) -> None:
    found = converted(with_functions(4), tmp_path)
    assert np.abs(found.logits - plain(model(), found.images, Made())).max() < 1e-4


def in_a_branch() -> ModelProto:
    """Weights in another file, in a graph within the graph."""
    proto = model()
    inner = with_data_elsewhere("../../etc/passwd").graph
    proto.graph.node[-1].attribute.append(helper.make_attribute("then_branch", inner))
    return proto


def huge() -> ModelProto:
    """A few bytes that ask for 4 TB."""
    proto = model()
    sizes = numpy_helper.from_array(np.array([10**6, 10**6], np.int64), "sizes")
    proto.graph.initializer.append(sizes)
    large = helper.make_node("ConstantOfShape", ["sizes"], ["large"])
    greatest = helper.make_node("ReduceMax", ["large"], ["one"], keepdims=0)
    proto.graph.node.extend([large, greatest, helper.make_node("Add", ["output", "one"], ["sum"])])
    proto.graph.output[0].name = "sum"
    return proto


def with_functions(count: int, *, circle: bool = False) -> ModelProto:
    """The answer goes through functions that each call the one before twice."""
    proto = model()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for number in range(count):
        before = count - 1 if circle and number == 0 else number - 1
        operator, domain = ("Identity", "") if before < 0 else (f"twice{before}", "mine")
        nodes = [helper.make_node(operator, [x], [y], domain=domain) for x, y in ("xy", "yz")]
        proto.functions.append(
            helper.make_function("mine", f"twice{number}", ["x"], ["z"], nodes, opsets)
        )
    proto.opset_import.append(opsets[1])
    last = proto.graph.node[-1]
    last.op_type, last.domain = f"twice{count - 1}", "mine"
    return proto


def with_argument(value: Any) -> ModelProto:
    """A function that takes an attribute, and uses it 300 times."""
    proto = with_functions(1)
    (function,) = proto.functions
    function.attribute.append("value")
    for number in range(300):
        node = helper.make_node("Constant", [], [f"unused{number}"])
        node.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
        function.node.append(node)
    proto.graph.node[-1].attribute.append(helper.make_attribute("value", value))
    return proto


def of_type(number: int) -> ModelProto:
    proto = model()
    proto.graph.input[0].type.tensor_type.elem_type = number
    return proto


def two_inputs() -> ModelProto:
    second = helper.make_tensor_value_info("also", TensorProto.FLOAT, [1])
    proto = model()
    proto.graph.input.append(second)
    return proto


def with_thousands_of_zeros() -> ModelProto:
    return with_argument(numpy_helper.from_array(np.zeros(10**6, np.float32)))


IN_OTHER_OPERATORS = "gives numbers from 0 to 1 only, .*it ends in Neg. Export it"
TOO_MANY_NODES = "more than 1,000,000 nodes would come of them"
LARGE = {"fit": "pad", "mean": 0.5, "std": 0.25}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Made(shape=("N", 1, 64, 64)), r"\? x 1 x 64 x 64, in which no axis has 3 channels"),
        (Made(shape=("N", 3, 64, 48)), "they must be squares"),
        (Made(shape=("N", 3)), r"tensor of \? x 3. It must take images"),
        (Made(shape=("N", 3, 32, 32)), "crop of mine.onnx is 32 and cannot be changed"),
        (Made(classes=7), "names 5 classes, but mine.onnx has 7. .*in the order of its outputs"),
        (Made(end=("Sigmoid",)), "Build it with ACTIVATION=sigmoid"),
        (Made(end=("Sigmoid", "Flatten")), "Build it with ACTIVATION=sigmoid"),
        (Made(end=("Sigmoid", "Neg", "Neg")), IN_OTHER_OPERATORS),
        (Made(opset=99), r"version 99 .*supports 8 to \d+.*opset_version=20"),
        (Made(opset=6), r"version 6 of ONNX's operators"),
        (
            Made(dtype=TensorProto.UINT8),
            "mean of mine.onnx is .* cannot be changed: leave it out|std of mine",
        ),
        (quantized, "quantized to 8 bits already.*PRECISION=int8 quantizes it"),
        (lambda: with_operator("com.acme", "Run"), "would need a library: com.acme.Run"),
        (lambda: with_data_elsewhere("weights.bin"), r"another file \('weights.bin'"),
        (lambda: with_data_elsewhere("/etc/passwd"), "keeps its weights in another"),
        (in_a_branch, r"another file \('../../etc/passwd'"),
        (huge, "ran out of memory|cannot be run"),
        (lambda: with_functions(40), f"{TOO_MANY_NODES}. Export it without functions"),
        (with_thousands_of_zeros, TOO_MANY_NODES),
        (lambda: with_argument(model().graph), "functions that take graphs as attributes"),
        (lambda: with_functions(3, circle=True), "call themselves, which ONNX forbids"),
        (lambda: of_type(99), r"takes a type that is none \(99\). It must take"),
        (two_inputs, "must have one input.* It has 2: input, also"),
        (lambda: rescaled(model(), 0, 1), "gives the same for all photographs"),
    ],
)
def test_a_model_that_cannot_be_served_is_rejected_with_the_reason(
    made: Made | Callable[[], ModelProto], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        packed(model(made) if isinstance(made, Made) else made(), tmp_path)
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (("Softmax",), "ends in a softmax"),
        (("Softmax", "Flatten"), "ends in a softmax"),
        (("LogSoftmax",), "ends in a softmax"),
        (("Softmax", "Neg", "Neg"), IN_OTHER_OPERATORS),
        (("Sigmoid", "Neg", "Neg"), IN_OTHER_OPERATORS),
    ],
)
def test_probabilities_of_one_label_are_rejected_for_a_multi_label_model(
    end: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        packed(model(Made(end=end)), tmp_path, activation="sigmoid")


NO_ONNX = "no ONNX file|no valid ONNX model"


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (b"", 0, NO_ONNX),
        (b"not a model", 11, NO_ONNX),
        (model().SerializeToString(), 2000, NO_ONNX),
        (b"", 3_000_000_000, "has 3.0 GB. One file of ONNX holds 2 GB at most"),
    ],
    ids=["empty", "something else", "cut off", "too large"],
)
def test_a_file_that_is_no_model_or_too_large_is_rejected(
    content: bytes, size: int, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.onnx"
    file.write_bytes(content)
    os.truncate(file, size)
    with pytest.raises(UserError, match=message):
        read(file)


UNUSABLE = "preprocessing of mine.onnx: "


@pytest.mark.parametrize(
    ("side", "said", "message"),
    [
        ("h", {}, r"under preprocessing: resize, crop, mean, std \("),
        (64, {}, r"under preprocessing: resize, mean, std \("),
        (64, {"preset": "tf"}, r"under preprocessing: resize \("),
        (300_000, {**LARGE, "resize": 72}, f"{UNUSABLE}crop must be 1 to 4096, got 300000"),
        (5000, LARGE, f"{UNUSABLE}resize must be 1 to 4096"),
        (64, {**SAID, "mean": float("nan")}, f"{UNUSABLE}mean must be .* numbers of float32"),
        (64, {**SAID, "std": float("inf")}, f"{UNUSABLE}std must be three numbers of float32"),
    ],
)
def test_missing_or_impossible_preprocessing_is_rejected(
    side: int | str, said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        packed(model(Made(shape=("N", 3, side, side))), tmp_path, preprocessing=said)


def test_a_model_that_takes_bgr_gets_bgr_with_mean_and_std_in_its_order(tmp_path: Path) -> None:
    """The same numbers as with the kernel's channels reversed, which takes RGB."""
    proto = model()
    found = converted(proto, tmp_path, channels="bgr")
    kernel = next(tensor for tensor in proto.graph.initializer if tensor.name == "kernel")
    values = numpy_helper.to_array(kernel)[:, ::-1].copy()
    kernel.CopyFrom(numpy_helper.from_array(values, "kernel"))
    assert np.abs(found.logits - plain(proto, found.images, Made())).max() < 1e-4


def saturated(classes: int) -> ModelProto:
    """Class 2 gets a probability of 1 for all photographs, though logits differ."""
    proto = model(Made(classes=classes))
    for tensor in proto.graph.initializer:
        if tensor.name == "bias":
            values = numpy_helper.to_array(tensor).copy()
            values[2] += 100
            tensor.CopyFrom(numpy_helper.from_array(values, "bias"))
    return proto


def test_a_model_that_is_certain_of_one_class_is_rejected_unless_it_has_few_or_may(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(saturated(CLASSES), tmp_path)
    assert "with class 2 and a probability above 0.999" in capsys.readouterr().out
    many = [f"class {i}" for i in range(12)]
    with pytest.raises(UserError, match=r"with class 2 .*preprocessing.* allow_saturated: true"):
        packed(saturated(12), tmp_path, classes=many, name="many")
    packed(saturated(12), tmp_path, classes=many, name="many", allow_saturated=True)


def test_class_names_and_input_size_come_from_the_file_unless_overridden(tmp_path: Path) -> None:
    """As Ultralytics' exports have them."""
    proto = model(Made(shape=("N", 3, "h", "w")))
    names = {index: f"name {index}" for index in range(CLASSES)}
    helper.set_model_props(proto, {"names": str(names), "imgsz": "[64, 64]"})
    said = {"resize": 72, "mean": 0.5, "std": 0.25}
    archive = packed(proto, tmp_path, classes=None, preprocessing=said)
    card = read_card(archive)
    assert card is not None
    assert card.preprocessing.crop == 64
    with zipfile.ZipFile(archive) as content:
        labels = json.loads(content.read(CLASS_INDEX))
    assert labels["4"] == ["name 4", "name 4"]
    with zipfile.ZipFile(packed(proto, tmp_path, preprocessing=said)) as content:
        assert json.loads(content.read(CLASS_INDEX))["4"] == ["class 4", "class 4"]


def test_a_model_of_one_image_at_a_time_is_packed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(model(Made(shape=(1, 3, 64, 64), fixed=True)), tmp_path)
    assert "requests are never batched" in capsys.readouterr().out
