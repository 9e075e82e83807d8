"""A base for the image from Debian's packages, where none can be pulled."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from scripts.container.engine import Engine
from scripts.terminal import UserError

SUITE = "bookworm"
PACKAGES = ("python3", "python3-venv", "ca-certificates", "nginx", "tini")
# Has the programs of the usual base that the Dockerfile calls.
_RECIPE = """\
FROM {imported}
RUN ln -s python3 /usr/bin/python
"""


def debian_base(engine: Engine) -> str:
    """The name of an image of Debian with Python, nginx and tini; made where it is not there yet.

    Its name holds a digest of the list of packages, so that another list is another image.

    Raises:
        UserError: mmdebstrap is missing, fails, or may not do this.
    """
    digest = hashlib.sha256(" ".join((SUITE, *PACKAGES, _RECIPE)).encode()).hexdigest()[:12]
    name = f"localhost/densenet-base:{digest}"
    if engine.has_image(name):
        return name
    if shutil.which("mmdebstrap") is None:
        raise UserError("mmdebstrap is missing (on Debian: apt install mmdebstrap).")
    if os.geteuid() != 0:
        raise UserError("A base of Debian's packages is made by root only.")
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        archive = Path(folder) / "base.tar"
        made = subprocess.run(
            [  # noqa: S607
                "mmdebstrap",
                "--variant=minbase",
                f"--include={','.join(PACKAGES)}",
                SUITE,
                str(archive),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise UserError(f"mmdebstrap failed: {made.stdout.strip()[-2000:]}")
        imported = f"localhost/densenet-debian:{digest}"
        engine.run("import", str(archive), imported)
        (Path(folder) / "Dockerfile").write_text(_RECIPE.format(imported=imported))
        archive.unlink()
        engine.run("build", *engine_options(engine), "-t", name, folder)
    return name


def engine_options(engine: Engine) -> list[str]:
    """What a build is told.

    It uses this machine's network, for indexes that are reached from here only. podman builds
    without a container, which its usual runtime may not make here; keeps what is Docker's own
    (HEALTHCHECK), and keeps none of the steps between.
    """
    network = ["--network", "host"]
    if engine.program == "docker":
        return network
    return [*network, "--isolation", "chroot", "--format", "docker", "--layers=false"]
