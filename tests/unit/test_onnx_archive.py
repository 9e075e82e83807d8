"""ONNX files from elsewhere: packed as they answer, or refused with a sentence."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from handler.cores import Cores
from handler.engines import load_engine
from handler.responses import softmax
from handler.settings import ModelCard, Preprocessing
from scripts.build.activation import choose
from scripts.build.onnx_archive import build, convert
from scripts.build.onnx_model import read
from scripts.build.packing import Said
from scripts.samples import sample_batch
from scripts.store import read_card
from scripts.terminal import UserError
from tests.onnx_files import CLASSES, Made, model, quantised, with_data_elsewhere, with_operator

SAID = Said(resize=72, crop=64, mean="0.5", std="0.25")


def saved(proto: ModelProto, folder: Path, classes: int = CLASSES) -> tuple[Path, Path]:
    (folder / "mine.onnx").write_bytes(proto.SerializeToString())
    names = "\n".join(f"class {i}" for i in range(classes))
    (folder / "classes.txt").write_text(names)
    return folder / "mine.onnx", folder / "classes.txt"


@dataclass(frozen=True)
class Converted:
    """What would be packed, and what it gives for photographs."""

    images: Any
    logits: Any
    classifier: Any
    features: Any


def converted(
    proto: ModelProto,
    folder: Path,
    *,
    normalised: bool = False,
    classes: int = CLASSES,
    several: bool = False,
) -> Converted:
    file, _ = saved(proto, folder)
    mean, std = (0.0, 1.0) if normalised else (0.5, 0.25)
    preprocessing = Preprocessing(72, 64, (mean,) * 3, (std,) * 3)
    target, classifier, channels = convert(
        read(file), preprocessing, classes, folder, several=several
    )
    outputs = {value.name for value in onnx.load(target).graph.output}
    assert channels == (16 if "embedding" in outputs else 0)
    card = ModelCard("mine", classes, True, "", "", "", preprocessing)  # noqa: FBT003
    engine = load_engine(target, card, Cores(1, 1, folder / "busy"))
    images = sample_batch(preprocessing, 3)
    features = None if classifier is None else engine.logits_and_features(images)[1]
    return Converted(images, engine.logits(images), classifier, features)


def plain(proto: ModelProto, images: np.ndarray[Any, Any], made: Made) -> np.ndarray[Any, Any]:
    """What ONNX Runtime gives of the file itself."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values = images if made.dtype == TensorProto.UINT8 else (images / np.float32(255) - 0.5) / 0.25
    if made.dtype != TensorProto.UINT8:
        values = values.astype(np.float16 if made.dtype == TensorProto.FLOAT16 else np.float32)
    values = values.transpose(0, 2, 3, 1) if made.nhwc else values
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in values])


