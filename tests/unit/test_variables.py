"""Each variable of `make` is an option of its command, and the documents use no others."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import typer

from batch.command import main as classify_batch
from scripts.__main__ import COMMANDS, program

MAKEFILE = Path("Makefile").read_text()


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def options_of(command: str) -> set[str]:
    """Return the options of a command, as variables of make."""
    if command == "classify-batch":
        app = typer.Typer()
        app.command()(classify_batch)
        parsed: Any = typer.main.get_command(app)
    else:
        parsed = typer.main.get_command(program(command)).commands[command]  # type: ignore[attr-defined]
    names = [option for parameter in parsed.params for option in parameter.opts]
    return {name.removeprefix("--").replace("-", "_").upper() for name in names}


def test_every_command_of_the_program_is_a_command_of_make() -> None:
    called = re.findall(
        r"^([a-z-]+): setup ## [^\n]*\n\t@\$\(SCRIPTS\) (\S+) ", MAKEFILE, re.MULTILINE
    )
    assert dict(called) == {name: name for name in COMMANDS}


def test_a_misspelled_variable_is_an_error_and_those_of_another_python_do_not_matter() -> None:
    foreign = {"PYTHONHOME": "/nowhere", "PYTHONPATH": "tests", "PYTHONPLATLIBDIR": "no"}
    done = make("scale", "WORKER=2", PYTHONSAFEPATH="1", **foreign)
    assert done.returncode == 2
    assert "No such option: --worker" in done.stderr
    assert "--workers" in done.stderr


def test_only_the_command_line_counts_and_its_quotes_and_spaces_survive() -> None:
    """A shell or a Windows next to it sets NAME and HOST, a hosting platform PORT."""
    weights = """it's "my" $(file); echo.pth"""
    arguments = (f"WEIGHTS={weights}", "GRPC=on", "PYTHON=true", "VENV_PYTHON=printf '%s\\n'")
    done = make("run", *arguments, NAME="machine", PORT="80")
    given = {line for line in done.stdout.splitlines() if line.startswith("--")}
    assert given == {f"--weights={weights}", "--grpc"}
    index = 'http://me:it\'s"secret" @127.0.0.1/cpu'
    done = make("setup", f"TORCH_INDEX={index}", "PYTHON=printenv TORCH_INDEX; :")
    assert done.stdout == f"{index}\n"


def test_every_variable_that_a_document_sets_is_one_of_its_command() -> None:
    """A line of a shell, or a command within a sentence."""
    written = re.compile(r"\bmake ([a-z-]+)((?: +[A-Z_]+=(?:\"[^\"]*\"|[^\s`]+))+)")
    documents = [*Path().glob("*.md"), *Path("docs").rglob("*.md"), *Path("deploy").rglob("*.*")]
    found = [
        (document, command, name)
        for document in documents
        if document.suffix in {".md", ".yaml"}
        for command, variables in written.findall(document.read_text())
        for name in re.findall(r"([A-Z_]+)=", re.sub(r"\"[^\"]*\"", "", variables))
    ]
    assert len(found) > 30
    # WORKRES is shown with the error that it gets.
    everywhere = {"PYTHON", "TORCH_INDEX", "WORKRES", "TEST_OPTIONS"}
    options = {command: options_of(command) for _, command, _ in found if command in COMMANDS}
    options["classify-batch"] = options_of("classify-batch")
    for document, command, name in found:
        allowed = options.get(command, set()) | everywhere
        assert name in allowed, f"{document}: make {command} {name}"


def test_help_lists_every_command_on_one_screen_and_its_options() -> None:
    done = make()
    assert done.stderr == ""
    for command in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split():
        assert f"\n  {command} " in f"\n{done.stdout}"
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    shown = make("help-run", COLUMNS="160").stdout
    for name in options_of("run"):
        assert f"--{name.lower().replace('_', '-')}" in shown, name
