"""`make classify`: the client's command, for the server that runs here."""

from typing import Annotated

import typer

from classification_client import RequestOptions
from classification_client.command import (
    FormatOption,
    KeyOption,
    OutputOption,
    ThresholdOption,
    TopkOption,
    classify,
)
from scripts.serve.running import require_running
from scripts.sources import sources
from scripts.terminal import command

ImageOption = Annotated[
    str | None, typer.Option(help="A file or folder; or names and patterns, as in a shell.")
]


def main(
    image: ImageOption = None,
    images: ImageOption = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    format: FormatOption = None,  # as the option is called
    output: OutputOption = None,
    topk: TopkOption = None,
    threshold: ThresholdOption = None,
    key: KeyOption = None,
) -> int:
    """Classify images with the server that runs here."""
    running = require_running()
    url = (running.serving(model) if model else running).predictions_url
    options = RequestOptions(topk=topk, threshold=threshold, key=key)
    return classify(sources(image, images), url, options, format_=format, output=output)


if __name__ == "__main__":
    command(main)
