"""Exports a classifier to ONNX, with normalisation inside, and checks it against PyTorch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handler.settings import Preprocessing
from scripts.terminal import UserError

# Larger differences than this between the exported graph's logits and PyTorch's stop the build.
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

    def forward(self, images: Tensor) -> Tensor:
        """Same steps in the same order as torchvision's ToTensor and Normalize."""
        logits: Tensor = self.classifier((images.float() / 255 - self.mean) / self.std)
        return logits


def export(classifier: nn.Module, preprocessing: Preprocessing, target: Path) -> None:
    """Writes the classifier as ONNX: input `images` uint8 (N, 3, crop, crop), output `logits`
    float32 (N, classes), N free. The same classifier gives the same bytes.
    """
    model = Normalized(classifier, preprocessing).eval()
    crop = preprocessing.crop
    example = torch.zeros((2, 3, crop, crop), dtype=torch.uint8)
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits"],
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
    classifier: nn.Module,
    preprocessing: Preprocessing,
    exported: Path,
    images: NDArray[np.uint8],
    report: Callable[[str], None],
) -> None:
    """Compares the exported graph with PyTorch.

    Args:
        classifier: what was exported.
        preprocessing: what it was exported with.
        exported: the ONNX file.
        images: uint8 (N, 3, crop, crop), run as one batch and one by one.
        report: takes the sentence with the largest difference.

    Raises:
        UserError: a logit differs by more than `MAX_DIFFERENCE`.
    """
    with torch.inference_mode():
        expected = Normalized(classifier, preprocessing).eval()(torch.from_numpy(images)).numpy()
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    together = session.run(["logits"], {"images": images})[0]
    alone = np.concatenate(
        [session.run(["logits"], {"images": images[i : i + 1]})[0] for i in range(len(images))]
    )
    difference = max(float(np.abs(r - expected).max()) for r in (together, alone))
    report(f"largest difference of logits to PyTorch over {len(images)} images: {difference:.1e}")
    # Written so that NaN stops the build too.
    if not difference <= MAX_DIFFERENCE:
        raise UserError(
            f"The exported model differs from PyTorch by {difference:.1e} in a logit, more than "
            f"{MAX_DIFFERENCE:.0e}. Nothing was packed; please report the versions of torch and "
            "onnxruntime."
        )
