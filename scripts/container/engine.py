"""docker or podman, whichever is there and works."""

import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.terminal import UserError

# Seconds.
_ASKED = 60.0

# Where podman's usual runtime cannot make a container: in kernels that mount both versions of
# cgroups, and in containers that may not raise their own limits.
_OTHER_RUNTIME = """\
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""


@dataclass(frozen=True)
class Engine:
    """A program that builds images and runs containers.

    Attributes:
        program: `docker` or `podman`.
        environment: what it is given beside this process's own variables.
    """

    program: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, *arguments: str, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs it with these arguments; its output as text unless `options` say otherwise.

        Raises:
            UserError: it failed, with its own words.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        done = self.tried(*arguments, timeout=timeout, **options)
        if done.returncode != 0:
            said = (done.stderr or done.stdout or "").strip()[-2000:]
            raise UserError(f"{self.program} {' '.join(arguments[:2])} failed: {said}")
        return done

    def tried(
        self, *arguments: str, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """The same, whether it fails or not."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.run(
            [self.program, *arguments],
            env=self.variables,
            stdin=settings.pop("stdin", subprocess.DEVNULL),
            text=True,
            timeout=timeout,
            check=False,
            **settings,
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment that it runs in."""
        return {**os.environ, **self.environment}

    def inspect(self, kind: str, name: str) -> Any:
        """What it knows of an image or a container, as it says it; `kind` is one of these."""
        (found,) = json.loads(self.run(kind, "inspect", name, timeout=_ASKED).stdout)
        return found

    def has_image(self, name: str) -> bool:
        """Whether it is on this machine."""
        return self.tried("image", "inspect", name, timeout=_ASKED).returncode == 0


def find_engine() -> Engine | None:
    """What there is: docker where its daemon answers, else podman; None where neither is."""
    if shutil.which("docker") and Engine("docker").tried("info", timeout=_ASKED).returncode == 0:
        return Engine("docker")
    return Engine("podman") if shutil.which("podman") else None


def require_engine() -> Engine:
    """The same; `UserError` where neither is."""
    engine = find_engine()
    if engine is None:
        raise UserError("There is neither docker nor podman that works. Install one of them.")
    return engine


def runnable(engine: Engine, image: str, folder: Path) -> Engine:
    """An engine that can run this image's `true`.

    podman may need another runtime than its usual one; a file in `folder` says so to it then.

    Raises:
        UserError: it runs in no way, with what it said.
    """
    trial: Sequence[str] = ("run", "--rm", "--entrypoint", "true", image)
    first = engine.tried(*trial, timeout=_ASKED)
    if first.returncode == 0:
        return engine
    if engine.program == "podman" and shutil.which("runc"):
        config = folder / "containers.conf"
        config.write_text(
            _OTHER_RUNTIME.format(
                files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
                processes=min(4096, resource.getrlimit(resource.RLIMIT_NPROC)[1]),
            )
        )
        other = Engine(engine.program, {**engine.environment, "CONTAINERS_CONF": str(config)})
        if other.tried(*trial, timeout=_ASKED).returncode == 0:
            return other
    raise UserError(f"{engine.program} cannot run a container: {first.stderr.strip()[-2000:]}")


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """A folder for what is only needed while an image is built."""
    return tempfile.TemporaryDirectory(prefix="image-")
