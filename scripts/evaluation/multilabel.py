"""How good a served model is that gives several labels a picture, and which thresholds suit it."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from sklearn.metrics import precision_recall_curve, roc_auc_score

from classification_client import Client, RequestOptions, Row, ServiceError
from handler.labels import Label
from scripts.average_precision import average_precisions
from scripts.build.thresholds import EVEN
from scripts.evaluation.asking import ALL, ask, classes, first_answer, warn_of_refused
from scripts.labels_file import FORM, read_labels
from scripts.matching import match
from scripts.terminal import UserError, console, printable, step, warn

# More classes than these are in the files only.
_SHOWN_CLASSES = 20
# A threshold lies between two probabilities of seven digits.
_THRESHOLD_DIGITS = 9


@dataclass(frozen=True)
class Scores:
    """How good labels are, each 0 to 1; 0 where there is nothing to count."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @classmethod
    def of(cls, truth: NDArray[np.bool_], given: NDArray[np.bool_]) -> "Scores":
        """Of labels that were given; both of any one shape."""
        right = int((truth & given).sum())
        return cls(right / max(1, int(given.sum())), right / max(1, int(truth.sum())))


@dataclass(frozen=True)
class MultilabelEvaluation:
    """What the server answered for pictures whose labels are known.

    Attributes:
        labels: the model's classes, by their position.
        pictures: which were classified, in the order of the rows.
        truth: bool (N, classes), what each picture shows.
        probabilities: float (N, classes), the server's, 0 to 1.
        given: bool (N, classes), the labels that the server gave, by the archive's thresholds.
        refused: pictures without an answer, which count nowhere.
        warning: what the server says of the model, if anything.
    """

    labels: Sequence[Label]
    pictures: Sequence[Path]
    truth: NDArray[np.bool_]
    probabilities: NDArray[np.float64]
    given: NDArray[np.bool_]
    refused: Sequence[Row]
    warning: str | None

    @property
    def shown(self) -> list[int]:
        """The classes that some pictures show: only these have an average precision."""
        return [int(index) for index in np.flatnonzero(self.truth.any(axis=0))]

    @cached_property
    def average_precision(self) -> NDArray[np.float64]:
        """Float (classes,), 0 to 1; NaN where no picture shows the class."""
        return average_precisions(self.truth, self.probabilities)

    @cached_property
    def auroc(self) -> NDArray[np.float64]:
        """Float (classes,): the area under the ROC curve; NaN where all pictures are alike."""
        result = np.full(len(self.labels), np.nan)
        for index in self.shown:
            if not self.truth[:, index].all():
                result[index] = roc_auc_score(self.truth[:, index], self.probabilities[:, index])
        return result

    @property
    def mean_average_precision(self) -> float:
        """The mean over the classes that some pictures show, 0 to 1."""
        return float(np.nanmean(self.average_precision))

    @property
    def mean_auroc(self) -> float:
        """Likewise; NaN where no class has one."""
        return float(np.nanmean(self.auroc)) if np.isfinite(self.auroc).any() else float("nan")


