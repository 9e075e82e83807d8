"""A machine with the installed service: a Debian container that boots systemd."""

import ctypes
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import requests

from scripts.container.base import debian_image
from scripts.container.engine import Engine
from scripts.samples import CAT
from scripts.serve.management import wait_until
from tests.containers.running import other_archive
from tests.workspace import copy_project

PROJECT = "/opt/densenet"
# python3 has the libraries that another Python needs.
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "procps", "openssl", "python3", "nginx", "curl")
_PYTHON = "/opt/python"
CLIENTS = 8
TIMEOUT = 60
_KEY = "0123456789abcdef0123456789abcdef"
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
_BEFORE = 2.0
_AFTER = 10.0
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
class Request:
    """One request of a client, with its times as `time.monotonic`.

    The outcome is the status, `refused` for a refused connection, or the name of another error.
    """

    begin: float
    end: float
    outcome: str
    retry_after: bool = False


@dataclass(frozen=True)
class Machine:
    """A booted machine with the service.

    Attributes:
        engine: what runs it.
        name: of the container and its network namespace, which survives a reboot.
        certificate: of the gateway.
    """

    engine: Engine
    name: str
    certificate: Path

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
        """Wait until units and a worker are ready; otherwise raise an error with the journal."""
        active = "systemctl is-active --quiet densenet densenet-gateway"
        look = f"{active} && curl --silent --insecure --fail https://127.0.0.1/readyz || true"
        if not wait_until(lambda: "ready" in self.shell(look), _BOOT_TIMEOUT):
            raise AssertionError(self.shell("journalctl --no-pager -n 60 -u 'densenet*'"))

    @contextmanager
    def clients(self) -> Iterator[list[Request]]:
        """Keep clients sending requests, each the next one after a response."""
        found: list[Request] = []
        done = threading.Event()
        image = CAT.read_bytes()

        def work() -> None:
            # This thread enters the machine's network.
            with open(f"/run/netns/{self.name}") as namespace:  # noqa: PTH123
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
            with requests.Session() as session:
                session.trust_env = False  # REQUESTS_CA_BUNDLE would override `verify`
                session.verify = str(self.certificate)
                session.headers["X-API-Key"] = _KEY
                while not done.is_set():
                    request = _request(session, image)
                    found.append(request)
                    if request.outcome != "200":
                        done.wait(0.2)

        threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield found
        finally:
            done.set()
            for thread in threads:
                thread.join()


def _request(session: requests.Session, image: bytes) -> Request:
    begin, retry_after = time.monotonic(), False
    try:
        answer = session.post("https://127.0.0.1/predict", image, timeout=TIMEOUT)
        outcome, retry_after = str(answer.status_code), "Retry-After" in answer.headers
    except requests.RequestException as error:
        refused = "Connection refused" in str(error)
        outcome = "refused" if refused else type(error).__name__
    return Request(begin, time.monotonic(), outcome, retry_after)


def kill(pattern: str) -> Callable[[Machine], object]:
    """Return an event: kill -9 of the oldest process whose command line matches."""
    return lambda machine: machine.shell(f"kill -9 $(pgrep --oldest --full '{pattern}')")


def upgrade(machine: Machine) -> None:
    """Upgrade to another archive, then roll back."""
    command = f"{PROJECT}/deploy/systemd/gateway"
    new = f"{PROJECT}/new/efficientnet_lite0.mar"
    printed = machine.shell(
        f"{command} upgrade --agreement 0 --archive {new} && {command} rollback"
    )
    assert printed.count("make rollback undoes it") == 2, printed


def measure(machine: Machine, event: Callable[[Machine], object]) -> tuple[float, list[Request]]:
    """Cause an event while clients send requests; return its time and the requests."""
    with machine.clients() as found:
        time.sleep(_BEFORE)
        at = time.monotonic()
        event(machine)
        time.sleep(_AFTER)
        machine.wait_until_ready()
        time.sleep(_BEFORE)
    return at, found


@contextmanager
def machine(engine: Engine, archive: Path, folder: Path) -> Iterator[Machine]:
    """Boot a machine with the service installed as in docs/deploy/one-machine.md.

    `folder` is for the machine's copy of the project, which is mounted at `PROJECT`.
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
            *(f"--volume={source}:{target}" for source, target in mounts.items()),
            *(systemd_image(engine), "sh", "-c", _INIT),
        )
        found = Machine(engine, name, project / ".run/gateway/certificate.pem")
        found.start()
        # This environment's Python may be linked with a library in its own folder.
        found.shell(f"echo {_PYTHON}/lib >/etc/ld.so.conf.d/python.conf; ldconfig")
        found.shell("systemctl disable --now nginx")
        found.shell(f"{PROJECT}/deploy/systemd/install")
        found.shell(
            f"printf '%s' '{_OPTIONS}' >/etc/densenet/environment; "
            f"echo 'alice {_KEY}' | install -m 640 -g densenet /dev/stdin /etc/densenet/keys"
        )
        found.shell("systemctl start densenet densenet-gateway")
        found.wait_until_ready()
        yield found
    finally:
        engine.run_unchecked("rm", "--force", "--time", "5", name)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def systemd_image(engine: Engine) -> str:
    """Return the name of an image that boots systemd; build it if it is missing."""
    return debian_image(engine, _PACKAGES)


def _copy_project(project: Path, archive: Path) -> None:
    copy_project(project)
    shutil.copy(archive, project / "model_store" / archive.name)
    (project / "new").mkdir()
    other_archive(archive, project / "new" / archive.name)
    # A virtual environment with this one's packages and a Python that the service's user can read.
    (project / ".venv").unlink()
    for name in ("bin", "lib"):
        (project / ".venv" / name).mkdir(parents=True)
    home = f"{_PYTHON}/bin" if sys.base_prefix != "/usr" else "/usr/bin"
    (project / ".venv/bin/python").symlink_to(f"{home}/python3")
    (project / ".venv/pyvenv.cfg").write_text(f"home = {home}\n")
