"""Containers of tests and measurements: started, asked, and removed."""

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
ASKED = 60.0
# As Kubernetes runs it (deploy/kubernetes/base/deployment.yaml).
FENCED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")


@dataclass(frozen=True)
class Answer:
    """A response; its status and its body."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Container:
    """A container that runs or ran.

    Attributes:
        ports: the port on loopback for each published port of the container.
    """

    engine: Engine
    name: str
    ports: Mapping[int, int]

    @property
    def url(self) -> str:
        """Of its requests."""
        return f"http://127.0.0.1:{self.ports[8080]}"

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        port: int = 8080,
        timeout: float = ASKED,
    ) -> Answer:
        """GET, or POST with a body; an answer of any status.

        Raises:
            OSError: there was none.
        """
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
        """Status of a GET; None where nobody answers."""
        try:
            return self.ask(path, timeout=5).status
        except OSError:
            return None

    def ready(self) -> bool:
        """Whether it says so."""
        return self.status("/ping") == HTTPStatus.OK

    def wait_until_ready(self) -> None:
        """Waits for that; `AssertionError` with its logs where it ends instead."""

        def look() -> bool:
            assert self.runs(), f"the container ended:\n{self.logs()}"
            return self.ready()

        assert wait_until(look, READY_TIMEOUT), f"it is not ready:\n{self.logs()}"

    def execute(self, *command: str) -> str:
        """What a command inside it prints."""
        return self.engine.run("exec", self.name, *command, timeout=ASKED).stdout

    def state(self) -> Mapping[str, Any]:
        """What the engine knows of its process."""
        found: Mapping[str, Any] = self.engine.inspect("container", self.name)["State"]
        return found

    def runs(self) -> bool:
        """Whether it has not ended."""
        return bool(self.state()["Running"])

    def logs(self) -> str:
        """All that it printed."""
        found = self.engine.run_unchecked("logs", self.name, timeout=ASKED)
        return found.stdout + found.stderr

    def signal(self, name: str) -> None:
        """Sends its first process a signal, such as `TERM`."""
        self.engine.run("kill", f"--signal={name}", self.name, timeout=ASKED)

    def peak_bytes(self) -> int:
        """The most memory at once, files on its tmpfs included; 0 where it is not counted."""
        return self._counted("memory/memory.max_usage_in_bytes memory.peak")

    def used_bytes(self) -> int:
        """Its memory, files on its tmpfs included; 0 where it is not counted."""
        return self._counted("memory/memory.usage_in_bytes memory.current")

    def _counted(self, files: str) -> int:
        """A number that the kernel keeps, in either version of cgroups."""
        look = f"cd /sys/fs/cgroup && cat {files} 2>/dev/null || true"
        return int((self.execute("sh", "-c", look).split() or ["0"])[0])


@contextmanager
def in_hand(
    running: Container, path: str, body: bytes, count: int
) -> Iterator[list[socket.socket]]:
    """Connections whose requests the container has begun to read: it asked for their bodies."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: container\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            address = ("127.0.0.1", running.ports[8080])
            connection = stack.enter_context(socket.create_connection(address, timeout=ASKED))
            connection.sendall(head.encode())
            connections.append(connection)
        for connection in connections:
            said = connection.recv(100)
            assert b"100 Continue" in said, said
        yield connections


def status_on(connection: socket.socket) -> int:
    """The status of the answer that comes there; its body is JSON."""
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
    """Runs a container, and removes it in the end.

    Args:
        engine: docker or podman.
        image: its name.
        arguments: what stands behind the image's name.
        options: what stands before it, beside name, ports and environment.
        environment: variables.
        ports: those of the container that are published on loopback.
        until: called before it is handed out; None to have it as it starts.
    """
    published = dict(zip(ports, unused_ports(len(ports)), strict=True))
    made = Container(engine, f"test-{uuid4().hex[:12]}", published)
    try:
        engine.run(
            "run",
            "--detach",
            f"--name={made.name}",
            *(f"--publish=127.0.0.1:{mine}:{its}" for its, mine in published.items()),
            *(f"--env={key}={value}" for key, value in (environment or {}).items()),
            *options,
            image,
            *arguments,
            timeout=ASKED,
        )
        if until is not None:
            until(made)
        yield made
    finally:
        engine.run_unchecked("rm", "--force", "--volumes", made.name, timeout=ASKED)
