"""The archive's sitecustomize beside one that somebody else put on the path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("agent", "traced", "error"),
    [
        ("import sys\nsys.traced = True", True, ""),
        (None, False, ""),
        *(
            (line, False, "Another sitecustomize failed: ")
            for line in ("raise KeyError('agent')", "import nothing_like_this", "if:")
        ),
    ],
)
def test_it_runs_the_next_one_and_survives_its_faults(
    *, agent: str | None, traced: bool, error: str, tmp_path: Path
) -> None:
    """The module path is the archive's folder, and behind it a tracing agent's."""
    for name in ("archive", "agent"):
        (tmp_path / name).mkdir()
    shutil.copy("handler/sitecustomize.py", tmp_path / "archive")
    if agent:
        (tmp_path / "agent" / "sitecustomize.py").write_text(agent)
    code = """
import sys, ts.protocol.otf_message_handler
print(hasattr(sys, "traced"), any(name.split(".")[0] == "torch" for name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'archive'}:{tmp_path / 'agent'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{traced} False"
    assert done.stderr.startswith(error)
    assert bool(done.stderr) is bool(error)
