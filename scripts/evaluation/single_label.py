"""Evaluate a single-label model: accuracy, confused classes, calibration, confidence thresholds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.calibration import CalibrationDisplay, calibration_curve
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    confusion_matrix,
    precision_recall_fscore_support,
)

from classification_client import RequestOptions
from classification_client.images import Found, search
from scripts.evaluation.evaluation import Evaluation, classify, describe
from scripts.evaluation.report import Cells, plot_label, write
from scripts.labels_file import NAME as LABELS_FILE
from scripts.matching import match
from scripts.terminal import UserError, warn

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_TOP = 5
_BINS = 10
_MAX_CONFUSED = 10
# With more classes, their names in the confusion matrix are illegible.
_MAX_NAMED_CLASSES = 50


@dataclass(frozen=True)
class SingleLabelEvaluation(Evaluation):
    """The answers of a single-label model.

    Attributes:
        truth: int (N,), the true classes.
        predictions: int (N, up to 5), the predicted classes, best first.
        confidence: float (N,), the probability of the top-1 prediction, 0 to 1.
    """

    truth: NDArray[np.int64]
    predictions: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def top1(self) -> NDArray[np.int64]:
        """Return int (N,), the top-1 predictions."""
        return self.predictions[:, 0]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Return bool (N,), whether the top-1 prediction is correct; its mean is the accuracy."""
        return np.equal(self.top1, self.truth)

    @property
    def top5_accuracy(self) -> float:
        """Return the top-5 accuracy, 0 to 1."""
        # top_k_accuracy_score would need the probabilities of all classes.
        return float((self.predictions == self.truth[:, None]).any(axis=1).mean())

    @property
    def calibration_error(self) -> float:
        """Return the expected calibration error: mean gap between confidence and accuracy per bin.

        Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
        """
        accuracy, confidence = calibration_curve(self.correct, self.confidence, n_bins=_BINS)
        # scikit-learn does not return the sizes of its bins.
        bins = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], self.confidence)
        sizes = np.unique(bins, return_counts=True)[1]
        return float(np.average(np.abs(accuracy - confidence), weights=sizes))


def evaluate_folders(
    images: Path, url: str, options: RequestOptions, at_once: int
) -> SingleLabelEvaluation:
    """Classify the images of a folder with one subfolder per class, named by class id or name.

    Raises `UserError` if a folder is not a class, there is no image, the model is multi-label, or
    the server is not available.
    """
    if not images.is_dir():
        raise UserError(f"{images} must be a folder with a folder of images for each class.")
    folders = sorted(path for path in images.iterdir() if path.is_dir() and path.name[0] != ".")
    found = Found()
    known = {path: folder.name for folder in folders for path in search(folder, found)}
    for folder, reason in found.closed.items():
        raise UserError(f"{folder} cannot be read: {reason}.")
    if found.left_out is not None:
        warn(found.left_out)
    if not known:
        raise UserError(f"{images} must hold a folder of images for each class.")
    model = describe(known, url, options)
    if model.multilabel:
        raise UserError(
            "The model is multi-label (activation: sigmoid), and an image in a folder "
            f"has one label only. Write a list with an image and its labels per line, {images}/"
            f"{LABELS_FILE}, or name it: LABELS=file."
        )
    names = set(known.values())
    truth = match(names, model.labels, "as a folder is called", "Call the folder by id")
    answers, rejected = classify(known, url, replace(options, topk=_TOP), at_once)
    return SingleLabelEvaluation(
        model,
        list(answers),
        rejected,
        np.array([truth[known[image]] for image in answers]),
        np.array([[row.class_index for row in of.predictions] for of in answers.values()]),
        np.array([of.probability for of in answers.values()]),
    )


