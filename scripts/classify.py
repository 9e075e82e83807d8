"""Asks a running server what a picture shows, and prints the best labels."""

from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from rich.table import Table

from scripts.server import require_running
from scripts.terminal import UserError, command, console, warn

# Seconds; longer than a full queue takes.
TIMEOUT = 60.0


def classify(picture: Path, url: str) -> dict[str, Any]:
    """Sends one picture as the body of a request, as `curl -T` does.

    Returns:
        the server's result, see the README.

    Raises:
        UserError: the picture cannot be read, or the server cannot be reached or refuses it.
    """
    try:
        content = picture.read_bytes()
    except OSError as error:
        raise UserError(f"{picture} cannot be read: {error.strerror}.") from error
    try:
        answer = requests.post(
            url,
            data=content,
            headers={"Content-Type": "application/octet-stream"},
            timeout=TIMEOUT,
        )
    except requests.RequestException as error:
        raise UserError(f"The server at {url} does not answer: {error}") from error
    body: dict[str, Any] = answer.json()
    if not answer.ok:
        raise UserError(f"The server answered {answer.status_code}: {body.get('message')}")
    return body


def show(picture: Path, result: dict[str, Any]) -> None:
    """Prints a result as a table, best label first."""
    title = str(picture) if result["recognized"] else f"{picture}: nothing recognised"
    table = Table(title=title)
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("class id")
    for row in result["predictions"]:
        table.add_row(row["label"], f"{row['probability']:.4f}", row["class_id"])
    console.print(table)
    if "warning" in result:
        warn(result["warning"])


def main(
    picture: Annotated[Path, typer.Argument(help="An image file.")],
    url: Annotated[str | None, typer.Option(help="Where to send it.")] = None,
) -> None:
    """Classifies one picture with the running server."""
    show(picture, classify(picture, url or require_running().predictions_url))


if __name__ == "__main__":
    command(main)
