"""The archive's sitecustomize beside one that somebody else put on the path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A module path: the archive's folder, and behind it a tracing agent's."""
    for name in ("archive", "agent"):
        (tmp_path / name).mkdir()
    shutil.copy("handler/sitecustomize.py", tmp_path / "archive")
    return tmp_path


def start_python(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{path / 'archive'}:{path / 'agent'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_hands_on_to_the_next_one(path: Path) -> None:
    (path / "agent" / "sitecustomize.py").write_text(
        "import sys\nsys.traced = (__name__, __file__)\n"
    )
    done = start_python(path, "import sys; print(sys.traced, 'torch' in sys.modules)")
    agent = str(path / "agent" / "sitecustomize.py")
    assert done.stdout.strip() == f"{('sitecustomize', agent)} False"
    assert done.stderr == ""


@pytest.mark.parametrize("line", ["raise KeyError('agent')", "import nothing_like_this", "if:"])
def test_what_goes_wrong_there_does_not_break_the_worker(path: Path, line: str) -> None:
    (path / "agent" / "sitecustomize.py").write_text(line)
    done = start_python(path, "import sys; print('torch' in sys.modules)")
    assert done.returncode == 0
    assert done.stdout.strip() == "False"
    assert done.stderr.startswith("Another sitecustomize failed: ")


def test_alone_it_says_nothing(path: Path) -> None:
    done = start_python(path, "import ts.protocol.otf_message_handler as m; print(m.torch)")
    assert done.returncode == 0
    assert done.stderr == ""