def evaluate_labels(
    images: Path, labels_file: Path, url: str, options: RequestOptions, at_once: int
) -> MultilabelEvaluation:
    """Classifies the pictures of a list.

    Args:
        images: the folder of the pictures.
        labels_file: what each shows, see `labels_file`.
        url: where pictures go.
        options: how to ask; how many predictions is decided here.
        at_once: requests at a time.

    Raises:
        UserError: the list cannot be used, the server cannot be asked, or its model gives one label
            a picture.
    """
    said = read_labels(labels_file, images)
    names = {name for of_one in said.values() for name in of_one}
    if not names:
        raise UserError(
            f"{labels_file} gives no picture a label, so that nothing can be measured. {FORM}"
        )
    try:
        first = first_answer(list(said), Client(url, replace(options, topk=ALL)))
        if first.labels is None:
            raise UserError(
                f"The model gives one label a picture (softmax), and {labels_file} is for models "
                "of ACTIVATION=sigmoid. Put the pictures into a folder for each class instead."
            )
        labels = classes(first)
        meant = match(names, labels, f"as {labels_file} has it", "Call it by id")
        found = ask(list(said), Client(url, replace(options, topk=ALL), at_once), at_once)
    except ServiceError as error:
        raise UserError(str(error)) from error
    shape = len(found.pictures), len(labels)
    truth, given = np.zeros(shape, bool), np.zeros(shape, bool)
    probabilities = np.zeros(shape)
    for row, (picture, answer) in enumerate(zip(found.pictures, found.answers, strict=True)):
        truth[row, [meant[name] for name in said[picture]]] = True
        given[row, [label.class_index for label in answer.labels or ()]] = True
        for prediction in answer.predictions:
            probabilities[row, prediction.class_index] = prediction.probability
    if not truth.any():
        raise UserError("None of the pictures that the server classified has a label.")
    return MultilabelEvaluation(
        labels, found.pictures, truth, probabilities, given, found.refused, found.warning
    )


def choose_thresholds(
    evaluation: MultilabelEvaluation, min_precision: float | None = None
) -> list[float]:
    """For each class a threshold, 0 to 1, by what the pictures show.

    Args:
        evaluation: of pictures that the model was not trained on.
        min_precision: share of a class's labels that must be right, 0 to 1: then the threshold is
            the one with the best recall at that. None for the best F-score (F1).

    Returns:
        by position; one half for a class that no picture shows.
    """
    chosen = [EVEN] * len(evaluation.labels)
    for index in evaluation.shown:
        precision, recall, scores = precision_recall_curve(
            evaluation.truth[:, index], evaluation.probabilities[:, index]
        )
        # The last of both stands for no label at all and has no threshold.
        precision, recall = precision[:-1], recall[:-1]
        enough = np.flatnonzero(precision >= (min_precision or 0))
        if min_precision is None:
            best = int((precision * recall / np.maximum(precision + recall, 1e-12)).argmax())
        elif len(enough):
            best = int(enough[0])
        else:
            best = int(precision.argmax())
            name = evaluation.labels[index].class_name
            warn(f"{name} reaches a precision of {precision[best]:.1%} at most.")
        # In the middle of two probabilities: rounding then changes no label.
        below = scores[best - 1] if best else 0.0
        chosen[index] = round(float(scores[best] + below) / 2, _THRESHOLD_DIGITS)
    return chosen


