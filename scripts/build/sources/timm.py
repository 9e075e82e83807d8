"""`ARCH=timm/NAME`: timm makes the model and defines its preprocessing; workers do without timm.

Weights come from a file, or from the Hugging Face hub at a pinned revision.
"""

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm as library
import timm.data
import torch

from scripts.build.checkpoints import read_checkpoint
from scripts.build.model_file import TIMM, ModelFile
from scripts.build.sources.download import fetch_from_hub
from scripts.build.sources.source import TorchSource
from scripts.build.state_dicts import Template, fit, load_into
from scripts.terminal import UserError

# timm's crop modes as values of `Preprocessing.fit`.
_FITS = {"center": "crop", "squash": "squash", "border": "pad"}


def open_source(spec: ModelFile) -> TorchSource:
    """Return timm's model with the user's weights, or with those of the hub."""
    architecture = spec.arch or ""
    name, config = architecture.removeprefix(TIMM), _config(architecture)
    if spec.weights:
        path = Path(spec.weights)
    elif config.hf_hub_id:
        path = fetch_from_hub(config.hf_hub_id, spec.revision)
    else:
        raise UserError(
            f"timm keeps no weights of {architecture} on the hub. Give a file: WEIGHTS=path"
        )
    checkpoint = read_checkpoint(path)
    heads = (config.classifier,) if isinstance(config.classifier, str) else config.classifier
    if not heads:
        raise UserError(f"{architecture} has no layer of classes.")
    with torch.device("meta"):
        model = library.create_model(name, pretrained=False, num_classes=2)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    fitted = fit(checkpoint, Template(architecture, shapes, tuple(heads)), spec.weights_key)
    module = library.create_model(name, pretrained=False, num_classes=fitted.classes).eval()
    return TorchSource(
        architecture=architecture,
        file=checkpoint.file,
        sha256=checkpoint.sha256,
        outputs=fitted.classes,
        preprocessing=_preprocessing(config),
        module=load_into(module, fitted),
    )


def _preprocessing(config: Any) -> dict[str, Any]:
    """Return timm's preprocessing as fields of `Preprocessing`."""
    data: Any = timm.data
    resolved = data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    crop = resolved["input_size"][-1]
    return {
        "resize": math.floor(crop / resolved["crop_pct"]),
        "crop": crop,
        "mean": tuple(resolved["mean"]),
        "std": tuple(resolved["std"]),
        "interpolation": resolved["interpolation"],
        "fit": _FITS.get(resolved["crop_mode"], resolved["crop_mode"]),
    }


def _config(architecture: str) -> Any:
    name = architecture.removeprefix(TIMM)
    config = library.get_pretrained_cfg(name) if library.is_model(name) else None
    if config is None:
        known = [*library.list_models(), *library.list_pretrained()]
        alike = ", ".join(TIMM + other for other in get_close_matches(name, known, n=8))
        raise UserError(f"timm has no model {name!r}." + (f" Alike are: {alike}." if alike else ""))
    return config