KINDS = {
    "plain": Made(),
    "one at a time": Made(shape=(1, 3, 64, 64), fixed=True),
    "batch of one in its shape only": Made(shape=(1, 3, 64, 64)),
    "channels last": Made(shape=("N", 64, 64, 3), nhwc=True),
    "sizes of -1": Made(shape=(-1, -1, -1, -1)),
    "shape not said": Made(shape=("N", "c", "h", "w")),
    "shape not said, channels last": Made(shape=("N", "a", "b", "c"), nhwc=True),
    "half precision": Made(dtype=TensorProto.FLOAT16),
    "the handler's names": Made(names=("images", "features")),
    "the handler's names for others": Made(names=("logits", "embedding")),
    "a hidden layer": Made(hidden=True),
    "log softmax": Made(end=("LogSoftmax",)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_file_gives(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]
    found = converted(model(made), tmp_path)
    expected = plain(model(made), found.images, made)
    assert np.abs(found.logits - expected).max() < (0.05 if "half" in kind else 1e-4)
    assert len(set(expected.argmax(1))) > 1
    without_maps = {"a hidden layer", "half precision", "log softmax"}
    assert (found.classifier is None) is (kind in without_maps)
    if found.classifier is not None:
        difference = found.features.mean((2, 3)) @ found.classifier.T - expected
        assert np.abs(difference - difference[0]).max() < 1e-4


def test_functions_are_resolved(tmp_path: Path) -> None:
    found = converted(with_functions(4), tmp_path)
    assert np.abs(found.logits - plain(model(), found.images, Made())).max() < 1e-4


@pytest.mark.parametrize("end", [("Softmax",), ("Softmax", "Flatten"), ("Softmax", "Neg", "Neg")])
def test_probabilities_become_logits(end: tuple[str, ...], tmp_path: Path) -> None:
    made = Made(end=end)
    found = converted(model(made), tmp_path)
    expected = plain(model(made), found.images, made)
    assert np.abs(softmax(found.logits) - expected).max() < 1e-5
    assert (found.classifier is not None) is ("Neg" not in end)


@pytest.mark.parametrize("end", [(), ("Sigmoid",), ("Sigmoid", "Identity", "Flatten")])
def test_one_output_tells_two_classes_apart(end: tuple[str, ...], tmp_path: Path) -> None:
    made = Made(classes=1, end=end)
    found = converted(model(made), tmp_path, classes=2)
    raw = plain(model(replace(made, end=())), found.images, made)[:, 0]
    assert np.abs(softmax(found.logits)[:, 1] - 1 / (1 + np.exp(-raw))).max() < 1e-5
    assert found.classifier.shape == (2, 16)


def rescaled(proto: ModelProto, scale: float, shift: float) -> ModelProto:
    """Logits times a number, and another number added."""
    for tensor in proto.graph.initializer:
        if tensor.name in {"weight", "bias"}:
            values = numpy_helper.to_array(tensor) * scale + (tensor.name == "bias") * shift
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return proto


def sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("classes", [CLASSES, 2, 1])
@pytest.mark.parametrize("end", [(), ("Sigmoid",), ("Sigmoid", "Flatten", "Dropout")])
def test_each_output_is_a_label_where_a_picture_has_several(
    end: tuple[str, ...], classes: int, tmp_path: Path
) -> None:
    made = Made(classes=classes, end=end)
    found = converted(model(made), tmp_path, classes=classes, several=True)
    expected = plain(model(replace(made, end=())), found.images, made)
    assert np.abs(sigmoid(found.logits) - sigmoid(expected)).max() < 1e-5
    assert found.classifier.shape == (classes, 16)


def test_several_labels_are_packed_with_their_thresholds(tmp_path: Path) -> None:
    file, names = saved(model(Made(end=("Sigmoid",))), tmp_path)
    archive = build(
        file, SAID, classes=names, model_store=tmp_path, labelling=choose("sigmoid", "0.3")
    )
    card = read_card(archive)
    assert card is not None
    assert (card.activation, card.thresholds) == ("sigmoid", (0.3,) * CLASSES)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (("Softmax",), "ends in a softmax"),
        (("Softmax", "Flatten"), "ends in a softmax"),
        (("LogSoftmax",), "ends in a softmax"),
        (("Softmax", "Neg", "Neg"), "gives numbers from 0 to 1 only, .*it ends in Neg. Export it"),
        (("Sigmoid", "Neg", "Neg"), "gives numbers from 0 to 1 only, .*it ends in Neg. Export it"),
    ],
)
def test_probabilities_that_are_not_of_several_labels_are_refused(
    end: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    file, names = saved(model(Made(end=end)), tmp_path)
    with pytest.raises(UserError, match=message):
        build(file, SAID, classes=names, model_store=tmp_path, labelling=choose("sigmoid"))


def test_a_sigmoid_before_a_cast_is_left_out(tmp_path: Path) -> None:
    """As files are written that compute in float16 and take and give float32."""
    found = converted(model(Made(half=True, end=("Sigmoid",))), tmp_path, several=True)
    expected = plain(model(Made(half=True)), found.images, Made())
    assert np.abs(found.logits - expected).max() < 0.05


def test_probabilities_near_0_are_not_the_same_for_all(tmp_path: Path) -> None:
    proto = rescaled(model(Made(classes=1, end=("Sigmoid",))), 1, -25)
    found = converted(proto, tmp_path, classes=1, several=True)
    assert np.ptp(found.logits) > 1


def test_logits_from_0_to_1_are_logits_where_a_linear_layer_gives_them(tmp_path: Path) -> None:
    proto = rescaled(model(), 0.01, 0.5)
    found = converted(proto, tmp_path, several=True)
    assert np.abs(found.logits - plain(proto, found.images, Made())).max() < 1e-4
    assert 0 < found.logits.min() < found.logits.max() < 1


def test_pictures_in_whole_numbers_are_passed_on(tmp_path: Path) -> None:
    made = Made(dtype=TensorProto.UINT8)
    found = converted(model(made), tmp_path, normalised=True)
    assert np.abs(found.logits - plain(model(made), found.images, made)).max() < 1e-4


def test_what_is_unchanged_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, names = saved(model(), tmp_path)
    first = build(file, SAID, classes=names, model_store=tmp_path).read_bytes()
    build(file, SAID, classes=names, model_store=tmp_path)
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "mine.mar").unlink()
    assert build(file, SAID, classes=names, model_store=tmp_path).read_bytes() == first


