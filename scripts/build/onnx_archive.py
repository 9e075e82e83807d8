"""`make archive MODEL_FILE=model.onnx`: packs an ONNX file from elsewhere.

What preprocessing training had is not in the file, so it must be said. Imports nothing of PyTorch.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.status import Status

from handler.errors import ArchiveError
from handler.labels import Label
from handler.multilabel import sigmoid
from handler.responses import softmax
from handler.settings import ModelCard, Preprocessing
from scripts.build import differences, onnx_model, onnx_trial
from scripts.build.activation import SOFTMAX, Activation
from scripts.build.class_names import IMAGENET_CLASSES, read_class_names
from scripts.build.differences import MAX_DIFFERENCE, scaled_difference
from scripts.build.lower_precision import LowerPrecision, make
from scripts.build.onnx_model import Head, Model, Output
from scripts.build.onnx_trial import Outputs, TrialError, outputs_of
from scripts.build.packing import (
    BUILD,
    NAME,
    Contents,
    Said,
    check_choices,
    files_that_matter,
    labels_of,
    numbers,
    pack,
    summary_of_classes,
    summary_of_preprocessing,
)
from scripts.samples import sample_batch
from scripts.store import MODEL_STORE, WEIGHTS_NOTICE, read_card, sha256
from scripts.terminal import UserError, console, step

# Of the sample photographs, every fourth.
_EVERY = 4

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Source:
    """What an archive is built of.

    Attributes:
        architecture: as the model card and errors call it.
        file: that the weights came from.
        sha256: of that file.
        model: reads or makes the model, once it is known to be needed.
        packages: that took part, with their versions.
        check: looks at the file that will be packed; raises `UserError`.
        notice: text that must accompany copies of the weights; empty if none must.
    """

    architecture: str
    file: str
    sha256: str
    model: Callable[[], Model]
    packages: Sequence[str] = ()
    check: Callable[[Path], None] | None = None
    notice: str = ""


def build(
    path: Path,
    said: Said,
    name: str | None = None,
    classes: Path | None = None,
    lower: LowerPrecision | None = None,
    model_store: Path = MODEL_STORE,
    labelling: Activation = SOFTMAX,
) -> Path:
    """Builds an archive of an ONNX file, unless the one in the model store is of the same inputs.

    Args:
        path: the model.
        said: its preprocessing.
        name: of the archive; None for the file's.
        classes: the list of classes; None for ImageNet's.
        lower: instead of float32; None for float32.
        model_store: the folder to put the archive into.
        labelling: how logits become probabilities, and from where on a class is a label.

    Raises:
        UserError: with what is wrong with the file, or what is missing.
    """
    name = path.stem if name is None else name
    if NAME.fullmatch(name) is None:
        raise UserError(f"{path.name} gives no name to an archive. Say one: NAME=pets")
    check_choices(name, "onnx", lower)
    model = onnx_model.read(path)
    preprocessing = _preprocessing(model, said)
    several = labelling.name != SOFTMAX.name
    labels = labels_of(_outputs(classes), path.name, classes, several=several)
    source = Source(path.name, path.name, sha256(path), lambda: model)
    return build_of(source, preprocessing, labels, name, lower, model_store, labelling)


def build_of(
    source: Source,
    preprocessing: Preprocessing,
    labels: Sequence[Label],
    name: str,
    lower: LowerPrecision | None = None,
    model_store: Path = MODEL_STORE,
    labelling: Activation = SOFTMAX,
) -> Path:
    """Builds an archive of a model in ONNX, unless the one in the model store is of the same.

    Args:
        source: the model.
        preprocessing: of its training.
        labels: a class for each position of the logits.
        name: of the archive.
        lower: as in `build`.
        model_store: as in `build`.
        labelling: as in `build`.

    Raises:
        UserError: as `build`.
    """
    thresholds = labelling.thresholds(labels)
    engine = f"OpenVINO (CPU, {lower.name})" if lower else "ONNX Runtime (CPU)"
    for line in (
        f"{source.architecture} on {engine}, from {source.file}",
        summary_of_preprocessing(preprocessing),
        summary_of_classes(labels, thresholds),
    ):
        step(f"Archive: {line}")
    archive = model_store / f"{name}.mar"
    said = (
        *(source.architecture, source.file, source.sha256, source.packages, source.notice),
        *(name, labels),
    )
    card = ModelCard(
        architecture=source.architecture,
        classes=len(labels),
        trained=True,
        weights_file=source.file,
        weights_sha256=source.sha256,
        inputs_sha256=_inputs_digest(
            said,
            dataclasses.asdict(preprocessing),
            lower and lower.digest(),
            (labelling.name, thresholds),
        ),
        preprocessing=preprocessing,
        precision=lower.name if lower else "float32",
        activation=labelling.name,
        thresholds=thresholds,
    )
    packed = read_card(archive)
    if packed is not None and packed.inputs_sha256 == card.inputs_sha256:
        step(f"Archive: {archive} is up to date")
        return archive
    model_store.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    model = source.model()
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        model_file, classifier, channels = convert(
            model, preprocessing, len(labels), Path(folder), several=card.multilabel
        )
        if source.check is not None:
            source.check(model_file)
        features = "features" if classifier is not None else ""
        card = dataclasses.replace(card, features=features, embedding=channels)
        extra = Path(folder, "extra")
        extra.mkdir()
        if lower is not None:
            make(lower, model_file, card, labels, extra)
        if source.notice:
            (extra / WEIGHTS_NOTICE).write_text(source.notice, "utf-8")
        others = sorted(extra.iterdir())
        with Status("Packing the archive ...", console=console):
            pack(Contents(card, name, labels, model_file, classifier, others), archive)
    step(f"Archive: wrote {archive}, {archive.stat().st_size / 1e6:.1f} MB")
    return archive


def _outputs(classes: Path | None) -> int:
    """As many as are named: that the model has as many is seen where it runs."""
    return len(read_class_names(classes)) if classes is not None else IMAGENET_CLASSES


def _inputs_digest(*said: Any) -> str:
    """Changes whenever the archive would."""
    packages = [f"{package}=={version(package)}" for package in ("onnx", "onnxruntime")]
    digest = hashlib.sha256(json.dumps([said, packages]).encode())
    modules = (onnx_model, onnx_trial, differences)
    for path in (*files_that_matter(), Path(__file__), *(Path(str(m.__file__)) for m in modules)):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _preprocessing(model: Model, said: Said) -> Preprocessing:
    """What is said, with the size that the model takes."""
    side, inside = model.input.side, model.input.dtype == "uint8"
    resize = said.resize or ((said.crop or side) if said.fit in {"squash", "pad"} else None)
    missing = [
        variable
        for variable, value in (
            ("RESIZE", resize),
            ("CROP", said.crop or side),
            ("MEAN", said.mean or inside),
            ("STD", said.std or inside),
        )
        if not value
    ]
    if missing:
        raise UserError(
            f"{model.file} does not say what training did to a picture. Say it: "
            f"{' '.join(f'{variable}=...' for variable in missing)} (RESIZE and CROP in pixels, "
            "MEAN and STD on the scale 0 to 1, as in MEAN=0.485,0.456,0.406 "
            "STD=0.229,0.224,0.225)."
        )
    if said.crop and side and said.crop != side:
        raise UserError(
            f"{model.file} takes pictures of {side} x {side} pixels, and no others: CROP={side}"
        )
    if inside and (said.mean or said.std):
        raise UserError(
            f"{model.file} takes pictures in whole numbers from 0 to 255, so that it normalises "
            "them itself. Leave MEAN and STD out."
        )
    values = {
        "resize": resize,
        "crop": said.crop or side,
        "mean": (0.0,) * 3 if inside else numbers("MEAN", said.mean),
        "std": (1.0,) * 3 if inside else numbers("STD", said.std),
        "interpolation": said.interpolation or "bilinear",
        "fit": said.fit or "crop",
    }
    try:
        return Preprocessing(**values)  # type: ignore[arg-type]
    except ArchiveError as error:
        raise UserError(f"The preprocessing of {model.file} cannot be used: {error}.") from error


def convert(
    model: Model,
    preprocessing: Preprocessing,
    classes: int,
    folder: Path,
    *,
    several: bool = False,
) -> tuple[Path, NDArray[np.float32] | None, int]:
    """Makes the model what the handler's engine takes, and compares that with the file.

    Args:
        model: as read.
        preprocessing: of its training.
        classes: how many are named.
        folder: where to put it.
        several: whether a picture can have several labels.

    Returns:
        the model's file; float32 (classes, channels), what maps are made with, None where it has no
        maps; and the number of channels of its embeddings, 0 where it has none.

    Raises:
        UserError: it cannot be run, or what it gives cannot be used.
    """
    images = sample_batch(preprocessing, _EVERY)
    with Status("Trying the model on photographs ...", console=console):
        model, batch, given = _tried(model, preprocessing, images, folder)
    found = onnx_model.output(model, given, classes, several=several)
    expected = given[found.name].astype(np.float64).reshape(len(images), -1)
    last = onnx_model.head(model, found)
    target = folder / "model.onnx"
    classifier, channels = None, 0
    # Each try leaves something out that this model does not have.
    for head in _heads(last):
        _save(onnx_model.rewritten(model, preprocessing, found, head, batch), target)
        try:
            got = _run(target, images, batch)
        except TrialError as error:
            if head is None:
                raise UserError(str(error)) from error
            continue
        if head is None or _is_right(head, found, got):
            classifier = None if head is None or not head.features else _rows(head, found)
            channels = 0 if head is None else head.weights.shape[1]
            break
    _compare(model, found, got, expected)
    notes = [
        f"normalisation is inside, {model.input.layouts[0]}",
        f"batches of {'any size' if batch is None else batch}",
        *([f"without its {found.activation.lower()}"] if found.activation else []),
        *(["of its probabilities the logarithm"] if found.probabilities else []),
        "maps" if classifier is not None else "no maps",
        f"embeddings of {channels} channels" if channels else "no embeddings",
    ]
    step(f"Model: {', '.join(notes)}")
    return target, classifier, channels


def _tried(
    model: Model, preprocessing: Preprocessing, images: NDArray[np.uint8], folder: Path
) -> tuple[Model, int | None, Outputs]:
    """Finds the layout and the batch with which it runs.

    Returns:
        the model with one layout, the pictures in a run (None for any number), and its outputs.
    """
    reasons = []
    file = folder / "tried.onnx"
    for layout in model.input.layouts:
        one = dataclasses.replace(model.input, layouts=(layout,))
        candidate = dataclasses.replace(model, input=one)
        inputs = one.of(images, preprocessing)
        singles = [inputs[i : i + 1] for i in range(len(images))]
        # For any number of pictures, and else for exactly one.
        for batch in (None, 1):
            _save(onnx_model.with_free_batch(candidate, batch), file)
            together = [inputs] if batch is None else []
            try:
                found = outputs_of(file, [*singles, *together])
            except TrialError as error:
                reasons.append(str(error).replace(file.name, model.file))
                continue
            alone = _joined(found[: len(singles)])
            if not together or _same(alone, found[-1]):
                return candidate, batch, alone
    raise UserError(reasons[0] if reasons else f"{model.file} cannot be run.")


def _joined(outputs: Sequence[Outputs]) -> Outputs:
    return {
        name: np.concatenate([found[name] for found in outputs])
        for name in outputs[0]
        if outputs[0][name].ndim > 0
    }


def _same(alone: Outputs, together: Outputs) -> bool:
    return all(
        alone[name].shape == together[name].shape
        and scaled_difference(alone[name], together[name]) < MAX_DIFFERENCE
        for name in alone
        if np.issubdtype(alone[name].dtype, np.floating)
    )


def _save(proto: onnx.ModelProto, target: Path) -> None:
    target.write_bytes(proto.SerializeToString(deterministic=True))


def _run(file: Path, images: NDArray[np.uint8], batch: int | None) -> Outputs:
    step_ = len(images) if batch is None else batch
    return _joined(outputs_of(file, [images[i : i + step_] for i in range(0, len(images), step_)]))


def _heads(last: Head | None) -> list[Head | None]:
    """From a head with maps to none."""
    if last is None:
        return [None]
    bare = dataclasses.replace(last, features="")
    return [last, bare, None] if last.features else [bare, None]


def _rows(head: Head, found: Output) -> NDArray[np.float32]:
    """Weights (classes, channels)."""
    if not found.single:
        return head.weights
    return np.concatenate([np.zeros_like(head.weights), head.weights])


def _is_right(head: Head, found: Output, got: Outputs) -> bool:
    """Whether the logits are that linear function of what is given out."""
    pooled = got["embedding"]
    if pooled.ndim != 2 or pooled.shape[1] != head.weights.shape[1]:  # noqa: PLR2004
        return False
    if head.features:
        features = got["features"]
        if features.ndim != 4 or features.shape[2] * features.shape[3] < 2:  # noqa: PLR2004
            return False
        if features.shape[1] != pooled.shape[1]:
            return False
        pooled = features.mean((2, 3), dtype=np.float64)
    bias = np.concatenate([[0], head.bias]) if found.single else head.bias
    logits = pooled @ _rows(head, found).T + bias
    shift = 0 if not found.probabilities else (logits - got["logits"]).mean(1, keepdims=True)
    return scaled_difference(logits - shift, got["logits"]) < MAX_DIFFERENCE


def _compare(model: Model, found: Output, got: Outputs, expected: NDArray[np.float64]) -> None:
    """What is packed with what the file gives; raises `UserError` where they differ."""
    logits = got["logits"]
    if not np.isfinite(expected).all() or not np.isfinite(logits).all():
        raise UserError(f"{model.file} gives values for photographs that are not finite.")
    answers: NDArray[Any] = logits
    if found.activation or found.probabilities:
        several = found.activation == "Sigmoid" and not found.single
        answers = sigmoid(logits) if several else softmax(logits)
    if found.single:
        answers = answers[:, 1:]
    difference = scaled_difference(answers, expected)
    of = "probabilities" if found.activation or found.probabilities else "logits"
    step(
        f"Model: largest difference to the file over {len(expected)} images: "
        f"{difference:.1e} in {of}"
    )
    # Half precision rounds anew where a batch is another, and rounds probabilities too.
    allowed = 20 * MAX_DIFFERENCE if model.half else MAX_DIFFERENCE
    if not difference <= allowed:
        raise UserError(
            f"What would be packed differs from {model.file} by {difference:.1e} in {of}. Nothing "
            "was packed."
        )
    # Of logits, since probabilities near 0 or 1 may all be the same to six digits.
    if scaled_difference(logits, logits[:1]) < _EPSILON:
        raise UserError(
            f"{model.file} gives the same for all photographs. Is it the right file, and are MEAN "
            "and STD those of its training?"
        )
