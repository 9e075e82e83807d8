"""Export a PyTorch module to ONNX, and compare the packed model with PyTorch."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.status import Status
from torch import Tensor, nn
from torchvision.models import feature_extraction

from handler.settings import Preprocessing
from scripts.build.differences import MAX_DIFFERENCE, check_difference, scaled_difference
from scripts.build.messages import first_line
from scripts.samples import sample_batch
from scripts.terminal import UserError, console

# Some models magnify rounding: an export may differ from PyTorch by this many times the difference
# between float32 and float64 in PyTorch.
_MAX_ROUNDINGS = 4

# Enough to show that the batch axis is free; more would take gigabytes with large models.
_BATCH = 4
_NOISE_IMAGES = 8

# Of the weights. A file of ONNX is one message of protobuf, of less than 2**31 bytes; 16 MiB are
# for the graph.
_MAX_BYTES = 2**31 - 2**24

# The last features are among so many last nodes in every architecture of torchvision that has some.
_LAST_NODES = 12


class Normalized(nn.Module):
    """A classifier that takes uint8 images: RGB (N, 3, crop, crop), 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.classifier = classifier
        self.reversed = preprocessing.channels == "bgr"
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Any:
        """Normalize as torchvision's ToTensor and Normalize do; return the classifier's output."""
        images = images.flip(1) if self.reversed else images
        return self.classifier((images.float() / 255 - self.mean) / self.std)


def write_onnx(model: nn.Module, crop: int, target: Path, architecture: str) -> None:
    """Write a model as ONNX: `images`, float32 (N, 3, crop, crop), to `logits`, (N, classes).

    N is free. The same model gives the same bytes.
    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > _MAX_BYTES:
        raise UserError(
            f"The weights are {size / 1e9:.1f} GB, and one file of ONNX holds "
            f"{_MAX_BYTES / 1e9:.1f} GB. Serve the model with PyTorch: engine: torch"
        )
    example = torch.zeros((2, 3, crop, crop))
    try:
        with torch.inference_mode():
            model(example)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{architecture} cannot take images of {crop} x {crop} pixels: {first_line(error)}. "
            "Choose another crop."
        ) from error
    with Status("Exporting the model to ONNX (about 10 seconds) ...", console=console):
        try:
            proto = exported(model, example)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(
                f"torch cannot export {architecture} to ONNX ({first_line(error)}). Serve it with "
                "PyTorch: engine: torch"
            ) from error
    drop_build_notes(proto)
    onnx.checker.check_model(proto, full_check=True)
    target.write_bytes(proto.SerializeToString(deterministic=True))


def exported(model: nn.Module, example: Tensor, **options: Any) -> onnx.ModelProto:
    """Return what torch.onnx exports, from `images` to `logits`, for any number of images."""
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
        opset_version=20,
        dynamo=True,
        verbose=False,
        **options,
    )
    assert program is not None
    return program.model_proto


def drop_build_notes(proto: onnx.ModelProto) -> None:
    """Remove what inference does not need: stack traces and paths of the building machine."""
    graph = proto.graph
    proto.ClearField("metadata_props")
    proto.ClearField("functions")
    graph.ClearField("value_info")
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def compare(model: nn.Module, packed: Path, preprocessing: Preprocessing) -> None:
    """Compare the packed model's logits with PyTorch's, in batches and one by one."""
    with Status("Comparing the exported model with PyTorch ...", console=console):
        shape = (_NOISE_IMAGES, 3, preprocessing.crop, preprocessing.crop)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        images = np.concatenate([sample_batch(preprocessing), noise])
        expected = _logits(model, images, preprocessing)
        session = onnxruntime.InferenceSession(str(packed), providers=["CPUExecutionProvider"])
        free = not isinstance(session.get_inputs()[0].shape[0], int)
        differences = []
        for size in (_BATCH, 1) if free else (1,):
            batches = _batches(images, size)
            got = np.concatenate([session.run(["logits"], {"images": b})[0] for b in batches])
            # A model with one output was packed with two, its own last.
            differences.append(scaled_difference(got[:, -expected.shape[1] :], expected))
        difference = float(np.max(differences))  # NaN if any is
        rounding = 0.0
        if not difference <= MAX_DIFFERENCE:
            # If logits are in the thousands, PyTorch's own rounding is large as well.
            doubled = copy.deepcopy(model).double()
            exact = _logits(doubled, images, preprocessing)
            rounding = scaled_difference(expected, exact)
    kind = f"logits (PyTorch's own rounding: {rounding:.1e})" if rounding else "logits"
    allowed = max(MAX_DIFFERENCE, _MAX_ROUNDINGS * rounding)
    check_difference(difference, "PyTorch", len(images), allowed, kind=kind)


@torch.inference_mode()
def _logits(
    model: nn.Module, images: NDArray[np.uint8], preprocessing: Preprocessing
) -> NDArray[np.floating]:
    """Return PyTorch's logits, in the precision of the model's parameters."""
    precision = next((tensor.dtype for tensor in model.parameters()), torch.float32)
    whole = Normalized(model, preprocessing).eval().to(precision)
    given = [whole(torch.from_numpy(batch)).numpy() for batch in _batches(images, _BATCH)]
    return np.concatenate(given)


def _batches(images: NDArray[np.uint8], size: int) -> list[NDArray[np.uint8]]:
    return [images[i : i + size] for i in range(0, len(images), size)]


@torch.inference_mode()
def features_node(model: nn.Module, last: nn.Module, preprocessing: Preprocessing) -> str:
    """Find the node of a module's graph whose features class activation maps are made of.

    Tested with real images: the logits must be a linear function of the features' means, which
    `last` computes. Return the node's name, as `with_features` takes it; empty if no node is like
    that, or if it has only one position.
    """
    if not isinstance(last, nn.Linear):
        return ""
    names: list[str] = feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)[1]
    candidates = names[-_LAST_NODES:]
    found = feature_extraction.create_feature_extractor(
        model, candidates, suppress_diff_warning=True
    ).eval()
    images = torch.from_numpy(sample_batch(preprocessing)[:_BATCH])
    outputs = Normalized(found, preprocessing).eval()(images)
    logits = outputs[candidates[-1]]
    for name in reversed(candidates):
        features = outputs[name]
        if (
            isinstance(features, Tensor)
            and features.dim() == 4  # N, channels, height, width
            and features.shape[1] == last.in_features
            and features.shape[2] * features.shape[3] > 1
            and scaled_difference(last(features.mean((2, 3))), logits) < MAX_DIFFERENCE
        ):
            return name
    return ""
