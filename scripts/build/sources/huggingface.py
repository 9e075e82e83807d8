"""`MODEL_FILE=folder`: an image classifier in Hugging Face's form, which transformers loads.

Weights come from safetensors only. No code of the folder is run, and nothing is fetched.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from scripts.build.classes import classes_from_json
from scripts.build.messages import first_line, listed, read_bytes
from scripts.build.sources.image_processor import preprocessing_of
from scripts.build.sources.source import TorchSource
from scripts.terminal import UserError, warn

try:
    import transformers
    from huggingface_hub import constants
except ImportError as missing:
    raise UserError(
        "A folder needs packages that are not here: make setup-huggingface"
    ) from missing

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_SHARDS = "model.safetensors.index.json"
# Formats whose files can hold code, or that need another framework.
_OTHER_WEIGHTS = {".bin", ".ckpt", ".h5", ".msgpack", ".pkl", ".pt", ".pth"}
_CHANNELS = 3


class Logits(nn.Module):
    """A classifier of transformers, reduced to its logits."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Any:
        """Return float32 (N, classes) for normalized images, float32 (N, 3, crop, crop)."""
        return self.classifier(pixel_values=images, return_dict=True).logits


def open_source(folder: Path) -> TorchSource:
    """Read config.json, preprocessor_config.json and model.safetensors."""
    raw = {name: _read(folder, name) for name in (CONFIG, PREPROCESSOR, WEIGHTS)}
    values, _ = (_parse(raw[name], folder / name) for name in (CONFIG, PREPROCESSOR))
    with _offline():
        config = _config(values, folder / CONFIG)
        preprocessing = preprocessing_of(_processor(config, folder / PREPROCESSOR), PREPROCESSOR)
        module = Logits(_classifier(config, raw[WEIGHTS], folder / WEIGHTS)).eval()
    digests = [hashlib.sha256(content).hexdigest() for content in raw.values()]
    return TorchSource(
        architecture=config.model_type,
        file=folder.resolve().name,
        sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        outputs=config.num_labels,
        preprocessing=preprocessing,
        labels=_labels(config, str(folder / CONFIG)),
        module=module,
    )


def _read(folder: Path, name: str) -> bytes:
    if (folder / name).exists():
        return read_bytes(folder / name, "file")
    others = sorted(path.name for path in folder.glob("*") if path.suffix in _OTHER_WEIGHTS)
    saved = "image_processor" if name == PREPROCESSOR else "model"
    advice = f"Save it with transformers: {saved}.save_pretrained(folder)"
    if name == WEIGHTS and (folder / _SHARDS).exists():
        advice = (
            "Its weights are in several files. Save them as one: "
            "model.save_pretrained(folder, max_shard_size='100GB')"
        )
    elif name == WEIGHTS and others:
        advice = (
            f"Weights in {others[0]} are not loaded, since such files can hold code. Save the "
            "model as safetensors where you trust it: model.save_pretrained(folder)"
        )
    raise UserError(f"{folder} has no {name}. {advice}")


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object.")
    if values.get("auto_map"):
        raise UserError(
            f"{path} names code of its own (auto_map), which is not run here. Export the model to "
            "ONNX where you trust it: MODEL_FILE=model.onnx"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{path}: the weights are quantized. Bring them in float32: PRECISION=int8 quantizes "
            "the model and measures what that costs."
        )
    return values


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from the network, and from then on from printing."""
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _config(values: Mapping[str, Any], path: Path) -> Any:
    kind = values.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}. "
            "Export the model to ONNX: MODEL_FILE=model.onnx"
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(dict(values))
    except Exception as error:  # its checks raise many kinds
        raise UserError(f"{path} cannot be used: {first_line(error)}.") from error
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UserError(f"{path}: {kind} is no image classifier, and only those can be served.")
    channels = getattr(config, "num_channels", _CHANNELS)
    if channels != _CHANNELS:
        raise UserError(
            f"{path}: the model takes images of {channels} channels (num_channels). It must take "
            "3, red, green and blue, which images are decoded to here, gray ones too."
        )
    if config.problem_type == "regression":
        raise UserError(f"{path}: problem_type is regression, so that this is no classifier.")
    if config.problem_type == "multi_label_classification":
        warn(f"{path}: the model is multi-label. Build its archive with ACTIVATION=sigmoid")
    return config


def _processor(config: Any, path: Path) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            path, config=config, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its checks raise many kinds
        raise UserError(f"{path} cannot be used: {first_line(error)}.") from error


def _classifier(config: Any, weights: bytes, path: Path) -> nn.Module:
    """Return the model; reject weights that do not fit: transformers would draw random ones."""
    try:
        state_dict = safetensors.torch.load(weights)
    except Exception as error:  # its own errors, and torch's for unknown types
        raise UserError(
            f"{path} is no safetensors file, or is cut off: {first_line(error)}."
        ) from error
    known = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kinds = known if isinstance(known, tuple) else (known,)
    kind = next((k for k in kinds if k.__name__ in (config.architectures or ())), kinds[0])
    try:
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # raised below, with all others
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # for example sizes that no layer can have
        raise UserError(f"{path} cannot be loaded: {first_line(error)}.") from error
    reasons = {
        # Counters of training batches, which old files lack, do not count.
        "missing": sorted(k for k in found["missing_keys"] if not k.endswith("batches_tracked")),
        "not expected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "not finite": [k for k, v in model.state_dict().items() if not bool(v.isfinite().all())],
    }
    wrong = [f"{reason}: {listed(keys)}" for reason, keys in reasons.items() if keys]
    if wrong:
        raise UserError(
            f"{path} does not fit the {kind.__name__} of {CONFIG} ({'; '.join(wrong)}). "
            "Save both from the trained model: model.save_pretrained(folder)"
        )
    classifier: nn.Module = model.eval().requires_grad_(requires_grad=False)
    return classifier


def _labels(config: Any, path: str) -> Any:
    """Return the classes; None if there is one output, for two classes."""
    if config.num_labels == 1:
        return None
    if all(name == f"LABEL_{i}" for i, name in config.id2label.items()):
        warn(f"{path} names no classes, only LABEL_0 and so on. CLASSES=file names them")
    return classes_from_json(config.id2label, path)
