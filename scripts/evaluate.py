"""How good a served model is on pictures whose classes are known, through the server itself."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from sklearn.calibration import calibration_curve
from sklearn.metrics import classification_report, confusion_matrix

from classification_client import Client, RequestOptions, Row, ServiceError, check_address
from classification_client.command import AT_ONCE, KeyOption
from classification_client.images import Found, search
from handler.labels import Label
from scripts.evaluation.asking import ALL, ask, classes, first_answer, warn_of_refused
from scripts.evaluation.multilabel import evaluate_labels, report_labels
from scripts.labels_file import NAME as LABELS_FILE
from scripts.matching import match
from scripts.serve.running import RUN_DIR, require_running
from scripts.sources import sources
from scripts.terminal import UserError, command, console, printable, step, warn

OUTPUT = RUN_DIR / "evaluation"
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_TOP = 5
_BINS = 10
# More classes than these cannot be read on the confusion picture's edges.
_LEGIBLE_CLASSES = 50
_WORST_PAIRS = 10


@dataclass(frozen=True)
class Evaluation:
    """What the server answered for pictures whose classes are known.

    Attributes:
        labels: the model's classes, by their position.
        truth: int (N,), the positions of the right classes.
        guesses: int (N, up to 5), the positions of the server's, best first.
        confidence: float (N,), the probability of the best one, 0 to 1.
        refused: pictures without an answer, which count nowhere.
        warning: what the server says of the model, if anything.
    """

    labels: Sequence[Label]
    truth: NDArray[np.int64]
    guesses: NDArray[np.int64]
    confidence: NDArray[np.float64]
    refused: Sequence[Row]
    warning: str | None

    @property
    def right(self) -> NDArray[np.bool_]:
        """Bool (N,): whether the best guess is the right one."""
        result: NDArray[np.bool_] = self.guesses[:, 0] == self.truth
        return result

    @property
    def top1(self) -> float:
        """Share of pictures, 0 to 1, whose best guess is right."""
        return float(self.right.mean())

    @property
    def top5(self) -> float:
        """Share of pictures, 0 to 1, with the right class among the five best."""
        return float((self.guesses == self.truth[:, None]).any(axis=1).mean())

    @property
    def calibration_error(self) -> float:
        """Mean gap between confidence and accuracy over ten bins (expected calibration error)."""
        bins = np.minimum((self.confidence * _BINS).astype(int), _BINS - 1)
        gaps = [
            abs(self.right[bins == b].mean() - self.confidence[bins == b].mean())
            * (bins == b).mean()
            for b in np.unique(bins)
        ]
        return float(sum(gaps))


def evaluate(
    images: Path, url: str, options: RequestOptions | None = None, at_once: int = AT_ONCE
) -> Evaluation:
    """Classifies all pictures of a folder with a folder a class.

    Args:
        images: its folders are called as the classes, by id or by name.
        url: where pictures go.
        options: how to ask; how many predictions is decided here.
        at_once: requests at a time.

    Raises:
        UserError: a folder is no class, there is no picture, or the server cannot be asked.
    """
    options = options or RequestOptions()
    if not images.is_dir():
        raise UserError(f"{images} must be a folder with a folder of pictures for each class.")
    folders = sorted(path for path in images.iterdir() if path.is_dir() and path.name[0] != ".")
    pictures = _search(folders)
    if not pictures:
        raise UserError(f"{images} must hold a folder of pictures for each class.")
    try:
        first = first_answer(list(pictures), Client(url, replace(options, topk=ALL)))
        if first.labels is not None:
            raise UserError(
                "The model gives several labels a picture (ACTIVATION=sigmoid), and folders cannot "
                f"say what each shows. Write a list with a picture and its labels a line, {images}/"
                f"{LABELS_FILE}, or name it: LABELS=file."
            )
        labels = classes(first)
        truth = match(
            set(pictures.values()), labels, "as a folder is called", "Call the folder by id"
        )
        client = Client(url, replace(options, topk=_TOP), at_once)
        found = ask(list(pictures), client, at_once)
    except ServiceError as error:
        raise UserError(str(error)) from error
    return Evaluation(
        labels,
        np.array([truth[pictures[picture]] for picture in found.pictures]),
        np.array([[p.class_index for p in answer.predictions] for answer in found.answers]),
        np.array([answer.probability for answer in found.answers]),
        found.refused,
        found.warning,
    )


def _search(folders: Sequence[Path]) -> dict[Path, str]:
    """The pictures with the name of the folder that each is in."""
    found = Found()
    pictures = {path: folder.name for folder in folders for path in search(folder, found)}
    for folder, why in found.closed.items():
        raise UserError(f"{folder} cannot be read: {why}.")
    if found.left_out is not None:
        warn(found.left_out)
    return pictures


def report(evaluation: Evaluation, folder: Path) -> None:
    """Writes the tables and plots, and prints what matters most."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [label.class_name for label in evaluation.labels]
    present = sorted(set(evaluation.truth) | set(evaluation.guesses[:, 0]))
    _write_classes(evaluation, present, names, folder / "classes.csv")
    thresholds = [_at_threshold(evaluation, threshold) for threshold in THRESHOLDS]
    _write_summary(evaluation, thresholds, names, folder / "report.md")
    table = Table(title="Which threshold?")
    for heading in ("threshold", "recognised", "of these right"):
        table.add_column(heading, justify="right")
    for threshold, recognized, right in thresholds:
        table.add_row(f"{threshold:.2f}", f"{recognized:.1%}", _percent(right))
    console.print(table)
    count = len(evaluation.truth)
    console.print(f"Top 1        {evaluation.top1:.2%} of {count} pictures")
    console.print(f"Top 5        {evaluation.top5:.2%}")
    console.print(f"Calibration  {evaluation.calibration_error:.3f} expected calibration error")
    warn_of_refused(evaluation.refused)
    if evaluation.warning:
        warn(evaluation.warning)
    _plot_confusion(evaluation, present, names, folder / "confusion.png")
    _plot_calibration(evaluation, folder / "calibration.png")
    step(f"Evaluation: wrote report.md, classes.csv, confusion.png, calibration.png to {folder}")


