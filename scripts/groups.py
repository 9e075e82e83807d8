"""Installs groups of packages on demand."""

import subprocess
import sys

from scripts.terminal import UserError


def require(*groups: str) -> None:
    """Install missing groups of packages; NAME of `make setup-NAME` is a group.

    Raises:
        UserError: they cannot be installed.
    """
    bootstrap = [sys.executable, "scripts/bootstrap.py", "run", *groups]
    if subprocess.run(bootstrap, check=False).returncode != 0:
        raise UserError(
            f"The packages of {', '.join(groups)} cannot be installed: see above. Then: "
            f"make {' '.join(f'setup-{group}' for group in groups)}"
        )
