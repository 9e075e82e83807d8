"""Virtual environments for packages that the project's own must not have."""

import subprocess
import sys
from pathlib import Path


def environment(folder: Path, lock: Path) -> Path:
    """Return the Python of a new environment in this folder with the packages of a lock."""
    uv, python = Path(sys.executable).with_name("uv"), folder / "bin" / "python"
    install = ("pip", "install", "--python", python, "--require-hashes", "-r", lock)
    for arguments in (("venv", "--python", sys.executable, folder), install):
        subprocess.run([uv, *arguments, "--quiet"], check=True)
    return python
