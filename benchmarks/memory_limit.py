"""A limit of the kernel (cgroup) to the memory of a server, as Kubernetes gives a pod one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from scripts.serve.management import poll

DEPLOYMENT = Path("deploy/kubernetes/base/deployment.yaml")
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


@dataclass(frozen=True)
class Version:
    """What a version of cgroups calls its files."""

    mount: Path
    limit: str
    peak: str
    events: str
    # Memory on the disk, which a pod has none of: file and what to write into it; None for the
    # limit, since version 1 counts both together.
    swap: tuple[str, int | None]


V1 = Version(
    Path("/sys/fs/cgroup/memory"),
    limit="memory.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
    swap=("memory.memsw.limit_in_bytes", None),
)
V2 = Version(
    Path("/sys/fs/cgroup"),
    limit="memory.max",
    peak="memory.peak",
    events="memory.events",
    swap=("memory.swap.max", 0),
)


@dataclass(frozen=True)
class MemoryGroup:
    """A group of processes with a limit to their memory.

    Attributes:
        folder: the group in /sys/fs/cgroup.
        home: the group of this process.
    """

    version: Version
    folder: Path
    home: Path

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This process is in it; what it starts meanwhile stays there."""
        _move(self.folder)
        try:
            yield
        finally:
            _move(self.home)

    @property
    def peak(self) -> int | None:
        """The most memory at once in bytes, with the cache of files; None where it is not counted,
        as in version 2 before Linux 5.19.
        """
        path = self.folder / self.version.peak
        return int(path.read_text()) if path.exists() else None

    @property
    def kills(self) -> int:
        """How many of its processes the kernel ended for want of memory."""
        lines = (self.folder / self.version.events).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def pod_limit() -> int:
    """Bytes that the Deployment's container may take."""
    deployment = yaml.safe_load(DEPLOYMENT.read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    text = container["resources"]["limits"]["memory"]
    return int(text[:-2]) * _UNITS[text[-2:]]


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup | None]:
    """A new group with a limit in bytes; None where none can be made, which takes root.

    It lies in the group of this process, or above that where version 2 does not allow it there.
    """
    group = _new_group()
    if group is None:
        yield None
        return
    try:
        (group.folder / group.version.limit).write_text(str(limit))
        name, most = group.version.swap
        with suppress(OSError):  # the kernel does not count it
            (group.folder / name).write_text(str(limit if most is None else most))
        yield group
    finally:
        poll(lambda: _removed(group.folder), 10)


def _new_group() -> MemoryGroup | None:
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version = V1
        elif not controllers and (V2.mount / "cgroup.controllers").exists():
            version = V2
        else:
            continue
        home = version.mount / path.lstrip("/")
        if not home.is_dir():  # the path is another namespace's
            home = version.mount
        for parent in (home, *home.parents):
            if not parent.is_relative_to(version.mount):
                break
            folder = parent / f"benchmark-{os.getpid()}"
            with suppress(OSError):
                folder.mkdir()
                if os.access(folder / version.limit, os.W_OK):
                    return MemoryGroup(version, folder, home)
                folder.rmdir()
    return None


def _move(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _removed(folder: Path) -> bool:
    """The last of its processes may take a moment to end."""
    with suppress(OSError):
        folder.rmdir()
    return not folder.exists()