def _at_threshold(evaluation: Evaluation, threshold: float) -> tuple[float, float, float]:
    """The threshold, the share that reaches it, and how many of these are right, NaN for none."""
    recognized = evaluation.confidence >= threshold
    right = float(evaluation.right[recognized].mean()) if recognized.any() else float("nan")
    return threshold, float(recognized.mean()), right


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{share:.1%}"


def _write_classes(
    evaluation: Evaluation, present: Sequence[int], names: Sequence[str], path: Path
) -> None:
    found: dict[str, Any] = classification_report(
        evaluation.truth,
        evaluation.guesses[:, 0],
        labels=present,
        output_dict=True,
        zero_division=0,
    )
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ("class_index", "class_id", "class", "pictures", "precision", "recall", "f1")
        )
        for index in present:
            row = found[str(index)]
            values = [f"{row[key]:.4f}" for key in ("precision", "recall", "f1-score")]
            class_id = evaluation.labels[index].class_id
            table.writerow((index, class_id, names[index], int(row["support"]), *values))


def _write_summary(
    evaluation: Evaluation,
    thresholds: Sequence[tuple[float, float, float]],
    names: Sequence[str],
    path: Path,
) -> None:
    lines = ["# Evaluation", ""]
    if evaluation.warning:
        lines += [f"**{evaluation.warning}**", ""]
    lines += [
        "| pictures | not counted | top 1 | top 5 | expected calibration error |",
        "|---|---|---|---|---|",
        (
            f"| {len(evaluation.truth)} | {len(evaluation.refused)} | {evaluation.top1:.2%} "
            f"| {evaluation.top5:.2%} | {evaluation.calibration_error:.3f} |"
        ),
        "",
        "| threshold | recognised | of these right |",
        "|---|---|---|",
    ]
    lines += [f"| {t:.2f} | {share:.1%} | {_percent(right)} |" for t, share, right in thresholds]
    pairs: dict[tuple[int, int], int] = {}
    for truth, guess in zip(evaluation.truth, evaluation.guesses[:, 0], strict=True):
        if truth != guess:
            pairs[truth, guess] = pairs.get((truth, guess), 0) + 1
    worst = sorted(pairs.items(), key=lambda item: -item[1])[:_WORST_PAIRS]
    if worst:
        lines += ["", "| shows | is taken for | times |", "|---|---|---|"]
        cells = [printable(name).replace("|", r"\|") for name in names]
        lines += [f"| {cells[a]} | {cells[b]} | {count} |" for (a, b), count in worst]
    lines += ["", "![confusion](confusion.png)", "![calibration](calibration.png)"]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _plot_confusion(
    evaluation: Evaluation, present: Sequence[int], names: Sequence[str], path: Path
) -> None:
    counts = confusion_matrix(evaluation.truth, evaluation.guesses[:, 0], labels=present)
    size = min(16, 4 + 0.25 * len(present))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the pictures of a class")
    axes.set_xlabel("the server's best guess")
    axes.set_ylabel("what it shows")
    if len(present) <= _LEGIBLE_CLASSES:
        # A dollar would begin a formula.
        shown = [printable(names[index]).replace("$", r"\$") for index in present]
        axes.set_xticks(range(len(present)), shown, rotation=90)
        axes.set_yticks(range(len(present)), shown)
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"  # noqa: PLR2004
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    figure.savefig(path, dpi=100)


def _plot_calibration(evaluation: Evaluation, path: Path) -> None:
    accuracy, confidence = calibration_curve(
        evaluation.right, evaluation.confidence, n_bins=_BINS, strategy="uniform"
    )
    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), linestyle="--", color="grey", label="as sure as it is right")
    above.plot(confidence, accuracy, marker="o", label="this model")
    above.set_ylabel("share that is right")
    above.set_ylim(0, 1.02)
    above.legend()
    below.hist(evaluation.confidence, bins=_BINS, range=(0, 1))
    below.set_xlabel("probability of the best guess")
    below.set_ylabel("pictures")
    figure.savefig(path, dpi=100)


def main(
    images: Annotated[
        str | None, typer.Option(help="A folder with a folder of images per class.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Where to send them.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of this server's models.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = OUTPUT,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = AT_ONCE,
    key: KeyOption = None,
    labels: Annotated[
        Path | None, typer.Option(help="What each picture shows, where that is several labels.")
    ] = None,
    min_precision: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of each label, for the thresholds.")
    ] = None,
) -> None:
    """Evaluates a served model on pictures whose classes are known."""
    named = sources(images)
    if len(named) != 1:
        raise UserError("Name one folder, with a folder of images for each class: --images folder.")
    options, folder, address = RequestOptions(key=key), Path(named[0]), _where_to_send(url, model)
    if labels is None and (folder / LABELS_FILE).is_file():
        labels = folder / LABELS_FILE
    if labels is not None:
        several = evaluate_labels(folder, labels, address, options, at_once)
        report_labels(several, output, min_precision)
        return
    if min_precision is not None:
        raise UserError("MIN_PRECISION is for models that give several labels, and needs LABELS.")
    report(evaluate(folder, address, options, at_once), output)


def _where_to_send(url: str | None, model: str | None) -> str:
    """The address that was given, or that of the server which runs here."""
    if url is None:
        running = require_running()
        return (running.serving(model) if model else running).predictions_url
    try:
        return check_address(url)
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    command(main)
