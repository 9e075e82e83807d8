"""How commands read make's variables, and what a person sees when one cannot go on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from classification_client.terminal import spelt
from scripts import terminal
from scripts.classify import main as classify
from scripts.serve import commands as serve
from scripts.sources import sources
from scripts.terminal import UserError


@pytest.fixture(autouse=True)
def _own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder, Ctrl-C and make's variables that are the test's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("TO", "IMAGE", "IMAGES"):
        monkeypatch.delenv(f"GIVEN_{name}", raising=False)
    monkeypatch.setattr(sys, "argv", ["command"])
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> NoReturn:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("the disk is full"), 1, "Error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C. Run the same command again to go on.\n"),
    ],
)
def test_a_command_ends_with_a_sentence(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        terminal.command(raising(error))
    assert ended.value.code == status
    assert capsys.readouterr().err.strip() == message.strip()


def test_an_unexpected_error_is_a_sentence_with_its_details_in_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"):
            terminal.command(raising(KeyError("x")))
        (said,) = capsys.readouterr().err.splitlines()
        assert "(KeyError: 'x'). The details, to report it with, are in .run/logs" in said
    details = Path(".run/logs/errors.log").read_text()
    assert details.count("Traceback") == 2
    assert "in main" in details


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    program = (
        "from classification_client.terminal import program, run\n"
        "def main():\n    for i in range(100_000): print(i)\nrun(program(main))"
    )
    result = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$0" | head -1', program],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("0\n", "")
    assert not (tmp_path / ".run").exists()


@pytest.mark.parametrize(
    ("asked", "variables", "said"),
    [
        ("scale", {"WORKERS": "0"}, "WORKERS must be greater than or equal to 1, got '0'."),
        ("scale", {}, "WORKERS is missing, as in: make scale WORKERS=..."),
        ("start", {"PORT": "http"}, "PORT must be a valid integer, got 'http'."),
    ],
)
def test_usage_errors_under_make_name_its_variables(
    asked: str,
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["python", asked])
    for name, value in {"TO": f"make {asked}", **variables}.items():
        monkeypatch.setenv(f"GIVEN_{name}", value)
    with pytest.raises(SystemExit, match="2"):
        terminal.run(serve.app)
    assert capsys.readouterr().err == f"Error: {said}\n"


def test_without_make_usage_is_told_in_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "scale", "--workers", "0"])
    with pytest.raises(SystemExit, match="2"):
        terminal.run(serve.app)
    assert "--workers" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit, match="0"):
        terminal.command(classify)
    shown = capsys.readouterr().out
    assert "CLASSIFY_KEY" in shown
    assert "GIVEN" not in shown


@pytest.mark.parametrize("variable", ["IMAGE", "IMAGES"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("my cat.jpg", ["my cat.jpg"]),
        ("it's.jpg", ["it's.jpg"]),
        ('a "b" $(c).jpg', ['a "b" $(c).jpg']),
        ("my folder", ["my folder"]),
        ("my folder/*.jpg", ["my folder/*.jpg"]),
        ("x.jpg y.jpg", ["x.jpg", "y.jpg"]),
        ("'my cat.jpg' *.jpg", ["my cat.jpg", "*.jpg"]),
        (r"my\ cat.jpg x.jpg", ["my cat.jpg", "x.jpg"]),
        ('"it\'s.jpg" x.jpg', ["it's.jpg", "x.jpg"]),
        ("~/images x.jpg", [os.path.expanduser("~/images"), "x.jpg"]),  # noqa: PTH111
        ("-", ["-"]),
        ("missing.jpg", ["missing.jpg"]),
        ("  ", []),
    ],
)
def test_a_value_is_one_existing_name_or_else_a_list_as_in_a_shell(
    variable: str, value: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my folder").mkdir()
    for name in ("my cat.jpg", "it's.jpg", 'a "b" $(c).jpg', "x.jpg", "my folder/z.jpg"):
        Path(name).touch()
    monkeypatch.setenv(f"GIVEN_{variable}", value)
    assert sources("IMAGE", "IMAGES") == expected


def test_a_quote_without_an_end_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN_IMAGES", "it's.jpg x.jpg")
    with pytest.raises(UserError, match=r"IMAGES=it's\.jpg x\.jpg: .* a quote without an end"):
        sources("IMAGES")


def test_options_are_spelt_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [spelt("topk", 3), spelt("output")] == ["--topk 3", "--output"]
    monkeypatch.setenv("GIVEN_TO", "make classify")
    assert [spelt("topk", 3), spelt("output")] == ["TOPK=3", "OUTPUT"]
