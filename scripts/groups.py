"""Install package groups on demand."""

import subprocess
import sys

from scripts import bootstrap
from scripts.terminal import UserError, step


def require(*groups: str, why: str) -> None:
    """Install missing package groups.

    Args:
        groups: names of groups, as in `make setup-NAME`.
        why: the reason, a clause that is printed before the download.

    Raises:
        UserError: they cannot be installed.
    """
    missing = [group for group in groups if not bootstrap.is_installed(group)]
    if not missing:
        return
    step(f"Packages: {', '.join(missing)}, since {why}")
    command = [sys.executable, "scripts/bootstrap.py", "run", *groups]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError(
            f"The packages of {', '.join(groups)} cannot be installed: see above. Then: "
            f"make {' '.join(f'setup-{group}' for group in groups)}"
        )
