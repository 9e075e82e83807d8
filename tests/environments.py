"""Virtual environments for packages that conflict with the project's."""

import subprocess
import sys
from pathlib import Path


def environment(folder: Path, lock: Path) -> Path:
    """Create an environment with the packages of a lock; return its Python."""
    uv, python = Path(sys.executable).with_name("uv"), folder / "bin" / "python"
    install = ("pip", "install", "--python", python, "--require-hashes", "-r", lock)
    for arguments in (("venv", "--python", sys.executable, folder), install):
        subprocess.run([uv, *arguments, "--quiet"], check=True)
    return python
