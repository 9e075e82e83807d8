"""Parse the command line of `make classify-batch` and `python -m batch`; Ray is not imported."""

from pathlib import Path
from typing import Annotated

import typer

from scripts.sources import sources
from scripts.terminal import UserError

_ARCHIVE = Path("model_store", "densenet121.mar")


def main(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="A folder, a list of addresses (.txt), a Parquet file or a folder of such; on "
            "this machine, or s3://..., gs://..."
        ),
    ] = None,
    images: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    output: Annotated[
        str, typer.Option(help="A folder for the results; the same folder resumes a job.")
    ] = "",
    archive: Annotated[Path, typer.Option(help="The .mar.")] = _ARCHIVE,
    column: Annotated[
        str | None, typer.Option(help="Of Parquet: with addresses, or with images' bytes.")
    ] = None,
    topk: Annotated[int | None, typer.Option(min=1, help="Predictions per image.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Confidence threshold.")
    ] = None,
    embedding: Annotated[bool, typer.Option(help="Write embeddings too.")] = False,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Processes with the model; by default one per CPU.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster's head; by default only this machine is used.")
    ] = None,
) -> int:
    """Classify any number of images on all cores of this machine, or on a Ray cluster."""
    named = paths or sources(images)
    if len(named) != 1:
        raise UserError("Name one folder, list or Parquet file: IMAGES=images.")
    if not output:
        raise UserError("Name a folder for the results: OUTPUT=results.")
    from batch.classify import classify  # imports Ray

    choices = {"topk": topk, "threshold": threshold, "embedding": embedding}
    classify(named[0], output, archive, column, choices, actors, address)
    return 0
