"""What a person sees when a command cannot go on."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        ("UserError('the disk is full')", 1, "Error: the disk is full"),
        ("KeyboardInterrupt", 130, "Stopped by Ctrl-C. Run the same command again to go on."),
    ],
)
def test_a_command_ends_with_a_sentence(raised: str, status: int, message: str) -> None:
    program = (
        "from scripts.terminal import UserError, command\n"
        f"def main():\n    raise {raised}\n"
        "command(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_option_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scripts.serve.commands", "scale", "--workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--workers" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_help_leaves_out_what_only_the_makefile_sets() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scripts.classify", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "CLASSIFY_KEY" in result.stdout
    assert "GIVEN" not in result.stdout


def test_a_mistake_of_the_programs_own_is_a_sentence_with_its_details_in_a_file(
    tmp_path: Path,
) -> None:
    program = (
        "from scripts.terminal import command\ndef main():\n    raise KeyError('x')\ncommand(main)"
    )
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path.cwd())},
        )
        assert result.returncode == 1
        assert "(KeyError: 'x'). The details, to report it with, are in .run/logs" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    details = (tmp_path / ".run" / "logs" / "errors.log").read_text()
    assert details.count("Traceback") == 2
    assert "in main" in details


def test_a_reader_that_has_had_enough_is_no_mistake(tmp_path: Path) -> None:
    program = (
        "from scripts.terminal import command\n"
        "def main():\n    for i in range(100_000): print(i)\ncommand(main)"
    )
    result = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$0" | head -1', program],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin:/bin"},
    )
    assert (result.stdout, result.stderr) == ("0\n", "")
    assert not (tmp_path / ".run").exists()