def noted(proto: ModelProto, **fields: Any) -> ModelProto:
    for name, value in fields.items():
        getattr(proto, name).extend(value)
    return proto


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
    for node in (
        helper.make_node("ConstantOfShape", ["sizes"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["one"], keepdims=0),
        helper.make_node("Add", ["output", "one"], ["sum"]),
    ):
        proto.graph.node.append(node)
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


WRONG: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "one channel": (
        lambda: model(Made(shape=("N", 1, 64, 64))),
        r"tensor of \? x 1 x 64 x 64, in which no axis has 3 channels",
    ),
    "no square": (lambda: model(Made(shape=("N", 3, 64, 48))), "they must be squares"),
    "no picture": (lambda: model(Made(shape=("N", 3))), r"tensor of \? x 3. It must take pictures"),
    "another size": (lambda: model(Made(shape=("N", 3, 32, 32))), "32 x 32 pixels.*CROP=32"),
    "other classes": (
        lambda: model(Made(classes=7)),
        "no output with a number for each of the 5 classes.* output 1 x 7",
    ),
    "several labels": (lambda: model(Made(end=("Sigmoid",))), "Say so: ACTIVATION=sigmoid"),
    "several labels, flattened": (
        lambda: model(Made(end=("Sigmoid", "Flatten"))),
        "Say so: ACTIVATION=sigmoid",
    ),
    "several labels in other operators": (
        lambda: model(Made(end=("Sigmoid", "Neg", "Neg"))),
        "gives numbers from 0 to 1 only, .*it ends in Neg. Export it",
    ),
    "too new": (lambda: model(Made(opset=99)), r"version 99 .*knows 8 to \d+.*opset_version=20"),
    "too old": (lambda: model(Made(opset=6)), r"version 6 of ONNX's operators"),
    "8 bits": (quantised, "in 8 bits already.*PRECISION=int8 makes 8 bits of it"),
    "custom": (lambda: with_operator("com.acme", "Run"), "would need a library: com.acme.Run"),
    "data beside it": (lambda: with_data_elsewhere("weights.bin"), r"another file \('weights.bin'"),
    "data far away": (lambda: with_data_elsewhere("/etc/passwd"), "keeps its weights in another"),
    "data in a branch": (in_a_branch, r"another file \('../../etc/passwd'"),
    "4 TB": (huge, "ended for want of memory|cannot be run"),
    "functions without end": (
        lambda: with_functions(40),
        "more than 1,000,000 nodes would come of them. Export it without functions",
    ),
    "a large argument of a function": (
        lambda: with_argument(numpy_helper.from_array(np.zeros(10**6, np.float32))),
        "more than 1,000,000 nodes would come of them",
    ),
    "a graph for a function": (
        lambda: with_argument(model().graph),
        "functions that take graphs as attributes",
    ),
    "functions in a circle": (
        lambda: with_functions(3, circle=True),
        "functions that call themselves, which ONNX forbids",
    ),
    "no type of ONNX's": (lambda: of_type(99), r"takes a type that is none \(99\). It must take"),
    "two inputs": (two_inputs, "must have one input.* It has 2: input, also"),
    "the same for all": (lambda: rescaled(model(), 0, 1), "gives the same for all photographs"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind: str, tmp_path: Path) -> None:
    make, message = WRONG[kind]
    file, names = saved(make(), tmp_path)
    with pytest.raises(UserError, match=message):
        build(file, SAID, classes=names, model_store=tmp_path)
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_what_is_no_model_is_said(content: bytes | None, tmp_path: Path) -> None:
    file, names = saved(model(), tmp_path)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match=r"no ONNX file|no valid ONNX model"):
        build(file, SAID, classes=names, model_store=tmp_path)


