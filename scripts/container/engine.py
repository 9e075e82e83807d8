"""Run docker or podman, whichever is installed and works."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.terminal import UserError

# Timeout of fast commands, in seconds.
_TIMEOUT = 60.0
_CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

# For machines on which podman's default runtime cannot create a container, because they mount both
# cgroup versions or are containers that cannot raise their own limits.
_FALLBACK_CONFIG = """\
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
        environment: variables in addition to this process's own.
    """

    program: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, *arguments: str, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the engine like `run_unchecked`; raise `UserError` with its output if it fails."""
        result = self.run_unchecked(*arguments, timeout=timeout, **options)
        if result.returncode != 0:
            output = (result.stderr or result.stdout or "").strip()[-2000:]
            raise UserError(f"{self.program} {' '.join(arguments[:2])} failed: {output}")
        return result

    def run_unchecked(
        self, *arguments: str, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the engine; capture its output as text unless `options` override that.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        return subprocess.run(
            [self.program, *arguments],
            env={**os.environ, **self.environment},
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            **{"stdin": subprocess.DEVNULL, **_CAPTURED, **options},
        )

    def inspect(self, kind: str, name: str) -> Any:
        """Return the engine's description of an object; `kind` is "image" or "container"."""
        (found,) = json.loads(self.run(kind, "inspect", name, timeout=_TIMEOUT).stdout)
        return found

    def has_image(self, name: str) -> bool:
        """Return whether an image is on this machine."""
        return self.run_unchecked("image", "inspect", name, timeout=_TIMEOUT).returncode == 0


def find_engine() -> Engine | None:
    """Return docker if its daemon responds, else podman; None if neither is installed."""
    docker = Engine("docker")
    if shutil.which("docker") and docker.run_unchecked("info", timeout=_TIMEOUT).returncode == 0:
        return docker
    return Engine("podman") if shutil.which("podman") else None


def require_engine() -> Engine:
    """Return docker or podman; raise `UserError` if neither works."""
    engine = find_engine()
    if engine is None:
        raise UserError("Neither docker nor podman works here. Install one of them.")
    return engine


def with_working_runtime(engine: Engine, image: str, folder: Path) -> Engine:
    """Return the engine with a runtime that can run `true` in this image.

    If podman's default runtime cannot, the fallback is runc, with a configuration in `folder`.

    Raises:
        UserError: no runtime works; the message contains the engine's output.
    """
    trial = ("run", "--rm", "--entrypoint", "true", image)
    first = engine.run_unchecked(*trial, timeout=_TIMEOUT)
    if first.returncode == 0:
        return engine
    if engine.program == "podman" and shutil.which("runc"):
        config = folder / "containers.conf"
        config.write_text(
            _FALLBACK_CONFIG.format(
                files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
                processes=min(4096, resource.getrlimit(resource.RLIMIT_NPROC)[1]),
            )
        )
        other = Engine(engine.program, {**engine.environment, "CONTAINERS_CONF": str(config)})
        if other.run_unchecked(*trial, timeout=_TIMEOUT).returncode == 0:
            return other
    raise UserError(f"{engine.program} cannot run a container: {first.stderr.strip()[-2000:]}")
