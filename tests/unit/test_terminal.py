"""What a person sees when a command fails, and how one option names several images."""

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
        (UserError("the disk is full"), 1, "Error: the disk is full"),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C. Run the same command again to resume."),
    ],
)
def test_a_failed_command_exits_with_a_message(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        terminal.command(raising(error))
    assert exited.value.code == status
    assert capsys.readouterr().err.strip() == message


def test_the_details_of_an_unexpected_error_are_in_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"):
            terminal.command(raising(KeyError("x")))
        (message,) = capsys.readouterr().err.splitlines()
        assert "(KeyError: 'x'). Details for a bug report are in .run/logs" in message
    details = Path(".run/logs/errors.log").read_text()
    assert details.count("Traceback") == 2
    assert "in main" in details


def test_the_home_folder_is_expanded_in_every_option_and_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []

    def main(
        names: Annotated[list[Path], typer.Argument()],
        weights: str = "",
        output: str | None = None,
        number: int = 1,
    ) -> None:
        given.extend((names, weights, output, number))

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DENSENET_OUTPUT", "~/results.csv")
    options = ["--weights=~/x.pth", "~/a b.png", "~backup", "c~/d"]
    monkeypatch.setattr(sys, "argv", ["command", *options])
    with pytest.raises(SystemExit, match="0"):
        terminal.command(main)
    names = [Path("/home/me/a b.png"), Path("~backup"), Path("c~/d")]
    assert given == [names, "/home/me/x.pth", "/home/me/results.csv", 1]


def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import scripts; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.stderr == b"Stopped by Ctrl-C.\n"


def program(*lines: str) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"from classification_client.terminal import *\ndef main():\n{body}run(program(main))"


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
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
    [("ascii", rb"\xe9\u9ce5"), ("latin-1", b"\xe9\\u9ce5"), ("utf-8", "\u00e9\u9ce5".encode())],
)
def test_a_character_that_the_terminal_lacks_is_printed_as_an_escape(
    encoding: str, printed: bytes
) -> None:
    text = r"'\u00e9\u9ce5'"
    code = program(f"print({text})", f"console.print({text})", r"print('\udcff')")
    variables = os.environ | {"PYTHONIOENCODING": encoding}
    found = subprocess.check_output([sys.executable, "-c", code], env=variables)
    # A byte of a file's name that is not text is printed unchanged.
    assert found == printed + b"\n" + printed + b"\n\xff\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(
            (name, [name])
            for name in ("my cat.jpg", "it's.jpg", 'a "b" $(c).jpg', "my folder", "-")
        ),
        ("my folder/*.jpg", ["my folder/*.jpg"]),
        ("x.jpg y.jpg", ["x.jpg", "y.jpg"]),
        ("'my cat.jpg' *.jpg", ["my cat.jpg", "*.jpg"]),
        (r"my\ cat.jpg x.jpg", ["my cat.jpg", "x.jpg"]),
        ('"it\'s.jpg" x.jpg', ["it's.jpg", "x.jpg"]),
        ("~/images x.jpg", [os.path.expanduser("~/images"), "x.jpg"]),  # noqa: PTH111
        *((empty, []) for empty in ("  ", None)),
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
    with pytest.raises(UserError, match=r"no'such\.jpg x\.jpg: .* a quote without an end"):
        sources("no'such.jpg x.jpg")
