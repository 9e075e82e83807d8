"""Installs a group of packages when something asks for it."""

import subprocess
import sys

from scripts.terminal import UserError


def require(*groups: str) -> None:
    """Install groups of packages that are not here; their names are those of `make setup-NAME`.

    Raises:
        UserError: they cannot be installed.
    """
    bootstrap = [sys.executable, "scripts/bootstrap.py", "run", *groups]
    if subprocess.run(bootstrap, check=False).returncode != 0:
        raise UserError(
            f"The packages of {', '.join(groups)} cannot be installed: see above. Then: "
            f"make {' '.join(f'setup-{group}' for group in groups)}"
        )
