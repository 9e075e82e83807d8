"""Evaluate a multi-label model, and choose its confidence thresholds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy  # loads scipy.stats lazily
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import (
    PrecisionRecallDisplay,
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)

from classification_client import RequestOptions
from scripts.build.thresholds import EVEN
from scripts.evaluation.evaluation import ALL_CLASSES, Evaluation, classify, describe
from scripts.evaluation.report import MAX_SHOWN_CLASSES, Cells, plot_label, write
from scripts.labels_file import FORM, read_labels
from scripts.matching import match
from scripts.terminal import UserError, step, warn

# The server's probabilities have seven digits; a threshold is between two of them.
_THRESHOLD_DIGITS = 9


@dataclass(frozen=True)
class MultilabelEvaluation(Evaluation):
    """The answers of a multi-label model.

    Attributes:
        truth: bool (N, classes), the true labels.
        probabilities: float (N, classes), the predicted probabilities, 0 to 1.
        given: bool (N, classes), the predicted labels, by the model's thresholds.
    """

    truth: NDArray[np.bool_]
    probabilities: NDArray[np.float64]
    given: NDArray[np.bool_]

    @property
    def shown(self) -> list[int]:
        """Return the classes with at least one image: only these are measured."""
        return [int(index) for index in np.flatnonzero(self.truth.any(axis=0))]

    @property
    def average_precision(self) -> list[float]:
        """Return the average precision of each shown class, 0 to 1."""
        return [
            float(average_precision_score(self.truth[:, index], self.probabilities[:, index]))
            for index in self.shown
        ]

    @property
    def auroc(self) -> list[float]:
        """Return the area under the ROC curve of each shown class; NaN if all images have it."""
        return [
            float("nan")
            if self.truth[:, index].all()
            else float(roc_auc_score(self.truth[:, index], self.probabilities[:, index]))
            for index in self.shown
        ]

    @property
    def mean_average_precision(self) -> float:
        """Return the mean over the shown classes, 0 to 1."""
        return float(np.mean(self.average_precision))


def scores(
    truth: NDArray[np.bool_], given: NDArray[np.bool_], suffix: str = ""
) -> dict[str, float]:
    """Return "precision", "recall" and "f1" of labels, 0 to 1; 0 if a metric is undefined.

    Both arrays have the same shape: the labels of one class or of all classes (micro average).
    """
    found = precision_recall_fscore_support(
        truth.ravel(), given.ravel(), average="binary", zero_division=0
    )
    names = ("precision", "recall", "f1")
    return {name + suffix: float(value) for name, value in zip(names, found[:3], strict=True)}


def evaluate_labels(
    images: Path, labels_file: Path, url: str, options: RequestOptions, at_once: int
) -> MultilabelEvaluation:
    """Classify the images of a list, see `scripts.labels_file`.

    Raises `UserError` if the list cannot be used, the model is single-label, or the server is not
    available.
    """
    known = read_labels(labels_file, images)
    names = {name for of_image in known.values() for name in of_image}
    if not names:
        raise UserError(
            f"{labels_file} gives no image a label, so that nothing can be measured. {FORM}"
        )
    model = describe(known, url, options)
    if not model.multilabel:
        raise UserError(
            f"The model is single-label (softmax), and {labels_file} is for models of "
            "activation: sigmoid. Put the images into a folder for each class instead."
        )
    meant = match(names, model.labels, f"as {labels_file} has it", "Call it by id")
    answers, rejected = classify(known, url, replace(options, topk=ALL_CLASSES), at_once)
    shape = len(answers), len(model.labels)
    truth, given, probabilities = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape)
    for row, (image, answer) in enumerate(answers.items()):
        truth[row, [meant[name] for name in known[image]]] = True
        given[row, [label.class_index for label in answer.labels or ()]] = True
        for prediction in answer.predictions:
            probabilities[row, prediction.class_index] = prediction.probability
    if not truth.any():
        raise UserError("None of the images that the server classified has a label.")
    return MultilabelEvaluation(model, list(answers), rejected, truth, probabilities, given)


def choose_thresholds(
    evaluation: MultilabelEvaluation, min_precision: float | None = None
) -> list[float]:
    """Return the best threshold of each class by position, 0 to 1; 0.5 if it has no images.

    Args:
        evaluation: results on images that the model was not trained on.
        min_precision: 0 to 1; choose the threshold with the best recall at this precision. None
            chooses the best F1.
    """
    chosen = [EVEN] * len(evaluation.model.labels)
    for index in evaluation.shown:
        precision, recall, candidates = precision_recall_curve(
            evaluation.truth[:, index], evaluation.probabilities[:, index]
        )
        # The last point of the curve has no threshold.
        precision, recall = precision[:-1], recall[:-1]
        if min_precision is None:
            best = int(scipy.stats.hmean([precision, recall]).argmax())
        elif (precision >= min_precision).any():
            best = int((precision >= min_precision).argmax())
        else:
            best = int(precision.argmax())
            warn(f"{evaluation.names[index]} reaches a precision of {precision[best]:.1%} at most.")
        # Halfway between two probabilities: rounding then changes no label.
        below = candidates[best - 1] if best else 0.0
        chosen[index] = round(float(candidates[best] + below) / 2, _THRESHOLD_DIGITS)
    return chosen


def report_labels(
    evaluation: MultilabelEvaluation, folder: Path, min_precision: float | None = None
) -> None:
    """Write the report and `thresholds.json` into the folder, and print the tables."""
    labels, shown, truth = evaluation.model.labels, evaluation.shown, evaluation.truth
    thresholds = choose_thresholds(evaluation, min_precision)
    by_thresholds = evaluation.probabilities >= np.array(thresholds)
    measured = [value for value in evaluation.auroc if not np.isnan(value)]
    unseen = len(labels) - len(shown)
    write(
        evaluation,
        folder,
        metrics={
            "classes": len(shown),
            "mean average precision": evaluation.mean_average_precision,
            "mean AUROC": float(np.mean(measured)) if measured else "nan",
        },
        tables={
            "Labels": [
                {"labels": "as served", **scores(truth, evaluation.given)},
                {"labels": "by thresholds.json", **scores(truth, by_thresholds)},
            ]
        },
        classes=_by_class(evaluation, thresholds),
        mistakes=_mistakes(evaluation),
        plots={"precision-recall.png": _plot(evaluation)},
        warning=f"{unseen} classes are on no image: their threshold is {EVEN}." if unseen else None,
    )
    file = folder / "thresholds.json"
    by_id = {label.class_id: value for label, value in zip(labels, thresholds, strict=True)}
    file.write_text(json.dumps(by_id, indent=2, ensure_ascii=False) + "\n", "utf-8")
    step(
        f"Thresholds: the model file packs them with thresholds: {file}. They suit these images "
        "best: measure on others"
    )


def _mistakes(evaluation: MultilabelEvaluation) -> list[Cells]:
    """Return the images with wrong labels as served, those with the most errors first."""

    def names(of_image: NDArray[np.bool_]) -> str:
        return ", ".join(np.array(evaluation.names)[of_image])

    wrong = evaluation.truth != evaluation.given
    rows = np.flatnonzero(wrong.any(axis=1)).tolist()
    return [
        {
            "image": str(evaluation.images[row]),
            "missing labels": names(evaluation.truth[row] & wrong[row]),
            "wrong labels": names(evaluation.given[row] & wrong[row]),
        }
        for row in sorted(rows, key=lambda row: -wrong[row].sum())
    ]


def _by_class(evaluation: MultilabelEvaluation, thresholds: Sequence[float]) -> dict[int, Cells]:
    measured = zip(evaluation.shown, evaluation.average_precision, evaluation.auroc, strict=True)
    return {
        index: {
            "images": int(evaluation.truth[:, index].sum()),
            "average_precision": average_precision,
            "auroc": auroc,
            **scores(evaluation.truth[:, index], evaluation.given[:, index]),
            "threshold": thresholds[index],
            **scores(
                evaluation.truth[:, index],
                evaluation.probabilities[:, index] >= thresholds[index],
                "_at_threshold",
            ),
        }
        for index, average_precision, auroc in measured
    }


def _plot(evaluation: MultilabelEvaluation) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index in evaluation.shown:
        # matplotlib omits names that begin with `_` from the legend.
        name = plot_label(evaluation.names[index]).lstrip("_")
        PrecisionRecallDisplay.from_predictions(
            evaluation.truth[:, index], evaluation.probabilities[:, index], name=name, ax=axes
        )
    axes.set(xlabel="recall", ylabel="precision")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    legend.set_visible(len(evaluation.shown) <= MAX_SHOWN_CLASSES)
    return figure
