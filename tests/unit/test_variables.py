"""`make` itself: its variables, and what it says there is."""

import os
import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from classification_client import terminal

MAKEFILE = Path("Makefile").read_text()
COMMANDS = re.findall(
    r"^([a-z-]+):[^\n]*##[^\n]*\n\t@\$\(VENV_PYTHON\) -m (scripts\.[\w.]+)(?: (\S+))?$",
    MAKEFILE,
    re.MULTILINE,
)


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],  # noqa: S607
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def variables_of(command: str) -> list[str]:
    return make("--eval", f"print: ; @echo $(variables-{command})", "print").stdout.split()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "WORKER=2"], "WORKER is no variable of make run. Did you mean WORKERS?"),
        (["run", "workers=2"], "workers is no variable of make run. Did you mean WORKERS?"),
        (["start", "ARCH=resnet50"], "ARCH is no variable of make start, but of: make archive, "),
        (["stop", "FOO=it's"], "FOO is no variable of make stop. It has none."),
        (["FOO=1"], "FOO is no variable of make help."),
        (["clean", "FOO=1"], "FOO is no variable of make clean."),
    ],
)
def test_what_is_no_variable_of_a_command_is_rejected(command: list[str], said: str) -> None:
    done = make(*command)
    assert said in done.stderr
    assert done.returncode == 2
    assert "==>" not in done.stdout, "nothing was begun"


def test_several_commands_share_their_variables() -> None:
    assert make("-n", "archive", "start", "ARCH=resnet50", "MODELS=a").returncode == 0


def test_every_variable_of_a_command_is_an_option_of_its_program() -> None:
    assert len(COMMANDS) > 12
    for command, module, part in COMMANDS:
        program = import_module(module)
        parsed: Any = (
            typer.main.get_command(program.app).commands[part]  # type: ignore[attr-defined]
            if part
            else terminal.program(program.main)
        )
        options = {option.name.rstrip("_").upper() for option in parsed.params if option.name}
        # What pictures are meant is read by `scripts.sources`, which has tests of its own.
        assert set(variables_of(command)) - {"IMAGE", "IMAGES"} <= options, command


def test_every_variable_that_a_document_sets_is_one_of_its_command() -> None:
    """A line of a shell, or a command within a sentence."""
    written = re.compile(r"\bmake ([a-z-]+)((?: +[A-Z_]+=(?:\"[^\"]*\"|[^\s`]+))+)")
    documents = [*Path().glob("*.md"), *Path("docs").glob("*.md"), *Path("deploy").rglob("*.*")]
    found = [
        (document, command, name)
        for document in documents
        if document.suffix in {".md", ".yaml"}
        for command, variables in written.findall(document.read_text())
        for name in re.findall(r"([A-Z_]+)=", re.sub(r"\"[^\"]*\"", "", variables))
    ]
    assert len(found) > 30
    # WORKRES is shown with the error that it gets.
    everywhere = {"PYTHON", "TORCH_INDEX", "WORKRES"}
    for document, command, name in found:
        assert name in {*variables_of(command), *everywhere}, f"{document}: make {command} {name}"


def test_only_the_command_line_counts_and_its_quotes_and_spaces_survive() -> None:
    """A shell or a Windows beside it sets NAME and HOST, a hosting platform PORT."""
    weights = """it's "my" $(file); echo.pth"""
    done = make("--eval", "print: ; @env", "print", f"WEIGHTS={weights}", NAME="machine", PORT="80")
    given = sorted(line for line in done.stdout.splitlines() if line.startswith("GIVEN_"))
    assert given == ["GIVEN_TO=make print", f"GIVEN_WEIGHTS={weights}"]


def test_help_names_every_command_and_variable_on_two_screens() -> None:
    done = make()
    assert done.stderr == ""
    for command in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split():
        assert f"\n  {command} " in done.stdout or command in {"help", "variables"}
    for command, _, _ in COMMANDS:
        for variable in variables_of(command):
            assert re.search(rf"\b{variable}\b", done.stdout), variable
    lines = done.stdout.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100
    groups = ("Serve", "Classify", "Own models", "Production", "Tests", "Benchmarks", "Maintenance")
    assert [line for line in lines if line in groups] == list(groups)