def report_labels(
    evaluation: MultilabelEvaluation, folder: Path, min_precision: float | None = None
) -> None:
    """Writes the tables, the thresholds and the plot, and prints what matters most."""
    folder.mkdir(parents=True, exist_ok=True)
    thresholds = choose_thresholds(evaluation, min_precision)
    by_id = {
        label.class_id: threshold
        for label, threshold in zip(evaluation.labels, thresholds, strict=True)
    }
    thresholds_file = folder / "thresholds.json"
    thresholds_file.write_text(json.dumps(by_id, indent=2, ensure_ascii=False) + "\n", "utf-8")
    rows = [_class_row(evaluation, index, thresholds[index]) for index in evaluation.shown]
    with (folder / "classes.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    after = Scores.of(evaluation.truth, evaluation.probabilities >= np.array(thresholds))
    before = Scores.of(evaluation.truth, evaluation.given)
    (folder / "report.md").write_text(_as_markdown(evaluation, rows, before, after), "utf-8")
    _plot(evaluation, folder / "precision-recall.png")
    if len(rows) <= _SHOWN_CLASSES:
        _print_table(rows)
    count, of_all = len(evaluation.truth), len(evaluation.labels)
    console.print(
        f"Mean average precision  {evaluation.mean_average_precision:.4f} of {len(rows)} classes, "
        f"{count} pictures"
    )
    console.print(f"Mean AUROC              {evaluation.mean_auroc:.4f}")
    console.print(f"Labels as served        {_in_words(before)}")
    console.print(f"Labels by thresholds    {_in_words(after)}")
    warn_of_refused(evaluation.refused)
    if len(rows) < of_all:
        warn(f"{of_all - len(rows)} classes are on no picture: their threshold is {EVEN}.")
    if evaluation.warning:
        warn(evaluation.warning)
    step(
        "Evaluation: wrote report.md, classes.csv, thresholds.json, precision-recall.png to "
        f"{folder}"
    )
    step(
        f"Thresholds: the model file packs them with thresholds: {thresholds_file}. They suit "
        "these images best: measure on others"
    )


def _in_words(scores: Scores) -> str:
    return f"precision {scores.precision:.2%}, recall {scores.recall:.2%}, F1 {scores.f1:.4f}"


def _class_row(evaluation: MultilabelEvaluation, index: int, threshold: float) -> dict[str, str]:
    """A class's line of `classes.csv`."""
    truth, label = evaluation.truth[:, index], evaluation.labels[index]
    served = Scores.of(truth, evaluation.given[:, index])
    after = Scores.of(truth, evaluation.probabilities[:, index] >= threshold)
    return {
        "class_index": str(index),
        "class_id": label.class_id,
        "class": label.class_name,
        "pictures": str(int(truth.sum())),
        "average_precision": f"{evaluation.average_precision[index]:.4f}",
        "auroc": f"{evaluation.auroc[index]:.4f}",
        "precision": f"{served.precision:.4f}",
        "recall": f"{served.recall:.4f}",
        "f1": f"{served.f1:.4f}",
        "threshold": f"{threshold:.4f}",
        "precision_at_threshold": f"{after.precision:.4f}",
        "recall_at_threshold": f"{after.recall:.4f}",
        "f1_at_threshold": f"{after.f1:.4f}",
    }


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    table = Table("class", title="Each class")
    shown = ("pictures", "average_precision", "auroc", "f1", "threshold", "f1_at_threshold")
    for heading in shown:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(printable(row["class"]).replace("[", r"\["), *(row[name] for name in shown))
    console.print(table)


def _as_markdown(
    evaluation: MultilabelEvaluation,
    rows: Sequence[dict[str, str]],
    before: Scores,
    after: Scores,
) -> str:
    lines = ["# Evaluation", ""]
    if evaluation.warning:
        lines += [f"**{evaluation.warning}**", ""]
    lines += [
        "| pictures | not counted | mean average precision | mean AUROC |",
        "|---|---|---|---|",
        (
            f"| {len(evaluation.truth)} | {len(evaluation.refused)} "
            f"| {evaluation.mean_average_precision:.4f} | {evaluation.mean_auroc:.4f} |"
        ),
        "",
        "| labels | precision | recall | F1 |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {scores.precision:.2%} | {scores.recall:.2%} | {scores.f1:.4f} |"
        for name, scores in (("as served", before), ("by thresholds.json", after))
    ]
    shown = [name for name in rows[0] if name not in {"class_index", "class_id"}]
    lines += ["", f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
    cells = [{**row, "class": printable(row["class"]).replace("|", r"\|")} for row in rows]
    lines += [f"| {' | '.join(row[name] for name in shown)} |" for row in cells]
    return "\n".join([*lines, "", "![precision and recall](precision-recall.png)"]) + "\n"


def _plot(evaluation: MultilabelEvaluation, path: Path) -> None:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for index in evaluation.shown:
        precision, recall, _ = precision_recall_curve(
            evaluation.truth[:, index], evaluation.probabilities[:, index]
        )
        # A dollar would begin a formula; a name that begins with _ would be left out.
        name = printable(evaluation.labels[index].class_name).replace("$", r"\$").lstrip("_")
        axes.step(recall, precision, where="post", linewidth=1, label=name)
    axes.set_xlabel("recall: share of a class's pictures that are found")
    axes.set_ylabel("precision: share of its labels that are right")
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.02)
    if len(evaluation.shown) <= _SHOWN_CLASSES:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
