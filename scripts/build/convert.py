"""Turns an ONNX model into what the handler's engine takes, and compares the two on photographs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.status import Status

from handler.multilabel import sigmoid
from handler.responses import softmax
from handler.settings import ModelCard, Preprocessing
from scripts.build import onnx_model
from scripts.build.differences import MAX_DIFFERENCE, scaled_difference
from scripts.build.onnx_model import Head, Model, Output
from scripts.build.onnx_trial import Outputs, TrialError, outputs_of
from scripts.samples import sample_batch
from scripts.terminal import UserError, console, step, warn

# Of the sample photographs, every third: one view of each.
_EVERY = 3

_EPSILON = 1e-6

# A softmax classifier that is so certain of one class for all photographs has most likely got
# another preprocessing than in training. One of few classes may be right.
_SATURATED = 0.999
_FEW_CLASSES = 10


@dataclass(frozen=True)
class Converted:
    """What the engine takes.

    Attributes:
        file: ONNX, from `images`, uint8 (N, 3, crop, crop), to `logits`, float32 (N, classes).
        classifier: float32 (classes, channels), the last layer's weights that class activation maps
            are made with; None if the model has none.
        channels: of the output `embedding`; 0 if the model has none.
    """

    file: Path
    classifier: NDArray[np.float32] | None
    channels: int


def convert(
    model: Model, card: ModelCard, target: Path, *, allow_saturated: bool = False
) -> Converted:
    """Write the model with normalization inside and the handler's names of inputs and outputs.

    Args:
        model: as read.
        card: of the archive: the preprocessing, the number of classes and the activation count.
        target: the file to write.
        allow_saturated: see `scripts.build.model_file.ModelFile`.

    Raises:
        UserError: the model cannot be run, or its output cannot be used.
    """
    preprocessing = card.preprocessing
    images = sample_batch(preprocessing, _EVERY)
    with Status("Trying the model on photographs ...", console=console):
        model, batch, given = _tried(model, preprocessing, images, target)
        found = onnx_model.output(model, given, card.classes, several=card.multilabel)
        expected = given[found.name].astype(np.float64).reshape(len(images), -1)
        classifier, channels = None, 0
        # Each try leaves out something that this model lacks: features, then the embedding.
        for head in _heads(onnx_model.head(model, found)):
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
    _compare(model, found, got["logits"], expected)
    _check_answers(model.file, got["logits"], multilabel=card.multilabel, allowed=allow_saturated)
    notes = [
        f"normalization is inside, {model.input.layouts[0]}",
        f"batches of {'any size' if batch is None else batch}",
        *([f"without its {found.activation.lower()}"] if found.activation else []),
        *(["of its probabilities the logarithm"] if found.probabilities else []),
        "heat maps" if classifier is not None else "no heat maps",
        f"embeddings of {channels} channels" if channels else "no embeddings",
    ]
    step(f"Model: {', '.join(notes)}")
    if batch is not None:
        warn(
            "The model takes one image at a time, so requests are never batched. Export it with a "
            'free batch axis: dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    return Converted(target, classifier, channels)


def _tried(
    model: Model, preprocessing: Preprocessing, images: NDArray[np.uint8], target: Path
) -> tuple[Model, int | None, Outputs]:
    """Find the layout and the batch with which the model runs.

    Returns:
        the model with one layout, the images in a run (None for any number), and its outputs.
    """
    reasons = []
    file = target.with_name("tried.onnx")
    for layout in model.input.layouts:
        one = dataclasses.replace(model.input, layouts=(layout,))
        candidate = dataclasses.replace(model, input=one)
        inputs = one.of(images, preprocessing)
        singles = [inputs[i : i + 1] for i in range(len(images))]
        # For any number of images, and else for exactly one.
        for batch in (None, 1):
            _save(onnx_model.with_free_batch(candidate, batch), file)
            whole = [inputs] if batch is None else []
            try:
                found = outputs_of(file, [*singles, *whole])
            except TrialError as error:
                reasons.append(str(error).replace(file.name, model.file))
                continue
            finally:
                file.unlink()
            alone = _joined(found[: len(singles)])
            if not whole or _same(alone, found[-1]):
                return candidate, batch, alone
    raise UserError(reasons[0] if reasons else f"{model.file} cannot be run.")


def _joined(outputs: Sequence[Outputs]) -> Outputs:
    return {
        name: np.concatenate([found[name] for found in outputs])
        for name in outputs[0]
        if outputs[0][name].ndim > 0
    }


def _same(alone: Outputs, batched: Outputs) -> bool:
    return all(
        alone[name].shape == batched[name].shape
        and scaled_difference(alone[name], batched[name]) < MAX_DIFFERENCE
        for name in alone
        if np.issubdtype(alone[name].dtype, np.floating)
    )


def _save(proto: onnx.ModelProto, target: Path) -> None:
    target.write_bytes(proto.SerializeToString(deterministic=True))


def _run(file: Path, images: NDArray[np.uint8], batch: int | None) -> Outputs:
    size = len(images) if batch is None else batch
    return _joined(outputs_of(file, [images[i : i + size] for i in range(0, len(images), size)]))


def _heads(last: Head | None) -> list[Head | None]:
    """Return the last layer with features, channels first or last, then without, and none."""
    if last is None:
        return [None]
    bare = dataclasses.replace(last, features="")
    with_features = [last, dataclasses.replace(last, channels_last=True)] if last.features else []
    return [*with_features, bare, None]


def _rows(head: Head, found: Output) -> NDArray[np.float32]:
    """Return weights (classes, channels)."""
    if not found.single:
        return head.weights
    return np.concatenate([np.zeros_like(head.weights), head.weights])


def _is_right(head: Head, found: Output, got: Outputs) -> bool:
    """Return whether the logits are that linear function of the features or the embedding."""
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


def _compare(
    model: Model, found: Output, logits: NDArray[Any], expected: NDArray[np.float64]
) -> None:
    """Compare what is packed with what the file gives; raise `UserError` if they differ."""
    if not np.isfinite(expected).all() or not np.isfinite(logits).all():
        raise UserError(f"{model.file} gives values for photographs that are not finite.")
    answers = logits
    if found.activation or found.probabilities:
        is_sigmoid = found.activation == "Sigmoid" and not found.single
        answers = sigmoid(logits) if is_sigmoid else softmax(logits)
    if found.single:
        answers = answers[:, 1:]
    difference = scaled_difference(answers, expected)
    kind = "probabilities" if found.activation or found.probabilities else "logits"
    step(
        f"Model: largest difference to {model.file} over {len(expected)} images: {difference:.1e} "
        f"in {kind}; preprocessing is not part of this comparison"
    )
    # Half precision rounds differently in a batch of another size, and rounds probabilities too.
    allowed = 20 * MAX_DIFFERENCE if model.half else MAX_DIFFERENCE
    if not difference <= allowed:
        raise UserError(
            f"What would be packed differs from {model.file} by {difference:.1e} in {kind}. "
            "Nothing was packed."
        )


def _check_answers(
    file: str, logits: NDArray[np.float32], *, multilabel: bool, allowed: bool
) -> None:
    """Reject answers that show another preprocessing than in training."""
    advice = "Is it the right file, and is its preprocessing (mean, std, range, channels) right?"
    # Of logits, since probabilities near 0 or 1 may all be the same to six digits.
    if scaled_difference(logits, logits[:1]) < _EPSILON:
        raise UserError(f"{file} gives the same for all photographs. {advice}")
    if multilabel:
        return
    probabilities = softmax(logits)
    if len(set(probabilities.argmax(1))) > 1 or probabilities.max(1).min() < _SATURATED:
        return
    message = (
        f"{file} answers all {len(logits)} sample photographs with class "
        f"{int(probabilities[0].argmax())} and a probability above {_SATURATED}. {advice}"
    )
    if logits.shape[1] >= _FEW_CLASSES and not allowed:
        raise UserError(f"{message} If so, say allow_saturated: true in a model file.")
    warn(message)
