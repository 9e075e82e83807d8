"""The origins of models, one module each: it reads a model into a `Source`, which
`scripts.build.pipeline` makes an archive of.
"""

from pathlib import Path

from scripts.build.model_file import ModelFile
from scripts.build.sources.source import Source
from scripts.groups import require
from scripts.terminal import UserError


def open_source(spec: ModelFile) -> Source:
    """Read the model that a model file names; PyTorch is installed only if the origin needs it."""
    if spec.has_graph:
        from scripts.build.sources import graph

        return graph.open_source(spec)
    if spec.is_timm:
        require("pytorch", "timm", why=f"timm makes {spec.arch}")
        from scripts.build.sources import timm

        return timm.open_source(spec)
    if spec.model is None:
        engine = " for engine: torch" if spec.engine == "torch" else ""
        require("pytorch", why=f"torchvision makes {spec.arch}{engine}")
        from scripts.build.sources import torchvision

        return torchvision.open_source(spec)
    if spec.is_python:
        require("pytorch", why=f"{spec.model.name} is a PyTorch module")
        from scripts.build.sources import python_file

        return python_file.open_source(spec.model, Path(spec.weights or ""), spec.weights_key)
    if spec.model.suffix == ".onnx":
        from scripts.build.sources import onnx_file

        return onnx_file.open_source(spec.model)
    if spec.model.is_dir():
        require("pytorch", "huggingface", why=f"{spec.model} is a model of transformers")
        from scripts.build.sources import huggingface

        return huggingface.open_source(spec.model)
    raise UserError(
        f"{spec.model} is no model: that is an ONNX file (.onnx), a Python file (.py), or a "
        "folder with config.json, preprocessor_config.json and model.safetensors. A file of "
        "weights goes with its architecture: ARCH=resnet50 WEIGHTS=file"
    )
