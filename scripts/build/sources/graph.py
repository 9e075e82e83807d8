"""`ARCH=densenet121` and `ARCH=efficientnet_lite0` without PyTorch: a graph that is a file of the
repository, and weights that are filled into it.

`scripts.build.export_graphs` makes the graphs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from handler.settings import Preprocessing
from scripts.build import onnx_model
from scripts.build.checkpoints import read_checkpoint
from scripts.build.classes import IMAGENET_CLASSES, given_classes
from scripts.build.model_file import RANDOM, ModelFile
from scripts.build.sources import efficientnet_lite0
from scripts.build.sources.download import local_file
from scripts.build.sources.source import Source
from scripts.build.state_dicts import Shape, Template, fit, present_name
from scripts.samples import sample_batch
from scripts.store import DEFAULT_ARCHITECTURE, PACKAGED_ARCHITECTURE
from scripts.terminal import UserError

FOLDER = Path(__file__).parent.parent / "graphs"
RANDOM_FILE = "seeded random numbers"
# Spread of random logits, so that answers differ from image to image.
LOGIT_STD = 2.5
# Of these weights a photo of a cat is recognized, and of others about half.
_SEED = 29

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Graph:
    """What is known of an architecture in addition to its graph.

    Attributes:
        preprocessing: of its published weights.
        weights: the address of these; empty if they are a package.
        multiple: of pixels that `crop` must be, for which the graph's padding is right.
    """

    preprocessing: Preprocessing
    weights: str = ""
    multiple: int = 1


GRAPHS = {
    # The tutorial resizes to 255, torchvision to 256.
    DEFAULT_ARCHITECTURE: Graph(
        Preprocessing(), "https://download.pytorch.org/models/densenet121-a639ec97.pth"
    ),
    PACKAGED_ARCHITECTURE: Graph(efficientnet_lite0.PREPROCESSING, multiple=32),
}
_LAST_LAYER = "classifier"  # of both


def file_of(architecture: str) -> Path:
    """Return the file of an architecture's graph."""
    return FOLDER / f"{architecture}.onnx"


@dataclass(frozen=True, kw_only=True)
class GraphSource(Source):
    """A graph and its weights, by their names in PyTorch."""

    weights: Weights

    def to_onnx(self, preprocessing: Preprocessing, folder: Path) -> onnx_model.Model:
        """See `Source.to_onnx`."""
        crop, multiple = preprocessing.crop, GRAPHS[self.architecture].multiple
        if crop % multiple:
            raise UserError(
                f"preprocessing: crop of {self.architecture} must be a multiple of {multiple}, not "
                f"{crop}."
            )
        taken = onnx_model.Input("images", "float32", ("NCHW",), crop)
        return onnx_model.Model("the graph", _filled(self.architecture, self.weights, crop), taken)


def open_source(spec: ModelFile) -> GraphSource:
    """Return the architecture with its published weights, a file's or random ones."""
    architecture = spec.arch or ""
    graph = GRAPHS[architecture]
    if spec.weights == RANDOM:
        classes = len(given_classes(spec.classes) or range(IMAGENET_CLASSES))
        return random_source(architecture, classes)
    if spec.weights or graph.weights:
        checkpoint, notice = read_checkpoint(local_file(spec.weights or graph.weights)), ""
    else:
        checkpoint, notice = efficientnet_lite0.packaged()
    fitted = fit(checkpoint, template(architecture), spec.weights_key)
    return GraphSource(
        architecture=architecture,
        file=checkpoint.file,
        sha256=checkpoint.sha256,
        outputs=fitted.classes,
        preprocessing=asdict(graph.preprocessing),
        notice=notice,
        weights=fitted.state_dict,
    )


def template(architecture: str) -> Template:
    """Return the names and shapes of an architecture's weights."""
    shapes: dict[str, Shape] = {}
    for value in onnx.load(file_of(architecture)).graph.input[1:]:
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        layer, _, kind = value.name.rpartition(".")
        if kind == "running_var":
            shapes[f"{layer}.num_batches_tracked"] = ()  # in the files, but computes nothing
    # The old names are torchvision's; no name of timm's is like them.
    return Template(architecture, shapes, (_LAST_LAYER,), rename=present_name)


def _filled(architecture: str, weights: Weights, crop: int) -> ModelProto:
    """Return the graph with its weights as constants, for images of so many pixels."""
    proto = onnx.load(file_of(architecture))
    images, *others = proto.graph.input
    for value in others:
        tensor = np.ascontiguousarray(weights[value.name], np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(tensor, value.name))
    for axis in images.type.tensor_type.shape.dim[2:]:
        axis.dim_value = crop
    del proto.graph.input[1:]
    classes = len(weights[f"{_LAST_LAYER}.bias"])
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = classes
    return proto


def random_source(architecture: str, classes: int = IMAGENET_CLASSES) -> GraphSource:
    """Return an architecture with seeded random weights whose answers differ between images.

    A freshly initialized network answers nearly the same for every image. So the statistics of
    batch normalization are random too, and the last layer is centered and scaled on real
    photographs.
    """
    random = np.random.default_rng(_SEED)
    weights: dict[str, NDArray[Any]] = {}
    for name, shape in template(architecture).of_classes(classes).items():
        low, high = (-0.5, 0.5) if name.endswith(("bias", "mean")) else (0.5, 1.5)
        values = random.uniform(low, high, shape)
        if len(shape) > 1:
            values = random.normal(0, float(2 / np.prod(shape[1:])) ** 0.5, shape)
        weights[name] = np.asarray(values, np.float32)
    preprocessing = GRAPHS[architecture].preprocessing
    _spread_logits(architecture, weights, preprocessing)
    return GraphSource(
        architecture=architecture,
        file=RANDOM_FILE,
        sha256=digest(weights),
        outputs=classes,
        preprocessing=asdict(preprocessing),
        trained=False,
        weights=weights,
    )


def digest(weights: Weights) -> str:
    """Return the SHA-256 of weights' names and values."""
    found = hashlib.sha256()
    for name, values in weights.items():
        found.update(name.encode() + values.tobytes())
    return found.hexdigest()


def _spread_logits(
    architecture: str, weights: dict[str, NDArray[Any]], preprocessing: Preprocessing
) -> None:
    """Give each class a mean logit of 0 over the photographs, and all a common spread."""
    weight, bias = f"{_LAST_LAYER}.weight", f"{_LAST_LAYER}.bias"
    filled = _filled(architecture, weights, preprocessing.crop)
    session = onnxruntime.InferenceSession(filled.SerializeToString())
    taken = onnx_model.Input("images", "float32", ("NCHW",), preprocessing.crop)
    images = taken.prepare(sample_batch(preprocessing), preprocessing)
    (logits,) = session.run(["logits"], {"images": images})
    scale = LOGIT_STD / (logits - logits.mean(0)).std()
    weights[bias] = ((weights[bias] - logits.mean(0)) * scale).astype(np.float32)
    weights[weight] = (weights[weight] * scale).astype(np.float32)
