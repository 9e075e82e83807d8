"""`make evaluate`: evaluate a served model on images whose classes are known."""

from pathlib import Path
from typing import Annotated

import typer

from classification_client import RequestOptions, check_address
from classification_client.command import AT_ONCE, KeyOption
from scripts.classify import select
from scripts.groups import require
from scripts.labels_file import NAME as LABELS_FILE
from scripts.serve.running import RUN_DIR, require_running
from scripts.sources import sources
from scripts.terminal import UserError, command

OUTPUT = RUN_DIR / "evaluation"


def main(
    images: Annotated[
        str | None, typer.Option(help="A folder with a folder of images per class.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="URL to which images are sent.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of this server's models.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = OUTPUT,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = AT_ONCE,
    key: KeyOption = None,
    labels: Annotated[
        Path | None, typer.Option(help="List of each image's labels, for multi-label models.")
    ] = None,
    min_precision: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of each label, for the thresholds.")
    ] = None,
) -> None:
    """Evaluate a served model on images whose classes are known."""
    named = sources(images)
    if len(named) != 1:
        raise UserError("Name one folder, with a folder of images for each class: --images folder.")
    options, folder, address = RequestOptions(key=key), Path(named[0]), _predictions_url(url, model)
    if labels is None and (folder / LABELS_FILE).is_file():
        labels = folder / LABELS_FILE
    require("evaluation", why="the report is made with scikit-learn and matplotlib")
    if labels is not None:
        from scripts.evaluation.multilabel import evaluate_labels, report_labels

        multilabel = evaluate_labels(folder, labels, address, options, at_once)
        report_labels(multilabel, output, min_precision)
        return
    if min_precision is not None:
        raise UserError("MIN_PRECISION is for multi-label models, and needs LABELS.")
    from scripts.evaluation.single_label import evaluate_folders, report_folders

    report_folders(evaluate_folders(folder, address, options, at_once), output)


def _predictions_url(url: str | None, model: str | None) -> str:
    """Return the given URL, by default the local server's."""
    if url is None:
        return select(require_running(), model).predictions_url
    try:
        return check_address(url)
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    command(main)
