"""Nodes that others start and end: containers and pods, found by names, known by answers alone."""

import re
import socket
import threading
import time
from http import HTTPStatus
from pathlib import Path

import requests

from scripts.gateway.gateway import Node
from scripts.gateway.health import STUCK
from scripts.terminal import UserError

_UPSTREAM = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_LARGEST_PORT = 65535
# Failed looks after which the watch takes a node out; one that nobody has asked yet is out.
_UNKNOWN = 2
_CONNECT_TIMEOUT = 2.0
_PING_TIMEOUT = 5.0
# Seconds without a failed question after which a node counts as steady.
_STEADY = 3.0


def read_upstreams(text: str) -> list[tuple[str, int]]:
    """Hosts and ports of `UPSTREAMS`, such as "densenet:8080" or "10.0.0.7:8080 10.0.0.8:8080".

    Raises:
        UserError: one is not HOST:PORT, or there is none.
    """
    found = []
    for word in text.split():
        match = _UPSTREAM.fullmatch(word)
        if match is None or not 0 < int(match["port"]) <= _LARGEST_PORT:
            raise UserError(f"UPSTREAMS must be HOST:PORT with spaces between, got {word!r}.")
        found.append((match["host"].strip("[]"), int(match["port"])))
    if not found:
        raise UserError("UPSTREAMS names no node, as in: UPSTREAMS=densenet:8080")
    return found


def find_nodes(upstreams: str, model: str) -> list[Node]:
    """A node for each address that the names have just now, in a fixed order; maybe none.

    Each is unhealthy until it has answered the watch.

    Args:
        upstreams: see `read_upstreams`.
        model: which model they serve.
    """
    addresses: set[tuple[str, int]] = set()
    for host, port in read_upstreams(upstreams):
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            continue  # a name without an address: none of its containers runs
        addresses.update((str(where[0]), port) for *_, where in found)
    return [_node(host, port, model) for host, port in sorted(addresses)]


def _node(host: str, port: int, model: str) -> Node:
    name = re.sub(r"[^0-9A-Za-z]", "-", f"{host}-{port}")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # Nothing of it is on this machine: its folder and its archive are names only.
    return Node(name, f"{model}.mar", 0, healthy=False, address=address)


class Answers:
    """What the answers of such a node say of it; beside `scripts.gateway.health.Health`.

    First `/ping`, by which the image says that a worker is ready, TorchServe that its frontend
    lives; then the page, which a worker answers without looking at a picture.

    Attributes:
        failures: looks after which it did not seem able to answer, one after the other.
        ready: whether it can answer, however busy it is.
        ended: None: nobody here ends its workers.
    """

    def __init__(self, node: Node) -> None:
        """Args: node, with an address."""
        self.failures = _UNKNOWN
        self.ready = False
        self.ended: tuple[float, bool] | None = None
        self._ping = f"http://{node.address}/ping"
        self._page = f"http://{node.address}/predictions/{Path(node.archive).stem}"
        self._asked: _Question | None = None
        self._answered = self._failed = float("-inf")

    def steady(self) -> bool:
        """Whether no question has failed for some seconds."""
        return time.monotonic() - self._failed > _STEADY

    def look(self, *, own: bool) -> str:  # noqa: ARG002  # as of nodes whose processes are known
        """Looks once.

        Returns:
            "": nothing of it can be ended from here.
        """
        now = time.monotonic()
        asked = self._asked
        if asked is not None and asked.said is not None:
            self._note(asked.said, now)
            asked = None
        if asked is None:
            self._asked = _Question(self._ping, self._page)
        elif now - asked.since >= STUCK:
            self.failures, self._failed, self.ready = self.failures + 1, now, False
        return ""

    def _note(self, said: str, now: float) -> None:
        if said == "answered":
            self.failures, self._answered = 0, now
        elif said != "silent" or now - self._answered >= STUCK:
            self.failures, self._failed = self.failures + 1, now
        # Slow, or refusing a page, it may be busy; what cannot be reached answers nothing.
        self.ready = said != "lost" and now - self._answered < STUCK


class _Question:
    """A request on its way in a thread of its own; `said` is None until it is over."""

    def __init__(self, ping: str, page: str) -> None:
        self.since = time.monotonic()
        self.said: str | None = None
        self._ping, self._page = ping, page
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        try:
            if _fails(self._ping, _PING_TIMEOUT):
                self.said = "lost"
            else:
                self.said = "refused" if _fails(self._page, 2 * STUCK) else "answered"
        except requests.ReadTimeout:
            self.said = "silent"
        except requests.RequestException:
            self.said = "lost"


def _fails(url: str, seconds: float) -> bool:
    answer = requests.get(url, headers={"Accept": "text/html"}, timeout=(_CONNECT_TIMEOUT, seconds))
    return answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
