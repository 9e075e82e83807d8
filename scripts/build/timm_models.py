"""`ARCH=timm/...`: builds archives of timm's models.

timm makes the model and says its preprocessing; what is packed is ONNX, so that a worker needs
nothing of it. Weights come from a file, or from the Hugging Face hub at a pinned revision.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.status import Status
from torch import Tensor, nn

from handler.settings import Preprocessing
from scripts.build import export, hub, onnx_model
from scripts.build.activation import SOFTMAX, Activation
from scripts.build.architectures import TIMM
from scripts.build.lower_precision import LowerPrecision
from scripts.build.onnx_archive import Source, build_of
from scripts.build.packing import BUILD, Said, check_choices, customized, labels_of
from scripts.build.weight_files import read_state_dict
from scripts.build.weights import check_finite, first_mismatches
from scripts.samples import sample_batch
from scripts.store import MODEL_STORE
from scripts.terminal import UserError, console, step

# What timm calls what is done to pictures that are no squares.
_FITS = {"center": "crop", "squash": "squash", "border": "pad"}

_EVERY = 4


@dataclass(frozen=True)
class TimmModel:
    """One of timm's models with weights.

    Attributes:
        name: timm's, as in "resnet50.a1_in1k".
        module: in evaluation mode.
        classes: how many it tells apart.
        file: that the weights came from.
        sha256: of that file.
        architecture: as ARCH has it.
        notice: text that must accompany copies of the weights; empty if none must.
    """

    name: str
    module: nn.Module
    classes: int
    file: str
    sha256: str
    architecture: str
    notice: str = ""


def obtain(architecture: str, path: Path | None, revision: str | None) -> TimmModel:
    """The model with the user's weights where `path` is given, else with those of the hub.

    Args:
        architecture: as in "timm/resnet50.a1_in1k".
        path: a file of weights, in any of the forms of `read_state_dict`.
        revision: a commit of the model's repository on the hub.

    Raises:
        UserError: with the reason and what to do.
    """
    name = architecture.removeprefix(TIMM)
    config = _config(_timm(), name)
    if path is None:
        repository = config.hf_hub_id
        if not repository:
            raise UserError(
                f"timm keeps no weights of {name} on the hub. Give a file: WEIGHTS=path"
            )
        wanted = hub.check_revision(revision, repository)
        path = hub.fetch(repository, wanted, Path(torch.hub.get_dir()) / "checkpoints")
    state_dict, sha256 = read_state_dict(path)
    return load(architecture, state_dict, path.name, sha256)


def load(architecture: str, state_dict: Mapping[str, Tensor], file: str, sha256: str) -> TimmModel:
    """Put weights into timm's model, with as many classes as they have.

    Args:
        architecture: as in "timm/resnet50.a1_in1k".
        state_dict: in timm's naming.
        file: that the weights came from.
        sha256: of that file.

    Raises:
        UserError: timm has no such model, or the weights do not fit it.
    """
    timm = _timm()
    name = architecture.removeprefix(TIMM)
    classifier = _config(timm, name).classifier
    layers = [classifier] if isinstance(classifier, str) else list(classifier or ())
    weight = state_dict.get(f"{layers[0]}.weight") if layers else None
    if weight is None or weight.dim() == 0:
        raise UserError(
            f"{file} does not fit {architecture}: it has no {layers[0] if layers else 'head'}"
            ".weight. A head of your own goes by ONNX: MODEL_FILE=model.onnx"
        )
    classes = int(weight.shape[0])
    module = timm.create_model(name, pretrained=False, num_classes=classes).eval()
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        raise UserError(
            f"{file} does not fit {architecture} with {classes} classes: {first_mismatches(error)}."
        ) from error
    check_finite(module, file)
    return TimmModel(name, module, classes, file, sha256, architecture)


def preprocessing_of(architecture: str, said: Said) -> Preprocessing:
    """What timm does to a picture before a model's weights see it, with what is said instead.

    Args:
        architecture: as in "timm/resnet50.a1_in1k".
        said: by a person.

    Raises:
        UserError: timm has no such model, or what it does cannot be done here: of some models it
            cuts a square that is larger than the resized picture.
    """
    timm = _timm()
    name = architecture.removeprefix(TIMM)
    config = timm.data.resolve_data_config({}, pretrained_cfg=_config(timm, name).to_dict())
    crop = config["input_size"][-1]
    official = {
        "resize": math.floor(crop / config["crop_pct"]),
        "crop": crop,
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "fit": _FITS.get(config["crop_mode"], config["crop_mode"]),
    }
    return customized(official, said)


def _timm() -> Any:
    try:
        import timm  # noqa: PLC0415  # only where asked for
        import timm.data  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            "ARCH=timm/... needs packages that are not here: make setup-timm"
        ) from error
    return timm


def _config(timm: Any, name: str) -> Any:
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None:
        known = [*timm.list_models(), *timm.list_pretrained()]
        alike = get_close_matches(name, known, n=8)
        raise UserError(
            f"timm has no model {name!r}."
            + (f" Alike are: {', '.join(TIMM + other for other in alike)}." if alike else "")
        )
    return config


def build(
    model: TimmModel,
    preprocessing: Preprocessing,
    name: str | None = None,
    classes: Path | None = None,
    lower: LowerPrecision | None = None,
    model_store: Path = MODEL_STORE,
    labelling: Activation = SOFTMAX,
) -> Path:
    """Builds an archive, unless the one in the model store is of the same.

    Args:
        model: with its weights.
        preprocessing: see `preprocessing_of`.
        name: of the archive; None for the architecture's, with - for what an address cannot have.
        classes: the list of classes; None for ImageNet's.
        lower: instead of float32; None for float32.
        model_store: the folder to put the archive into.
        labelling: how logits become probabilities, and from where on a class is a label.

    Raises:
        UserError: something does not fit, or torch cannot export the model.
    """
    name = model.architecture.removeprefix(TIMM).replace(".", "-") if name is None else name
    check_choices(name, "onnx", lower)
    several = labelling.name != SOFTMAX.name
    labels = labels_of(model.classes, model.file, classes, several=several)

    def made() -> onnx_model.Model:
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            target = Path(folder, f"{name}.onnx")
            with Status("Exporting the model to ONNX (about 10 seconds) ...", console=console):
                _export(model, preprocessing, target)
            return onnx_model.read(target)

    def check(packed: Path) -> None:
        subject = export.Exportable(model.module, preprocessing)
        images = sample_batch(preprocessing, _EVERY)
        if len(labels) == model.classes:
            export.check(subject, packed, images, lambda text: step(f"Model: {text}"))

    packages = [f"{package}=={version(package)}" for package in ("torch", "timm", "onnxscript")]
    source = Source(
        model.architecture, model.file, model.sha256, made, packages, check, model.notice
    )
    return build_of(source, preprocessing, labels, name, lower, model_store, labelling)


def _export(model: TimmModel, preprocessing: Preprocessing, target: Path) -> None:
    try:
        with torch.inference_mode():
            model.module(torch.zeros(1, 3, preprocessing.crop, preprocessing.crop))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{model.name} cannot take pictures of {preprocessing.crop} x {preprocessing.crop} "
            f"pixels: {str(error)[:200]}. Choose another CROP."
        ) from error
    export.export_plain(model.module, preprocessing.crop, target)
