"""Exports DenseNet to ONNX, with normalisation inside, and checks it against PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from handler.settings import Preprocessing
from scripts.terminal import UserError

# Larger differences than this between the exported graph's outputs and PyTorch's stop the build.
# Both compute in float32 with sums in another order; 1e-5 was seen.
MAX_DIFFERENCE = 1e-4

OPSET = 20


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
    """A DenseNet that gives its last features beside its logits."""

    def __init__(self, densenet: nn.Module) -> None:
        super().__init__()
        self.features = densenet.get_submodule("features")
        self.classifier = densenet.get_submodule("classifier")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Same steps in the same order as torchvision's DenseNet.

        Returns:
            logits (N, classes), and features (N, channels, height, width) after the last ReLU,
            of whose means over height and width the logits are a linear function.
        """
        features = functional.relu(self.features(images))
        pooled = functional.adaptive_avg_pool2d(features, (1, 1))
        return self.classifier(torch.flatten(pooled, 1)), features


def export(densenet: nn.Module, preprocessing: Preprocessing, target: Path) -> None:
    """Writes the model as ONNX: input `images` uint8 (N, 3, crop, crop), outputs `logits` float32
    (N, classes) and `features` float32 (N, channels, height, width), N free. The same model gives
    the same bytes.
    """
    model = Normalized(WithFeatures(densenet), preprocessing).eval()
    crop = preprocessing.crop
    example = torch.zeros((2, 3, crop, crop), dtype=torch.uint8)
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits", "features"],
        dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto
    _drop_build_notes(graph)
    onnx.checker.check_model(graph, full_check=True)
    target.write_bytes(graph.SerializeToString(deterministic=True))


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
    densenet: nn.Module,
    preprocessing: Preprocessing,
    exported: Path,
    images: NDArray[np.uint8],
    report: Callable[[str], None],
) -> None:
    """Compares the exported graph with PyTorch.

    Args:
        densenet: what was exported.
        preprocessing: what it was exported with.
        exported: the ONNX file.
        images: uint8 (N, 3, crop, crop), run as one batch and one by one.
        report: takes the sentence with the largest differences.

    Raises:
        UserError: a logit or a feature differs by more than `MAX_DIFFERENCE`.
    """
    batch = torch.from_numpy(images)
    with torch.inference_mode():
        # The logits are those of the model as it was before anything was wrapped around it.
        logits = Normalized(densenet, preprocessing).eval()(batch).numpy()
        features = Normalized(WithFeatures(densenet), preprocessing).eval()(batch)[1].numpy()
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    differences = [
        _largest_difference(session, name, images, expected)
        for name, expected in (("logits", logits), ("features", features))
    ]
    report(
        f"largest difference to PyTorch over {len(images)} images: "
        f"{differences[0]:.1e} in logits, {differences[1]:.1e} in features"
    )
    difference = max(differences)
    # Written so that NaN stops the build too.
    if not difference <= MAX_DIFFERENCE:
        raise UserError(
            f"The exported model differs from PyTorch by {difference:.1e}, more than "
            f"{MAX_DIFFERENCE:.0e}. Nothing was packed; please report the versions of torch and "
            "onnxruntime."
        )


def _largest_difference(
    session: onnxruntime.InferenceSession,
    output: str,
    images: NDArray[np.uint8],
    expected: NDArray[np.float32],
) -> float:
    """Of one output, with all images in one batch and one by one; NaN where any is."""
    together = session.run([output], {"images": images})[0]
    alone = np.concatenate(
        [session.run([output], {"images": images[i : i + 1]})[0] for i in range(len(images))]
    )
    return float(np.max([np.abs(got - expected).max() for got in (together, alone)]))
