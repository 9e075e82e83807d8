"""A copy of the project, like a fresh clone."""

import shutil
import subprocess
from pathlib import Path

from scripts import bootstrap


def project_files() -> list[Path]:
    """Return the project's files, tracked by git or not yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [path for path in map(Path, filter(None, listed.split("\0"))) if path.is_file()]


def copy_project(folder: Path) -> None:
    """Copy the project into a folder; the virtual environment is shared."""
    for path in project_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path)
    # Otherwise the copy's commands would install packages into the shared environment.
    assert bootstrap.is_installed("run"), "the environment is not up to date: make setup-tests"
    (folder / ".venv").symlink_to(Path(".venv").resolve())
