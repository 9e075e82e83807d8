"""A machine with the installed service: a Debian container that boots systemd."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from scripts import bootstrap
from scripts.container.base import SUITE
from scripts.container.engine import Engine
from scripts.serve.management import wait_until
from scripts.terminal import UserError
from tests.containers.running import other_archive
from tests.deploy.load import TIMEOUT, Request
from tests.workspace import project_files

PROJECT = "/opt/densenet"
# python3 has the libraries that another Python needs.
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "procps", "openssl", "python3", "nginx")
_PYTHON = "/opt/python"
CLIENTS = 8
_KEY = "0123456789abcdef0123456789abcdef"
_URL = "https://127.0.0.1/predict"
# systemd is the first process and creates namespaces for its units.
_SYSTEMD = (
    *("--systemd", "false", "--env", "container=podman", "--stop-signal", "SIGRTMIN+3"),
    *("--tmpfs", "/run", "--cgroupns", "private", "--cap-add", "ALL"),
    *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
)
# IPAddressDeny needs cgroup version 2. Some kernels mount both versions.
_INIT = """\
umount --recursive /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec /sbin/init
"""
# Seconds.
_BOOT_TIMEOUT = 120.0
_BEFORE = 3.0
_OPTIONS = f"""\
DENSENET_MODELS=efficientnet_lite0
DENSENET_HOST=0.0.0.0
DENSENET_HTTP_PORT=80
DENSENET_HTTPS_PORT=443
DENSENET_KEYS=/etc/densenet/keys
DENSENET_ACME=/var/lib/densenet/acme
DENSENET_RATE=1000
PYTHONPATH={PROJECT}/client
"""


@dataclass(frozen=True)
class Machine:
    """A booted machine with the service.

    Attributes:
        engine: what runs it.
        name: of the container and its network namespace, which survives a reboot.
        project: the folder that is mounted at `/opt/densenet`.
    """

    engine: Engine
    name: str
    project: Path

    def shell(self, command: str) -> str:
        """Run a command as root; return what it printed."""
        run = ("exec", "--env", f"PYTHONPATH={PROJECT}/client", self.name, "sh", "-c", command)
        return self.engine.run(*run).stdout.strip()

    def start(self) -> None:
        """Boot."""
        self.engine.run("start", self.name)
        state = ("exec", self.name, "systemctl", "is-system-running", "--wait")
        assert wait_until(
            lambda: self.engine.run_unchecked(*state).stdout.strip() in {"running", "degraded"},
            _BOOT_TIMEOUT,
        ), self.engine.run_unchecked("logs", self.name).stdout

    def reboot(self) -> None:
        """Shut down with systemd, then start the container, which cannot restart itself."""
        self.engine.run_unchecked("exec", self.name, "systemctl", "reboot")
        self.engine.run("wait", self.name)
        self.start()

    def wait_until_ready(self) -> None:
        """Wait until a worker is ready; raise `AssertionError` with the journal if none is."""
        if not wait_until(lambda: "ready" in self.get("https://127.0.0.1/readyz"), _BOOT_TIMEOUT):
            raise AssertionError(self.shell("journalctl --no-pager -n 60 -u 'densenet*'"))

    def get(self, url: str) -> str:
        """Return the body of a response with status 200, otherwise ""."""
        ask = [*self._inside, "curl", "--silent", "--insecure", "--fail", url]
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout

    @property
    def _inside(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    @contextmanager
    def clients(self) -> Iterator[list[Request]]:
        """Keep clients sending requests; their list is filled when they stop."""
        found: list[Request] = []
        certificate = self.project / ".run/gateway/certificate.pem"
        command = [*self._inside, sys.executable, "-m", "tests.deploy.load", _URL, _KEY]
        with subprocess.Popen(
            [*command, str(CLIENTS)],
            env={**os.environ, "REQUESTS_CA_BUNDLE": str(certificate)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            yield found
            lines, _ = process.communicate(timeout=2 * TIMEOUT)
        found.extend(Request(**json.loads(line)) for line in lines.splitlines())


@dataclass(frozen=True)
class Outcome:
    """The requests around an event.

    Attributes:
        requests: number of requests.
        failed: number of requests by status or error other than 200.
        without_retry_after: number of responses 502 and 503 without Retry-After.
        recovered: seconds from the event to the first 200 after the last failure; 0 for none.
        slowest: seconds of the slowest request.
    """

    requests: int
    failed: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    recovered: float = 0.0
    slowest: float = 0.0


def outcome_of(found: list[Request], event: float) -> Outcome:
    """Summarize the requests around an event at this time."""
    failed = [request for request in found if request.outcome != "200"]
    last = max((request.begin for request in failed), default=0.0)
    after = [one.end for one in found if one.outcome == "200" and one.begin > last]
    return Outcome(
        requests=len(found),
        failed=Counter(request.outcome for request in failed),
        without_retry_after=sum(
            one.outcome in {"502", "503"} and one.retry_after is None for one in failed
        ),
        recovered=min(after, default=float("inf")) - event if failed else 0.0,
        slowest=max(request.end - request.begin for request in found),
    )


def kill(pattern: str) -> Callable[[Machine], None]:
    """Return an event: kill -9 of the oldest process whose command line matches."""
    return lambda machine: print(machine.shell(f"kill -9 $(pgrep --oldest --full '{pattern}')"))


def upgrade(machine: Machine) -> None:
    """Upgrade to another archive, then roll back."""
    command = f"{PROJECT}/deploy/systemd/gateway"
    new = f"{PROJECT}/new/efficientnet_lite0.mar"
    printed = machine.shell(
        f"{command} upgrade --agreement 0 --archive {new} && {command} rollback"
    )
    assert printed.count("make rollback undoes it") == 2, printed


EVENTS: dict[str, Callable[[Machine], None]] = {
    "worker": kill("model_service_worker"),
    "frontend": kill("org.pytorch.serve.ModelServer"),
    "supervisor": kill("scripts start --foreground"),
    "nginx": kill("nginx: master"),
    "upgrade": upgrade,
    "reboot": Machine.reboot,
}


def measure(machine: Machine, event: str, after: float = 20.0) -> Outcome:
    """Cause an event while clients send requests.

    Args:
        machine: one that is ready.
        event: a key of `EVENTS`.
        after: seconds for which clients continue.
    """
    with machine.clients() as found:
        time.sleep(_BEFORE)
        at = time.time()
        EVENTS[event](machine)
        time.sleep(after)
        machine.wait_until_ready()
        time.sleep(_BEFORE)
    return outcome_of(found, at)


@contextmanager
def machine(engine: Engine, archive: Path, folder: Path) -> Iterator[Machine]:
    """Boot a machine with the service installed as in docs/deploy/one-machine.md.

    Args:
        engine: podman, with a runtime that works.
        archive: of efficientnet_lite0.
        folder: for the machine's copy of the project.
    """
    project = folder / "densenet"
    _copy_project(project, archive)
    name = f"densenet-machine-{uuid4().hex[:8]}"
    for command in (("netns", "add", name), ("-n", name, "link", "set", "lo", "up")):
        subprocess.run(["ip", *command], check=True)
    mounts = {project: PROJECT, Path(".venv/lib").resolve(): f"{PROJECT}/.venv/lib:ro"}
    if sys.base_prefix != "/usr":
        mounts[Path(sys.base_prefix)] = f"{_PYTHON}:ro"
    try:
        engine.run(
            *("create", "--name", name, "--network", f"ns:/run/netns/{name}", *_SYSTEMD),
            *(word for mount in mounts.items() for word in ("--volume", f"{mount[0]}:{mount[1]}")),
            *(systemd_image(engine), "sh", "-c", _INIT),
        )
        found = Machine(engine, name, project)
        found.start()
        _install(found)
        yield found
    finally:
        engine.run_unchecked("rm", "--force", "--time", "5", name)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def _copy_project(project: Path, archive: Path) -> None:
    for path in project_files():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, project / path)
    shutil.copy(archive, project / "model_store" / archive.name)
    (project / "new").mkdir()
    other_archive(archive, project / "new" / archive.name)
    # A virtual environment with this one's packages and a Python that the service's user can read.
    bin_folder = project / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (project / ".venv/lib").mkdir()
    home = f"{_PYTHON}/bin" if sys.base_prefix != "/usr" else "/usr/bin"
    (bin_folder / "python").symlink_to(f"{home}/python3")
    (project / ".venv/pyvenv.cfg").write_text(f"home = {home}\n")
    assert bootstrap.is_installed("run"), "the environment is not up to date: make setup-tests"


def _install(machine: Machine) -> None:
    # This environment's Python may be linked with a library in its own folder.
    machine.shell(f"echo {_PYTHON}/lib >/etc/ld.so.conf.d/python.conf; ldconfig")
    machine.shell("systemctl disable --now nginx")
    machine.shell(f"{PROJECT}/deploy/systemd/install")
    machine.shell(
        f"printf '%s' '{_OPTIONS}' >/etc/densenet/environment; "
        f"echo 'alice {_KEY}' | install -m 640 -g densenet /dev/stdin /etc/densenet/keys"
    )
    machine.shell("systemctl start densenet densenet-gateway")
    machine.wait_until_ready()


def systemd_image(engine: Engine) -> str:
    """Return the name of an image that boots systemd; build it with mmdebstrap if it is missing."""
    digest = hashlib.sha256(" ".join((SUITE, *_PACKAGES)).encode()).hexdigest()[:12]
    name = f"localhost/densenet-systemd:{digest}"
    if engine.has_image(name):
        return name
    packages = f"--include={','.join(_PACKAGES)}"
    made = subprocess.Popen(
        ["mmdebstrap", "--variant=minbase", packages, SUITE, "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with made:
        engine.run("import", "-", name, stdin=made.stdout)
    if made.returncode != 0:
        engine.run_unchecked("image", "rm", "--force", name)
        raise UserError(f"mmdebstrap failed with exit status {made.returncode}.")
    return name
