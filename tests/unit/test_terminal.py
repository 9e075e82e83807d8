"""What a person sees when a command cannot go on, and how images are named in one option."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import pytest
import typer

from scripts import terminal
from scripts.classify import main as classify
from scripts.sources import sources
from scripts.terminal import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and Ctrl-C that are the test's own."""
    monkeypatch.chdir(tmp_path)
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
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C. Run the same command again to resume.\n"),
    ],
)
def test_a_command_exits_with_a_sentence(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        terminal.command(raising(error))
    assert exited.value.code == status
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


def test_a_usage_error_names_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--topk", "0"])
    with pytest.raises(SystemExit, match="2"):
        terminal.command(classify)
    assert "--topk" in capsys.readouterr().err


def test_the_home_folder_is_expanded_in_every_option_and_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def main(
        names: Annotated[list[Path], typer.Argument()],
        weights: str = "",
        classes: Path = Path(),
        output: str | None = None,
        number: int = 1,
    ) -> None:
        given.append((names, weights, classes, output, number))

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DENSENET_OUTPUT", "~/results.csv")
    options = ["--weights=~/x.pth", "--classes", "~/c.txt", "~/a b.png", "~backup", "c~/d"]
    monkeypatch.setattr(sys, "argv", ["command", *options])
    with pytest.raises(SystemExit, match="0"):
        terminal.command(main)
    home = Path("/home/me")
    names = [home / "a b.png", Path("~backup"), Path("c~/d")]
    assert given == [(names, "/home/me/x.pth", home / "c.txt", "/home/me/results.csv", 1)]


def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import scripts; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.stderr == b"Stopped by Ctrl-C.\n"


def program(*lines: str) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"from classification_client.terminal import *\ndef main():\n{body}run(program(main))"


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    code = program("for i in range(100_000): print(i)")
    result = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$0" | head -1', code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("0\n", "")
    assert not (tmp_path / ".run").exists()


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", rb"\xe9\u9ce5"),
        ("latin-1", b"\xe9\\u9ce5"),
        ("utf-8", "\u00e9\u9ce5".encode()),
    ],
)
def test_a_character_that_the_terminal_lacks_is_printed_as_an_escape(
    encoding: str, printed: bytes
) -> None:
    text = r"'\u00e9\u9ce5'"
    code = program(f"print({text})", f"console.print({text})", r"print('\udcff')")
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    # A byte of a file's name that is no text comes out as it is.
    assert result.stdout == printed + b"\n" + printed + b"\n\xff\n"


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
        ("  ", []),
        (None, []),
    ],
)
def test_a_value_is_one_existing_name_or_else_a_list_as_in_a_shell(
    value: str | None, expected: list[str]
) -> None:
    Path("my folder").mkdir()
    for name in ("my cat.jpg", "it's.jpg", 'a "b" $(c).jpg', "x.jpg", "my folder/z.jpg"):
        Path(name).touch()
    assert sources(value) == expected
    assert sources("x.jpg", value) == ["x.jpg", *expected]


def test_a_quote_without_an_end_is_rejected() -> None:
    with pytest.raises(UserError, match=r"it's\.jpg x\.jpg: .* a quote without an end"):
        sources("it's.jpg x.jpg")
