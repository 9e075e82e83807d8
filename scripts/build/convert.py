"""Convert an ONNX model to the form that the engine takes, and compare the two on photographs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.status import Status

from handler.inference.activation import sigmoid, softmax
from handler.inference.explain import CLASSIFIER
from handler.settings import ModelCard, Preprocessing
from scripts.build import onnx_graph
from scripts.build.differences import MAX_DIFFERENCE, check_difference, scaled_difference
from scripts.build.onnx_graph import Head, Output
from scripts.build.onnx_model import Model
from scripts.build.onnx_trial import Outputs, TrialError, run_in_subprocess
from scripts.samples import sample_batch
from scripts.terminal import UserError, console, step, warn

# Of the sample photographs, every third: one view of each.
_EVERY = 3

_EPSILON = 1e-6

# A softmax classifier whose top-1 prediction is one class for all photographs, with more than this
# probability, most likely gets another preprocessing than in training. With few classes, that can
# be right.
_SATURATED = 0.999
_FEW_CLASSES = 10


@dataclass(frozen=True)
class Converted:
    """A model in the form that the engine takes.

    Attributes:
        file: ONNX, from `images`, uint8 (N, 3, crop, crop), to `logits`, float32 (N, classes).
        channels: of the output `embedding`; 0 if the model has none.
    """

    file: Path
    channels: int = 0

    @property
    def classifier(self) -> Path:
        """Return the file of the last layer's weights, float32 (classes, channels), that class
        activation maps are made with; it exists if the model has some.
        """
        return self.file.with_name(CLASSIFIER)


def convert(
    model: Model, card: ModelCard, target: Path, *, allow_saturated: bool = False
) -> Converted:
    """Write the model with normalization inside and the handler's names of inputs and outputs.

    `allow_saturated` is that of `scripts.build.model_file.ModelFile`.
    """
    preprocessing = card.preprocessing
    images = sample_batch(preprocessing, _EVERY)
    with Status("Trying the model on photographs ...", console=console):
        model, batch, given = _find_layout(model, preprocessing, images, target)
        found = onnx_graph.find_logits(model, given, card.classes, multilabel=card.multilabel)
        expected = given[found.name].astype(np.float64).reshape(len(images), -1)
        # Each try leaves out one more output: features, then the embedding.
        for head in _heads(onnx_graph.find_head(model, found)):
            _save(onnx_graph.rewrite(model, preprocessing, found, head, batch), target)
            try:
                got = _run(target, images, batch)
            except TrialError as error:
                if head is None:
                    raise UserError(str(error)) from error
                continue
            if head is None or _is_right(head, found, got):
                break
    converted = Converted(target, 0 if head is None else head.weights.shape[1])
    if head is not None and head.features:
        np.save(converted.classifier, _rows(head, found), allow_pickle=False)
    _compare(model, found, got["logits"], expected)
    _check_answers(model.file, got["logits"], multilabel=card.multilabel, allowed=allow_saturated)
    notes = [
        f"normalization is inside, {model.input.layouts[0]}",
        f"batches of {'any size' if batch is None else batch}",
        *([f"without its {found.activation.lower()}"] if found.activation else []),
        *(["with the logarithm of its probabilities"] if found.probabilities else []),
        "heat maps" if head is not None and head.features else "no heat maps",
        f"embeddings of {converted.channels} channels" if converted.channels else "no embeddings",
    ]
    step(f"Model: {', '.join(notes)}")
    if batch is not None:
        warn(
            "The model takes one image at a time, so requests are never batched. Export it with a "
            'free batch axis: dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    return converted


def _find_layout(
    model: Model, preprocessing: Preprocessing, images: NDArray[np.uint8], target: Path
) -> tuple[Model, int | None, Outputs]:
    """Return the model with the one layout that it runs with, the batch size (None for any), and
    its outputs.
    """
    reasons = []
    file = target.with_name("tried.onnx")
    for layout in model.input.layouts:
        one = dataclasses.replace(model.input, layouts=(layout,))
        candidate = dataclasses.replace(model, input=one)
        inputs = one.prepare(images, preprocessing)
        singles = [inputs[i : i + 1] for i in range(len(images))]
        # Batches of any size; if that fails, of exactly one image.
        for batch, batches in ((None, [*singles, inputs]), (1, singles)):
            _save(onnx_graph.with_batch(candidate, batch), file)
            try:
                found = run_in_subprocess(file, batches)
            except TrialError as error:
                reasons.append(str(error).replace(file.name, model.file))
                continue
            finally:
                file.unlink()
            alone = _concatenate(found[: len(singles)])
            if batch or _agree(alone, found[-1]):
                return candidate, batch, alone
    raise UserError(reasons[0] if reasons else f"{model.file} cannot be run.")


def _concatenate(outputs: Sequence[Outputs]) -> Outputs:
    return {
        name: np.concatenate([found[name] for found in outputs])
        for name in outputs[0]
        if outputs[0][name].ndim > 0
    }


def _agree(alone: Outputs, batched: Outputs) -> bool:
    return all(
        alone[name].shape == batched[name].shape
        and scaled_difference(alone[name], batched[name]) < MAX_DIFFERENCE
        for name in alone
        if np.issubdtype(alone[name].dtype, np.floating)
    )


def _save(proto: onnx.ModelProto, target: Path) -> None:
    target.write_bytes(proto.SerializeToString(deterministic=True))


def _run(file: Path, images: NDArray[np.uint8], batch: int | None) -> Outputs:
    size = batch or len(images)
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    return _concatenate(run_in_subprocess(file, batches))


def _heads(last: Head | None) -> list[Head | None]:
    """Return candidates, best first: with features in either layout, without features, none."""
    if last is None:
        return [None]
    bare = dataclasses.replace(last, features="")
    with_features = [last, dataclasses.replace(last, channels_last=True)] if last.features else []
    return [*with_features, bare, None]


def _rows(head: Head, found: Output) -> NDArray[np.float32]:
    """Return weights (classes, channels); a single output gets a row of zeros before its own."""
    zeros = [np.zeros_like(head.weights)] if found.single else []
    return np.concatenate([*zeros, head.weights])


def _is_right(head: Head, found: Output, got: Outputs) -> bool:
    """Return whether the logits are that linear function of the features or the embedding."""
    pooled = got["embedding"]
    if pooled.shape[1:] != head.weights.shape[1:]:
        return False
    if head.features:
        features = got["features"]
        if features.ndim != 4 or features.shape[1] != pooled.shape[1]:
            return False
        if features.shape[2] * features.shape[3] < 2:
            return False
        pooled = features.mean((2, 3), dtype=np.float64)
    bias = np.concatenate([[0], head.bias]) if found.single else head.bias
    logits = pooled @ _rows(head, found).T + bias
    shift = 0 if not found.probabilities else (logits - got["logits"]).mean(1, keepdims=True)
    return scaled_difference(logits - shift, got["logits"]) < MAX_DIFFERENCE


def _compare(
    model: Model, found: Output, logits: NDArray[Any], expected: NDArray[np.float64]
) -> None:
    """Compare the converted model with the file's; raise `UserError` if they differ."""
    if not np.isfinite(expected).all() or not np.isfinite(logits).all():
        raise UserError(f"{model.file} gives values for photographs that are not finite.")
    answers, kind = logits, "logits"
    if found.activation or found.probabilities:
        is_sigmoid = found.activation == "Sigmoid" and not found.single
        answers, kind = sigmoid(logits) if is_sigmoid else softmax(logits), "probabilities"
    if found.single:
        answers = answers[:, 1:]
    difference = scaled_difference(answers, expected)
    # Half precision rounds differently in a batch of another size, and rounds probabilities too.
    allowed = 20 * MAX_DIFFERENCE if model.half else MAX_DIFFERENCE
    check_difference(difference, model.file, len(expected), allowed, kind=kind)


def _check_answers(
    file: str, logits: NDArray[np.float32], *, multilabel: bool, allowed: bool
) -> None:
    """Reject answers that suggest another preprocessing than in training."""
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
        raise UserError(f"{message} If so, set allow_saturated: true in a model file.")
    warn(message)
