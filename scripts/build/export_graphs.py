"""Export the graphs that `scripts.build.sources.graph` fills weights into.

`python -m scripts.build.export_graphs` writes them again, with the pytorch and timm groups; a test
compares them with the files in the repository. Needed after an update of PyTorch only if that test
fails.
"""

import onnx
import onnxscript
import timm
import torch
from onnx import ModelProto, helper
from onnxscript import optimizer, rewriter
from torch import nn

from handler.inference.torch_models import empty_model
from scripts.build.classes import IMAGENET_CLASSES
from scripts.build.export import drop_build_notes, exported
from scripts.build.sources.efficientnet_lite0 import TIMM_NAME
from scripts.build.sources.graph import GRAPHS, file_of
from scripts.store import DEFAULT_ARCHITECTURE
from scripts.terminal import command, step

_SIDE = 224


def module_of(architecture: str) -> nn.Module:
    """Return the PyTorch module of a graph, with 1000 classes."""
    if architecture == DEFAULT_ARCHITECTURE:
        return empty_model(architecture, IMAGENET_CLASSES)  # type: ignore[no-any-return]
    module: nn.Module = timm.create_model(TIMM_NAME, pretrained=False)
    return module.eval()


def export(architecture: str) -> ModelProto:
    """Return a graph whose weights are inputs in addition to `images`, named as in the state dict.

    As inputs they are left alone by the optimizer, which folds batch normalization into
    convolutions and merges tensors of the same values.
    """
    images = torch.zeros((2, 3, _SIDE, _SIDE))
    proto = exported(module_of(architecture), images, optimize=False)
    weights = list(proto.graph.initializer)
    proto.graph.ClearField("initializer")
    proto.graph.input.extend(
        helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in weights
    )
    proto = rewriter.rewrite(optimizer.optimize(proto))
    drop_build_notes(proto)
    proto.producer_version = f"{torch.__version__}, onnxscript {onnxscript.__version__}"
    onnx.checker.check_model(proto, full_check=True)
    return proto


def main() -> None:
    """Write all graphs."""
    for architecture in GRAPHS:
        content = export(architecture).SerializeToString(deterministic=True)
        file_of(architecture).write_bytes(content)
        step(f"Graph: wrote {file_of(architecture)}, {len(content) / 1e3:.0f} kB")


if __name__ == "__main__":
    command(main)
