"""What nginx asks the watch, over a Unix socket: is a node ready, may this be asked again, what was
counted.

nginx cannot wait, and cannot know why a node failed. Where all its attempts at a request failed it
asks here, with nothing of the request but which nodes it tried and how long that took; the answer
is the name of one of nginx's own locations (`X-Accel-Redirect`), or a 503 for the client.
"""

import json
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Literal, Protocol

from prometheus_client.exposition import CONTENT_TYPE_LATEST

from scripts.gateway.health import STUCK

# Seconds for which a request is held in all, from its first attempt on.
HOLD = 60.0
# nginx follows ten redirects of a request, two for each time that it is held.
_MOST_ROUNDS = 4
# A request at which so many workers failed may be what ends them.
_MOST_WORKED = 6
# So long at least, growing: a node that refuses for a moment gets that moment.
_FIRST_PAUSE = 0.25
# More than this many do not wait at once.
_MOST_WAITING = 1000
_POLL = 0.1

Verdict = Literal["again", "once", "no"]


class Nodes(Protocol):
    """What must be known of the nodes."""

    def ready(self) -> bool:
        """Whether one of them can answer."""
        ...

    def steady(self) -> bool:
        """Whether no worker has ended for some seconds."""
        ...

    def verdict(self, socket: str) -> Verdict:
        """What may become of a request that just failed on the node of this socket."""
        ...


@dataclass(frozen=True)
class Attempts:
    """What nginx tried for one request, as its variables tell.

    Attributes:
        tried: `$upstream_addr`: addresses, those before and after a redirect divided by colons
            between spaces.
        statuses: `$upstream_status` of each; 500 where a worker was at work on the request.
        took: `$upstream_response_time`, the seconds of each.
        node: the addresses that were tried last, where `tried` does not say.
    """

    tried: str
    statuses: str
    took: str
    node: str = ""

    @property
    def last(self) -> str:
        """The address that was tried last."""
        return re.split(r"[, ]+", self.node or self.tried)[-1]

    @property
    def rounds(self) -> int:
        """How often the request was held before."""
        return self.tried.count("watch.sock")

    @property
    def worked(self) -> int:
        """How many workers failed at it."""
        return len(re.findall(r"\b500\b", self.statuses))

    @property
    def seconds(self) -> float:
        """For how long it has been tried and held."""
        return sum(float(number) for number in re.findall(r"\d+\.\d+", self.took))

    @property
    def fell_silent(self) -> bool:
        """Whether a worker had it for so long that it may be what silences workers.

        TorchServe gives such a one up after a minute (`responseTimeout`), and says 500.
        """
        each = zip(_parts(self.statuses), _parts(self.took), strict=False)
        return any(status == "500" and float(took) >= STUCK for status, took in each)


def _parts(variable: str) -> list[str]:
    """What one of nginx's variables says of each attempt."""
    return re.split(r", | : ", variable)


def may_be_sent_again(nodes: Nodes, attempts: Attempts) -> bool:
    """Waits until a request can be sent again; false where it may not, or there is no node in time.

    Args:
        nodes: what is known of the nodes.
        attempts: at this request.
    """
    verdict = nodes.verdict(attempts.last)
    if verdict == "no" or (verdict == "once" and attempts.rounds > 0):
        return False
    if attempts.rounds >= _MOST_ROUNDS or attempts.worked >= _MOST_WORKED:
        return False
    if attempts.fell_silent or attempts.seconds >= HOLD:
        return False
    now = time.monotonic()
    deadline = now + HOLD - attempts.seconds
    time.sleep(min(_FIRST_PAUSE * 2**attempts.rounds, max(0.0, deadline - now)))
    while not nodes.ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, path: Path, nodes: Nodes, metrics: Callable[[], bytes]) -> None:
        path.unlink(missing_ok=True)
        super().__init__(str(path), _Answer)
        self.nodes = nodes
        self.metrics = metrics
        self.places = threading.BoundedSemaphore(_MOST_WAITING)


class _Answer(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Answers nginx."""
        match self.path:
            case "/ready":
                ready = self.server.nodes.ready()
                self._send(HTTPStatus.NO_CONTENT if ready else HTTPStatus.SERVICE_UNAVAILABLE)
            case "/wait":
                self._wait()
            case "/metrics":
                body = self.server.metrics()
                self._send(HTTPStatus.OK, body, {"Content-Type": CONTENT_TYPE_LATEST})
            case _:
                self._send(HTTPStatus.NOT_FOUND)

    def _wait(self) -> None:
        names = ("X-Tried", "X-Statuses", "X-Took", "X-Node")
        said = (self.headers.get(name, "") for name in names)
        attempts, nodes = Attempts(*said), self.server.nodes
        again = False
        if self.server.places.acquire(blocking=False):
            try:
                again = may_be_sent_again(nodes, attempts)
            finally:
                self.server.places.release()
        if again:
            self._send(HTTPStatus.OK, headers={"X-Accel-Redirect": "@again"})
        elif self._is_form() and attempts.worked >= _MOST_WORKED and nodes.steady():
            # No worker has ended: what fails every time is the frontend at the form itself.
            self._refuse(
                HTTPStatus.BAD_REQUEST,
                "BadRequest",
                "The form cannot be read: check the headers of its parts.",
            )
        else:
            request_id = self.headers.get("X-Request-Id", "")
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "ServiceUnavailable",
                "No worker could answer. Ask again in a second; the server's logs have the cause "
                f"under id {request_id}.",
            )

    def _is_form(self) -> bool:
        return self.headers.get("X-Type", "").lower().startswith("multipart/form-data")

    def _refuse(self, status: HTTPStatus, kind: str, message: str) -> None:
        refusal = {"success": False, "code": status, "type": kind, "message": message}
        body = json.dumps(refusal, separators=(",", ":")).encode() + b"\n"
        self._send(status, body, {"Content-Type": "application/json"})

    def _send(
        self, status: HTTPStatus, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # the client has gone, and nginx with it
            self.wfile.write(body)

    def address_string(self) -> str:
        """A Unix socket has no address."""
        return "nginx"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name
        """Nginx logs the requests."""


@contextmanager
def answering(path: Path, nodes: Nodes, metrics: Callable[[], bytes]) -> Iterator[None]:
    """Answers nginx on this socket, in threads of its own."""
    with _Server(path, nodes, metrics) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink(missing_ok=True)
