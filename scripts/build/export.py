"""Exports a classifier to ONNX, with normalisation inside, and checks it against PyTorch."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import feature_extraction

from handler.settings import Preprocessing
from handler.torch_models import with_features
from scripts.build.differences import MAX_DIFFERENCE, scaled_difference
from scripts.terminal import UserError

# Some models magnify rounding: an export may differ by a few times what float32 does in PyTorch.
_ROUNDINGS = 4

OPSET = 20

# As many as show that the batch axis is free; more would take gigabytes with large models.
_BATCH = 4

# A file of ONNX is one message of protobuf, of less than 2**31 bytes; some are the graph's.
_MOST_BYTES = 2**31 - 2**24

# Among so many last nodes of a graph are the last features, in every architecture that has such.
_LAST_NODES = 12


class Normalized(nn.Module):
    """A classifier that takes uint8 pictures: (N, 3, crop, crop), 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Any:
        """Same steps in the same order as torchvision's ToTensor and Normalize.

        Returns:
            what the classifier gives for them.
        """
        return self.classifier((images.float() / 255 - self.mean) / self.std)


class WithFeatures(nn.Module):
    """A classifier that gives its last features beside its logits."""

    def __init__(self, model: nn.Module, node: str) -> None:
        super().__init__()
        self.model = with_features(model, node)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Same steps in the same order as the classifier's.

        Returns:
            logits (N, classes), and features (N, channels, height, width), of whose means over
            height and width the logits are a linear function.
        """
        found = self.model(images)
        return found["logits"], found["features"]


@dataclass(frozen=True)
class Exportable:
    """What is exported.

    Attributes:
        model: a classifier in evaluation mode.
        preprocessing: of which normalisation becomes part of the graph.
        features: the node that gives its last features; without one they are no output.
        last: the name of its last layer, whose input is its embedding.
    """

    model: nn.Module
    preprocessing: Preprocessing
    features: str = ""
    last: str = ""


@torch.inference_mode()
def features_node(
    model: nn.Module, last_layer: nn.Module, preprocessing: Preprocessing, images: NDArray[np.uint8]
) -> str:
    """The node of the model's graph that gives features to explain a class with.

    That the logits are a linear function of the features' means is not assumed of an architecture,
    but tried with real pictures.

    Args:
        model: in evaluation mode.
        last_layer: its layer that gives the logits.
        preprocessing: of the model.
        images: uint8 (N, 3, crop, crop), of which the first few are tried.

    Returns:
        the node's name; empty where no node is like that, or where it has only one position.
    """
    if not isinstance(last_layer, nn.Linear):
        return ""
    names: list[str] = feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)[1]
    candidates = names[-_LAST_NODES:]
    found = feature_extraction.create_feature_extractor(
        model, candidates, suppress_diff_warning=True
    ).eval()
    outputs = Normalized(found, preprocessing).eval()(torch.from_numpy(images[:_BATCH]))
    logits = outputs[candidates[-1]]
    for name in reversed(candidates):
        features = outputs[name]
        if (
            isinstance(features, Tensor)
            and features.dim() == 4  # noqa: PLR2004  # N, channels, height, width
            and features.shape[1] == last_layer.in_features
            and features.shape[2] * features.shape[3] > 1
            and scaled_difference(last_layer(features.mean((2, 3))), logits) < MAX_DIFFERENCE
        ):
            return name
    return ""


def export(subject: Exportable, target: Path) -> None:
    """Writes the model as ONNX.

    Its input is `images`, uint8 (N, 3, crop, crop), its outputs `logits`, float32 (N, classes), and
    `features`, float32 (N, channels, height, width), N free. The same model gives the same bytes.

    Raises:
        UserError: torch cannot export this architecture.
    """
    model, features = subject.model, subject.features
    whole = WithFeatures(model, features) if features else model
    whole = Normalized(whole, subject.preprocessing).eval()
    crop = subject.preprocessing.crop
    outputs = ["logits", "features"] if features else ["logits"]
    _write(whole, torch.zeros((2, 3, crop, crop), dtype=torch.uint8), outputs, target)


def export_plain(model: nn.Module, crop: int, target: Path) -> None:
    """Writes a model as ONNX as it is: from `images`, float32 (N, 3, crop, crop), normalised.

    Its output is `logits`, float32 (N, classes), N free.

    Raises:
        UserError: torch cannot export this architecture.
    """
    _write(model, torch.zeros((2, 3, crop, crop)), ["logits"], target)


def _write(whole: nn.Module, example: Tensor, outputs: list[str], target: Path) -> None:
    size = sum(tensor.nbytes for tensor in whole.state_dict().values())
    if size > _MOST_BYTES:
        raise UserError(
            f"The weights are {size / 1e9:.1f} GB, and one file of ONNX holds "
            f"{_MOST_BYTES / 1e9:.1f} GB. Serve the model with PyTorch: ENGINE=torch"
        )
    try:
        program = torch.onnx.export(
            whole,
            (example,),
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        graph = program.model_proto
        _drop_build_notes(graph)
        onnx.checker.check_model(graph, full_check=True)
        content = graph.SerializeToString(deterministic=True)
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            f"torch cannot export this architecture to ONNX ({_first_line(error)}). "
            "Serve it with PyTorch: ENGINE=torch"
        ) from error
    target.write_bytes(content)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]


def _drop_build_notes(graph: onnx.ModelProto) -> None:
    """Removes what inference does not need: stack traces and paths of the building machine."""
    graph.ClearField("metadata_props")
    graph.graph.ClearField("metadata_props")
    graph.graph.ClearField("value_info")
    graph.graph.ClearField("doc_string")
    graph.ClearField("functions")
    for part in (*graph.graph.node, *graph.graph.initializer, *graph.graph.input):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def check(
    subject: Exportable,
    exported: Path,
    images: NDArray[np.uint8],
    report: Callable[[str], None],
) -> None:
    """Compares the exported graph with PyTorch.

    Args:
        subject: what was exported.
        exported: the ONNX file.
        images: uint8 (N, 3, crop, crop), run in batches and one by one.
        report: takes the sentence with the largest differences.

    Raises:
        UserError: a logit or a feature differs by more than `MAX_DIFFERENCE`.
    """
    expected = _outputs(subject, images)
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    given = {output.name for output in session.get_outputs()}
    differences = {
        name: _largest_difference(session, name, images, values)
        for name, values in expected.items()
        if name in given
    }
    # Of weights that make logits of thousands, PyTorch's own rounding is large as well.
    large = {name: expected[name] for name, value in differences.items() if value > MAX_DIFFERENCE}
    roundings = _roundings(subject, images, large) if large else {}
    report(
        f"largest difference to PyTorch over {len(images)} images: "
        + ", ".join(
            f"{value:.1e} in {name}"
            + (f" (PyTorch's own rounding: {roundings[name]:.1e})" if name in roundings else "")
            for name, value in differences.items()
        )
    )
    for name, difference in differences.items():
        allowed = max(MAX_DIFFERENCE, _ROUNDINGS * roundings.get(name, 0))
        # Written so that NaN stops the build too.
        if not difference <= allowed:
            raise UserError(
                f"The exported model differs from PyTorch by {difference:.1e} in {name}, more than "
                f"{allowed:.0e}. Nothing was packed; please report the versions of torch and "
                "onnxruntime."
            )


def _roundings(
    subject: Exportable, images: NDArray[np.uint8], expected: dict[str, NDArray[np.floating]]
) -> dict[str, float]:
    """How far what PyTorch gives in float32 is from what it gives in float64."""
    doubled = dataclasses.replace(subject, model=copy.deepcopy(subject.model).double())
    exact = _outputs(doubled, images)
    return {name: scaled_difference(values, exact[name]) for name, values in expected.items()}


def _outputs(subject: Exportable, images: NDArray[np.uint8]) -> dict[str, NDArray[np.floating]]:
    """What PyTorch gives, in the precision of the model's parameters.

    The logits are those of the model before anything was wrapped around it.
    """
    given = [_outputs_of_batch(subject, batch) for batch in _batches(images, _BATCH)]
    return {name: np.concatenate([one[name] for one in given]) for name in given[0]}


def _batches(images: NDArray[np.uint8], size: int) -> list[NDArray[np.uint8]]:
    return [images[i : i + size] for i in range(0, len(images), size)]


@torch.inference_mode()
def _outputs_of_batch(
    subject: Exportable, images: NDArray[np.uint8]
) -> dict[str, NDArray[np.floating]]:
    batch = torch.from_numpy(images)
    precision = next(subject.model.parameters()).dtype

    def run(model: nn.Module) -> Any:
        return Normalized(model, subject.preprocessing).eval().to(precision)(batch)

    found = {}
    if subject.last:

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found["embedding"] = given[0].numpy()

        hook = subject.model.get_submodule(subject.last).register_forward_pre_hook(keep)
        found["logits"] = run(subject.model).numpy()
        hook.remove()
    else:
        found["logits"] = run(subject.model).numpy()
    if subject.features:
        found["features"] = run(WithFeatures(subject.model, subject.features))[1].numpy()
    return found


def _largest_difference(
    session: onnxruntime.InferenceSession,
    output: str,
    images: NDArray[np.uint8],
    expected: NDArray[np.float32],
) -> float:
    """Of one output, with the images in batches and one by one; NaN where any is."""

    def run(size: int) -> NDArray[np.float32]:
        batches = _batches(images, size)
        return np.concatenate([session.run([output], {"images": one})[0] for one in batches])

    return float(np.max([scaled_difference(run(size), expected) for size in (_BATCH, 1)]))
