"""Which failures of an upstream are retried, on which upstream, and which error clients get.

The upstreams are stubs that fail as TorchServe does.
"""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.gateway import options
from scripts.serve.running import unused_ports
from tests.gateway.cluster import Gateway, error, free_options, gateway

# Seconds; shorter than the shortest TIMEOUT, and longer than nginx retries after a timeout.
_TIMEOUT = 6
LENGTH = "Inference-Header-Content-Length"
TYPES = {413: "TooLarge", 500: "InternalError", 503: "ServiceUnavailable"}
FORM = {"files": {"file": b"image"}}


class Upstream(ThreadingHTTPServer):
    """A stub that responds with the next status; 200 when none is left.

    Attributes:
        statuses: of the next responses; 0 closes the connection, 1 responds after the timeout.
        model: whether responses name the model, as the handler's do and the frontend's do not.
        requests: the paths of all requests with the sizes of their bodies.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.address = f"127.0.0.1:{self.server_port}"
        self.reset()

    def reset(self) -> None:
        """Forget the statuses and requests of an earlier test."""
        self.statuses: list[int] = []
        self.requests: list[tuple[str, int]] = []
        self.model = False


class _Answer(BaseHTTPRequestHandler):
    server: Upstream

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, len(body)))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 0:
            self.close_connection = True
            return
        if status == 1:
            time.sleep(_TIMEOUT + 2)
        self.send_response(200 if status == 1 else status)
        if self.server.model:
            self.send_header("X-Model-Name", "densenet121")
        self.send_header(LENGTH, self.headers.get(LENGTH, ""))
        self.end_headers()
        self.wfile.write(self.server.address.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def upstream(port: int = 0) -> Iterator[Upstream]:
    with Upstream(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def upstreams() -> Iterator[list[Upstream]]:
    with upstream() as first, upstream() as second:
        yield [first, second]


@pytest.fixture
def first(upstreams: list[Upstream]) -> Upstream:
    upstreams[0].reset()
    return upstreams[0]


@pytest.fixture
def second(upstreams: list[Upstream]) -> Upstream:
    upstreams[1].reset()
    return upstreams[1]


@pytest.fixture(scope="module")
def one(upstreams: list[Upstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of the first upstream, by a name that needs no DNS."""
    folder = tmp_path_factory.mktemp("one") / "gateway"
    address = f"localhost:{upstreams[0].server_port}"
    with gateway(free_options(upstreams=address), folder) as started:
        yield started


@pytest.fixture(scope="module")
def two(upstreams: list[Upstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of both upstreams, with a short timeout."""
    folder = tmp_path_factory.mktemp("two") / "gateway"
    addresses = " ".join(each.address for each in upstreams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(options._MIN, "timeout", _TIMEOUT)
        with gateway(free_options(upstreams=addresses, timeout=_TIMEOUT), folder) as started:
            yield started


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("statuses", "status", "attempts"),
    [
        # A transient failure is retried.
        *(([failure], 200, 2) for failure in (0, 500, 502, 507)),
        # A request that may crash workers is retried once.
        ([507, 507], 503, 2),
        ([500, 500], 500, 2),
        ([0, 0], 503, 2),
        # A full queue gets a request only once, and a client's mistake is its own.
        ([503], 503, 1),
        *(([mistake], mistake, 1) for mistake in (400, 413, 415, 422)),
    ],
)
def test_the_only_upstream_gets_a_request_again_after_a_transient_failure(
    one: Gateway,
    first: Upstream,
    statuses: list[int],
    status: int,
    attempts: int,
    *,
    chunked: bool,
) -> None:
    first.statuses = [*statuses]
    body = bytes(300_000)
    sent = iter([body[:100], body[100:]]) if chunked else body
    answer = one.ask("POST", "/predict?topk=2", data=sent, headers={LENGTH: "12"})
    # nginx cannot pass on an upstream's 413 if it enforces the limit while it reads the body.
    if status < 500 and not (status == 413 and chunked):
        assert (answer.status_code, answer.text) == (status, first.address)
        assert answer.headers[LENGTH] == "12"
    else:
        assert error(answer) == (status, TYPES[status])
    if status == 503:
        assert "overloaded" in answer.json()["message"]
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
    assert first.requests == [("/predictions/densenet121", len(body))] * attempts


def test_a_full_queue_sends_a_request_to_another_upstream(
    two: Gateway, first: Upstream, second: Upstream
) -> None:
    first.statuses = [503] * 4
    for _ in range(4):
        assert two.ask("POST", "/predict", data=b"image").text == second.address
    first.statuses, second.statuses = [503] * 4, [503] * 4
    assert error(two.ask("POST", "/predict", data=b"image")) == (503, "ServiceUnavailable")
    assert len(second.requests) == 5


def test_two_upstreams_together_get_a_crashing_request_twice(
    two: Gateway, first: Upstream, second: Upstream
) -> None:
    for server in (first, second):
        server.statuses = [507] * 4
    assert error(two.ask("POST", "/predict", data=b"image")) == (503, "ServiceUnavailable")
    assert len(first.requests + second.requests) == 2


def test_a_timeout_is_not_retried(two: Gateway, first: Upstream, second: Upstream) -> None:
    first.statuses, second.statuses = [1], [1]
    assert error(two.ask("POST", "/predict", data=b"image")) == (504, "Timeout")
    assert len(first.requests + second.requests) == 1


@pytest.mark.slow
def test_an_upload_may_pause_while_a_phone_changes_networks(one: Gateway, first: Upstream) -> None:
    with socket.create_connection(("127.0.0.1", one.options.http_port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
        client.sendall(bytes(100_000))
        time.sleep(15)
        client.sendall(bytes(100_000))
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert first.requests == [("/predictions/densenet121", 200_000)]


def test_a_form_that_the_frontend_cannot_parse_is_the_clients_mistake(
    one: Gateway, first: Upstream
) -> None:
    first.statuses = [500, 500]
    assert error(one.ask("POST", "/predict", **FORM)) == (400, "BadRequest")
    # With X-Model-Name it is the handler's own failure.
    first.statuses, first.model = [500, 500], True
    assert error(one.ask("POST", "/predict", **FORM)) == (500, "InternalError")


def test_an_upstream_that_stops_fails_no_request_and_is_used_again(
    second: Upstream, tmp_path: Path
) -> None:
    def answers() -> set[str]:
        with ThreadPoolExecutor(4) as pool:
            asked = pool.map(lambda _: both.ask("POST", "/predict", data=b"image"), range(20))
        return {answer.text for answer in asked}

    (port,) = unused_ports(1)
    first = f"127.0.0.1:{port}"
    chosen = free_options(upstreams=f"{first} {second.address}")
    with gateway(chosen, tmp_path / "gateway") as both:
        with upstream(port):
            assert answers() == {first, second.address}
        assert answers() == {second.address}
        with upstream(port):
            assert answers() == {first, second.address}


def test_an_upstream_with_an_unknown_name_is_503(tmp_path: Path) -> None:
    unknown = free_options(upstreams="no-such-name.invalid:8080")
    with gateway(unknown, tmp_path / "gateway") as started:
        answer = started.ask("POST", "/predict", data=b"image")
        assert error(answer) == (503, "ServiceUnavailable")