def test_a_file_of_3_gb_is_not_read(tmp_path: Path) -> None:
    file, names = saved(model(), tmp_path)
    os.truncate(file, 3_000_000_000)
    with pytest.raises(UserError, match=r"has 3.0 GB. One file of ONNX holds 2 GB at most"):
        build(file, SAID, classes=names, model_store=tmp_path)


def test_preprocessing_must_be_said(tmp_path: Path) -> None:
    file, names = saved(model(Made(shape=("N", 3, "h", "w"))), tmp_path)
    with pytest.raises(UserError, match=r"Say it: RESIZE=... CROP=... MEAN=... STD=... "):
        build(file, Said(), classes=names, model_store=tmp_path)
    file, names = saved(model(), tmp_path)
    with pytest.raises(UserError, match=r"Say it: RESIZE=... MEAN=... STD=... "):
        build(file, Said(), classes=names, model_store=tmp_path)


@pytest.mark.parametrize(
    ("side", "said", "message"),
    [
        (300_000, replace(SAID, crop=None), "crop must be 1 to 4096, got 300000"),
        (5000, replace(SAID, resize=None, crop=None, fit="pad"), "resize must be 1 to 4096"),
        (64, replace(SAID, mean="nan", fit="pad"), "mean must be three numbers of float32"),
        (64, replace(SAID, mean="1e300", fit="pad"), "mean must be three numbers of float32"),
        (64, replace(SAID, std="inf"), "std must be three numbers of float32"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(
    side: int, said: Said, message: str, tmp_path: Path
) -> None:
    file, names = saved(model(Made(shape=("N", 3, side, side))), tmp_path)
    with pytest.raises(UserError, match=f"preprocessing of mine.onnx cannot be used: {message}"):
        build(file, said, classes=names, model_store=tmp_path)


def test_normalising_twice_is_refused(tmp_path: Path) -> None:
    file, names = saved(model(Made(dtype=TensorProto.UINT8)), tmp_path)
    with pytest.raises(UserError, match=r"normalises them itself. Leave MEAN and STD out"):
        build(file, SAID, classes=names, model_store=tmp_path)


def test_the_command_does_without_pytorch(tmp_path: Path) -> None:
    file, names = saved(model(), tmp_path)
    options = f"--model-file={file} --classes={names} --model-store={tmp_path} --resize=72"
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "import runpy; runpy.run_module('scripts.build.commands', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *options.split(), "--mean=0.5", "--std=0.25"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "mine.mar").exists(), result.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "scripts.build.commands", *options.split(), "--arch=resnet18"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MODEL_FILE is a whole model. Leave ARCH out." in refused.stderr
