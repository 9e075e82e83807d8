"""Containers for tests and benchmarks."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPResponse
from typing import Any
from uuid import uuid4

from scripts.container.engine import Engine
from scripts.serve.management import wait_until
from scripts.serve.running import unused_ports

# Seconds. A worker is ready after about 5 s on an idle machine.
READY_TIMEOUT = 120.0
_TIMEOUT = 60.0
# As in deploy/kubernetes/base/deployment.yaml.
FENCED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body's JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Container:
    """A container.

    Attributes:
        ports: the port on loopback for each published port of the container.
    """

    engine: Engine
    name: str
    ports: Mapping[int, int]

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        port: int = 8080,
        timeout: float = _TIMEOUT,
    ) -> Answer:
        """GET, or POST with a body; return a response of any status, or raise `OSError`."""
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        request = urllib.request.Request(url, body, dict(headers or {}))
        if body is not None and not request.has_header("Content-type"):
            request.add_header("Content-Type", "application/octet-stream")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read())

    def status(self, path: str) -> int | None:
        """Return the status of a GET; None without a response."""
        try:
            return self.ask(path, timeout=5).status
        except OSError:
            return None

    def ready(self) -> bool:
        """Return whether `/ping` returns 200."""
        return self.status("/ping") == HTTPStatus.OK

    def wait_until_ready(self) -> None:
        """Wait until it is ready; raise `AssertionError` with its logs if it is not in time."""

        def ready() -> bool:
            assert self.runs(), f"the container exited:\n{self.logs()}"
            return self.ready()

        assert wait_until(ready, READY_TIMEOUT), f"it is not ready:\n{self.logs()}"

    def execute(self, *command: str) -> str:
        """Run a command in it; return its standard output."""
        return self.engine.run("exec", self.name, *command, timeout=_TIMEOUT).stdout

    def state(self) -> Mapping[str, Any]:
        """Return the engine's state of its process."""
        found: Mapping[str, Any] = self.engine.inspect("container", self.name)["State"]
        return found

    def runs(self) -> bool:
        """Return whether it is running."""
        return bool(self.state()["Running"])

    def logs(self) -> str:
        """Return its standard output and error."""
        found = self.engine.run_unchecked("logs", self.name, timeout=_TIMEOUT)
        return found.stdout + found.stderr

    def signal(self, name: str) -> None:
        """Send its first process a signal, such as `TERM`."""
        self.engine.run("kill", f"--signal={name}", self.name, timeout=_TIMEOUT)

    def peak_bytes(self) -> int:
        """Return its peak memory with files on its tmpfs; 0 if the kernel does not count it."""
        return self._counted("memory/memory.max_usage_in_bytes memory.peak")

    def used_bytes(self) -> int:
        """Return its memory with files on its tmpfs; 0 if the kernel does not count it."""
        return self._counted("memory/memory.usage_in_bytes memory.current")

    def _counted(self, files: str) -> int:
        """Return the first of these files of cgroups version 1 or 2."""
        look = f"cd /sys/fs/cgroup && cat {files} 2>/dev/null || true"
        return int((self.execute("sh", "-c", look).split() or ["0"])[0])


@contextmanager
def in_flight(
    running: Container, path: str, body: bytes, count: int
) -> Iterator[list[socket.socket]]:
    """Open connections whose requests wait for their bodies after `100 Continue`."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: container\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            address = ("127.0.0.1", running.ports[8080])
            connection = stack.enter_context(socket.create_connection(address, timeout=_TIMEOUT))
            connection.sendall(head.encode())
            connections.append(connection)
        for connection in connections:
            head_of_response = connection.recv(100)
            assert b"100 Continue" in head_of_response, head_of_response
        yield connections


def status_on(connection: socket.socket) -> int:
    """Return the status of the next response, whose body is JSON."""
    response = HTTPResponse(connection)
    response.begin()
    json.loads(response.read())
    return response.status


@contextmanager
def container(
    engine: Engine,
    image: str,
    *arguments: str,
    options: tuple[str, ...] = FENCED,
    environment: Mapping[str, str] | None = None,
    ports: tuple[int, ...] = (8080, 8082),
    until: Callable[[Container], None] | None = Container.wait_until_ready,
) -> Iterator[Container]:
    """Run a container, and remove it afterwards.

    Args:
        engine: docker or podman.
        image: name of the image.
        arguments: of the image's entry point.
        options: of `run`, in addition to name, ports and environment.
        environment: variables.
        ports: of the container, published on loopback.
        until: waits until the container is usable; None to get it while it starts.
    """
    published = dict(zip(ports, unused_ports(len(ports)), strict=True))
    made = Container(engine, f"test-{uuid4().hex[:12]}", published)
    try:
        engine.run(
            *("run", "--detach", f"--name={made.name}"),
            *(f"--publish=127.0.0.1:{mine}:{its}" for its, mine in published.items()),
            *(f"--env={key}={value}" for key, value in (environment or {}).items()),
            *options,
            image,
            *arguments,
            timeout=_TIMEOUT,
        )
        if until is not None:
            until(made)
        yield made
    finally:
        engine.run_unchecked("rm", "--force", "--volumes", made.name, timeout=_TIMEOUT)
