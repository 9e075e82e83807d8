"""Build a base image from Debian's packages, if none can be pulled."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.container.engine import Engine
from scripts.terminal import UserError

_SUITE = "bookworm"


def debian_base(engine: Engine) -> str:
    """Return the name of an image of Debian with Python, nginx and tini."""
    packages = ("python3", "python3-venv", "ca-certificates", "nginx", "tini")
    # The Dockerfile calls `python`, which the default base image has.
    return debian_image(engine, packages, '--customize-hook=ln -s python3 "$1/usr/bin/python"')


def debian_image(engine: Engine, packages: Sequence[str], *options: str) -> str:
    """Return the name of an image of Debian with these packages; build it if it is missing.

    Its name contains a digest of the command, so that changed packages build a new image.

    Raises:
        UserError: mmdebstrap is missing, fails, or needs root.
    """
    included = f"--include={','.join(packages)}"
    command = ["mmdebstrap", "--variant=minbase", included, *options, _SUITE]
    digest = hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
    name = f"localhost/densenet-debian:{digest}"
    if engine.has_image(name):
        return name
    if shutil.which("mmdebstrap") is None:
        raise UserError("mmdebstrap is missing (on Debian: apt install mmdebstrap).")
    if os.geteuid() != 0:
        raise UserError("Only root can build a base image of Debian's packages.")
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        archive = Path(folder, "base.tar")
        result = subprocess.run(
            [*command, archive],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise UserError(f"mmdebstrap failed: {result.stdout.strip()[-2000:]}")
        engine.run("import", str(archive), name)
    return name