def report_folders(evaluation: SingleLabelEvaluation, folder: Path) -> None:
    """Write the report into the folder and print its tables."""
    # A class that is neither true nor predicted for any image has no scores.
    present = np.union1d(evaluation.truth, evaluation.top1).tolist()
    write(
        evaluation,
        folder,
        metrics={
            "top-1 accuracy": f"{evaluation.correct.mean():.2%}",
            "top-5 accuracy": f"{evaluation.top5_accuracy:.2%}",
            "expected calibration error": f"{evaluation.calibration_error:.3f}",
        },
        tables={
            "Confidence thresholds": _by_threshold(evaluation),
            "Most confused classes": _most_confused(evaluation),
        },
        classes=_by_class(evaluation, present),
        mistakes=_mistakes(evaluation),
        plots={
            "confusion.png": _plot_confusion(evaluation, present),
            "calibration.png": _plot_calibration(evaluation),
        },
    )


def _by_threshold(evaluation: SingleLabelEvaluation) -> list[Cells]:
    """Return the share of images that reach each threshold, and the accuracy on these."""
    rows: list[Cells] = []
    for threshold in THRESHOLDS:
        reached = evaluation.confidence >= threshold
        accuracy = f"{evaluation.correct[reached].mean():.1%}" if reached.any() else "-"
        cells = {"recognized": f"{reached.mean():.1%}", "of these correct": accuracy}
        rows.append({"confidence threshold": f"{threshold:.2f}", **cells})
    return rows


def _most_confused(evaluation: SingleLabelEvaluation) -> list[Cells]:
    names, wrong = evaluation.names, ~evaluation.correct
    pairs = Counter(zip(evaluation.truth[wrong], evaluation.top1[wrong], strict=True))
    return [
        {"true class": names[truth], "predicted class": names[predicted], "images": count}
        for (truth, predicted), count in pairs.most_common(_MAX_CONFUSED)
    ]


def _mistakes(evaluation: SingleLabelEvaluation) -> list[Cells]:
    """Return the images whose top-1 prediction is wrong, the most confident first."""
    names = evaluation.names
    wrong = np.flatnonzero(~evaluation.correct).tolist()
    return [
        {
            "image": str(evaluation.images[row]),
            "true class": names[evaluation.truth[row]],
            "predicted class": names[evaluation.top1[row]],
            "probability": float(evaluation.confidence[row]),
        }
        for row in sorted(wrong, key=lambda row: -evaluation.confidence[row])
    ]


def _by_class(evaluation: SingleLabelEvaluation, present: Sequence[int]) -> dict[int, Cells]:
    scores = precision_recall_fscore_support(
        evaluation.truth, evaluation.top1, labels=present, zero_division=0
    )
    return {
        index: {"images": support, "precision": precision, "recall": recall, "f1": f1}
        for index, precision, recall, f1, support in zip(present, *scores, strict=True)
    }


def _plot_confusion(evaluation: SingleLabelEvaluation, present: Sequence[int]) -> Figure:
    """Plot the confusion matrix: colors show shares of a class, cells show numbers of images."""
    size = min(16, 4 + 0.25 * len(present))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay.from_predictions(
        evaluation.truth,
        evaluation.top1,
        labels=present,
        display_labels=[plot_label(evaluation.names[index]) for index in present],
        normalize="true",
        xticks_rotation="vertical",
        cmap="Blues",
        im_kw={"vmin": 0, "vmax": 1},
        include_values=len(present) <= _MAX_NAMED_CLASSES,
        ax=axes,
    )
    if display.text_ is not None:
        counts = confusion_matrix(evaluation.truth, evaluation.top1, labels=present)
        for text, count in zip(display.text_.flat, counts.flat, strict=True):
            text.set_text(str(count or ""))
    else:
        axes.set(xticks=[], yticks=[])
    axes.set(xlabel="predicted class", ylabel="true class")
    display.im_.colorbar.set_label("share of the images of a class")
    return figure


def _plot_calibration(evaluation: SingleLabelEvaluation) -> Figure:
    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    CalibrationDisplay.from_predictions(
        evaluation.correct, evaluation.confidence, n_bins=_BINS, name="this model", ax=above
    )
    above.set(xlabel="", ylabel="accuracy", ylim=(0, 1.02))
    below.hist(evaluation.confidence, bins=_BINS, range=(0, 1))
    below.set(xlabel="confidence: probability of the top-1 prediction", ylabel="images")
    return figure
