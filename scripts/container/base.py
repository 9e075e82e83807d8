"""Build a base image from Debian's packages, if none can be pulled."""

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
# Adds the `python` that deploy/container/Dockerfile calls and the default base image has.
_DOCKERFILE = """\
FROM {imported}
RUN ln -s python3 /usr/bin/python
"""


def debian_base(engine: Engine) -> str:
    """Return the name of an image of Debian with Python, nginx and tini; build it if it is missing.

    Its name contains a digest of the list of packages, so that a changed list builds a new image.

    Raises:
        UserError: mmdebstrap is missing, fails, or needs root.
    """
    digest = hashlib.sha256(" ".join((SUITE, *PACKAGES, _DOCKERFILE)).encode()).hexdigest()[:12]
    name = f"localhost/densenet-base:{digest}"
    if engine.has_image(name):
        return name
    if shutil.which("mmdebstrap") is None:
        raise UserError("mmdebstrap is missing (on Debian: apt install mmdebstrap).")
    if os.geteuid() != 0:
        raise UserError("Only root can build a base image of Debian's packages.")
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        archive = Path(folder) / "base.tar"
        result = subprocess.run(
            [
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
        if result.returncode != 0:
            raise UserError(f"mmdebstrap failed: {result.stdout.strip()[-2000:]}")
        imported = f"localhost/densenet-debian:{digest}"
        engine.run("import", str(archive), imported)
        (Path(folder) / "Dockerfile").write_text(_DOCKERFILE.format(imported=imported))
        archive.unlink()
        engine.run("build", *build_options(engine), "-t", name, folder)
    return name


def build_options(engine: Engine) -> list[str]:
    """Return the engine's options for a build.

    The build uses this machine's network, for package indexes that only this machine can reach.
    podman builds in a chroot, because its default runtime may not work here; in Docker's format,
    because OCI's has no HEALTHCHECK; and without intermediate layers.
    """
    network = ["--network", "host"]
    if engine.program == "docker":
        return network
    return [*network, "--isolation", "chroot", "--format", "docker", "--layers=false"]
