"""The tables of docs/reference/configuration.md, from the options and settings of the code.

`python -m tests.docs.configuration` writes the page, which a test compares.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from batch.command import main as classify_batch
from handler.settings import Settings
from scripts import __main__ as cli

PAGE = Path("docs/reference/configuration.md")
# The text above it is written by hand.
MARKER = "<!-- Below: python -m tests.docs.configuration -->\n"


def generated() -> str:
    """Return the text below the marker."""
    commands: dict[tuple[str, str, str], list[str]] = {}
    for command, program in _commands():
        for row in _options(program):
            commands.setdefault(row, []).append(command)
    variables = [
        f"| `{name}` | {', '.join(commands[row])} | {default} | {text} |\n"
        for row in sorted(commands)
        for name, default, text in [row]
    ]
    settings = [f"| `{name}` | {default} | {text} |\n" for name, default, text in _settings()]
    return (
        "\n## `handler`\n\nIn `handler/model-config.yaml`, packed into the model archive. A"
        " misspelled key or a value out of range stops the start with a message that names it.\n\n"
        "| key | default | meaning |\n|---|---|---|\n" + "".join(settings) + "\n"
        "## Variables of the commands\n\n`make COMMAND NAME=value` is `python -m scripts COMMAND"
        " --name=value`, and `NAME=on` is `--name`. A misspelled variable is an error. `make"
        " help-COMMAND` lists the variables of one command.\n\n"
        "| variable | commands | default | meaning |\n|---|---|---|---|\n" + "".join(variables)
    ).replace("|  |", "| |")


def _commands() -> Iterator[tuple[str, Any]]:
    for name in cli.COMMANDS:
        group: Any = typer.main.get_command(cli.program(name))
        yield name, group.commands[name]
    batch = typer.Typer(add_completion=False)
    batch.command()(classify_batch)
    yield "classify-batch", typer.main.get_command(batch)


def _options(command: Any) -> Iterator[tuple[str, str, str]]:
    for option in command.params:
        if not option.opts[0].startswith("--"):
            continue
        name = option.opts[0].removeprefix("--").replace("-", "_").upper()
        default = "required" if option.required else _shown(option.default)
        limits = f" {option.min} to {option.max}." if option.max is not None else ""
        yield name, default, (option.help or "") + limits


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default in {None, ""} else f"`{default}`"


def _settings() -> Iterator[tuple[str, str, str]]:
    documented = inspect.getdoc(Settings) or ""
    texts = dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", documented, re.MULTILINE))
    for field in dataclasses.fields(Settings):
        low_high = field.metadata.get("bounds")
        limits = f" {low_high[0]:,} to {low_high[1]:,}." if low_high else ""
        text = " ".join(texts[field.name].split())
        default = str(field.default).lower()
        yield field.name, f"`{default}`", text[0].upper() + text[1:] + limits


def main() -> None:
    """Write the page."""
    written = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    PAGE.write_text(written + MARKER + generated(), encoding="utf-8")


if __name__ == "__main__":
    main()
