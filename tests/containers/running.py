"""Containers of the tests: started, asked, and removed."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from scripts.container.engine import Engine
from scripts.serve.management import poll
from scripts.serve.running import unused_ports

# Seconds. A worker is ready after about 5 s on an idle machine.
READY_TIMEOUT = 120.0
ASKED = 60.0
# As Kubernetes runs it (deploy/kubernetes/deployment.yaml).
FENCED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")


@dataclass(frozen=True)
class Answer:
    """A response; its status and its body."""

    status: int
    body: bytes

    def json(self) -> Any:
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
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
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
        return self.status("/ping") == 200

    def wait_until_ready(self) -> None:
        def look() -> bool:
            assert self.runs(), f"the container ended:\n{self.logs()}"
            return self.ready()

        assert poll(look, READY_TIMEOUT), f"it is not ready:\n{self.logs()}"

    def execute(self, *command: str) -> str:
        """What a command inside it prints."""
        return self.engine.run("exec", self.name, *command, timeout=ASKED).stdout

    def state(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.engine.inspect("container", self.name)["State"]
        return found

    def runs(self) -> bool:
        return bool(self.state()["Running"])

    def logs(self) -> str:
        found = self.engine.tried("logs", self.name, timeout=ASKED)
        return found.stdout + found.stderr

    def signal(self, name: str) -> None:
        self.engine.run("kill", f"--signal={name}", self.name, timeout=ASKED)


@contextmanager
def container(  # noqa: PLR0913
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
        engine.tried("rm", "--force", "--volumes", made.name, timeout=ASKED)
