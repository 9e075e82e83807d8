"""`MODEL_FILE=model.py WEIGHTS=file`: the user's own PyTorch code, as `torch-model-archiver
--model-file` takes it: exactly one nn.Module class, made without arguments.

Only this source runs code of the user's. The code is not packed: what is served is ONNX.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from scripts.build.checkpoints import read_checkpoint
from scripts.build.sources.source import TorchSource
from scripts.build.state_dicts import Template, fit, load_into
from scripts.store import sha256
from scripts.terminal import UserError


def open_source(path: Path, weights: Path, weights_key: str | None) -> TorchSource:
    """Run the file, make its one class, and load the weights."""
    kind = _only_class(_imported(path), path)
    try:
        module: nn.Module = kind().eval()
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"{path.name}: {kind.__name__}() cannot be made without arguments "
            f"({type(error).__name__}: {error}). Give its arguments default values."
        ) from error
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    checkpoint = read_checkpoint(weights)
    load_into(module, fit(checkpoint, Template(kind.__name__, shapes), weights_key))
    code = hashlib.sha256(f"{sha256(path)}{checkpoint.sha256}".encode()).hexdigest()
    return TorchSource(architecture=kind.__name__, file=checkpoint.file, sha256=code, module=module)


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_file_of_the_user", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The file may import others of its folder.
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.pop(0)
    return module


def _only_class(module: ModuleType, path: Path) -> type[nn.Module]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise UserError(
            f"{path} must have exactly one nn.Module class, the model. It has {names}. Classes of "
            "its parts go into another file, which it imports."
        )
    return found[0]
