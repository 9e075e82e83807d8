"""What a person sees when a command cannot go on."""

import subprocess
import sys

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
        [sys.executable, "-m", "scripts.server", "scale", "--workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--workers" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistake_of_the_programs_own_is_not_hidden() -> None:
    program = (
        "from scripts.terminal import command\ndef main():\n    raise KeyError('x')\ncommand(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "Traceback" in result.stderr
