"""`make classify`: run the client's command with the local server."""

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
from classification_client.terminal import errors
from scripts.serve.running import ServerState, require_running
from scripts.sources import sources
from scripts.terminal import command

ImageOption = Annotated[
    str | None, typer.Option(help="A file or folder; or names and patterns, as in a shell.")
]


def main(
    image: ImageOption = None,
    images: ImageOption = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    format: FormatOption = None,  # named like the option
    output: OutputOption = None,
    topk: TopkOption = None,
    threshold: ThresholdOption = None,
    key: KeyOption = None,
) -> int:
    """Classify images with the server that runs here."""
    url = select(require_running(), model).predictions_url
    options = RequestOptions(topk=topk, threshold=threshold, key=key)
    return classify(sources(image, images), url, options, format_=format, output=output)


def select(running: ServerState, model: str | None) -> ServerState:
    """Return the server with `model` as the default; if None, print which of several it is.

    Raises `UserError` if the server does not serve the model.
    """
    if model is None and len(running.models) > 1:
        others = ", ".join(name for name in running.models if name != running.model)
        errors.print(f"Model: {running.model}. MODEL=name chooses another one: {others}.")
    return running.serving(model or running.model)


if __name__ == "__main__":
    command(main)
