"""When the client retries, when it gives up, and how it reaches the server."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from classification_client import (
    Classification,
    Client,
    RefusedError,
    RequestOptions,
    UnavailableError,
    check_address,
)
from scripts.serve.running import unused_ports

PREDICTION = {"label": "cat", "probability": 0.5, "class_id": "n1", "class_index": 0}
SEVERAL = {**PREDICTION, "label": "dog", "class_id": "n2", "class_index": 1}
BODY = {"predictions": [PREDICTION], "recognized": True}
ANSWER = json.dumps(BODY).encode()
LOST, HALF, SLOW = "loses the connection", "half an answer", "slow"
DIED = b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(dict(self.headers))
        act = self.server.acts.pop(0) if self.server.acts else 200
        self.close_connection = act in {LOST, HALF}
        if act == LOST:
            return
        if act == SLOW:
            time.sleep(1)
        answer = DIED if act == "died" else ANSWER
        status = 500 if act == "died" else act
        self.send_response(status if isinstance(status, int) else 200)
        self.send_header("Location", "/elsewhere")
        if self.server.retry_after and act != 200:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(answer) * (2 if act == HALF else 1)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Server(ThreadingHTTPServer):
    """Does what `acts` says, one for each request, then answers; `requests` has their headers."""

    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answers)
        self.acts: list[int | str] = []
        self.requests: list[dict[str, str]] = []
        self.retry_after: str | None = None

    def handle_error(self, *_: object) -> None:
        """A client that stopped waiting is no error."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def client(server: Server, options: RequestOptions | None = None) -> Client:
    return Client(f"http://127.0.0.1:{server.server_port}/predictions/cats", options)


def test_a_transient_error_is_retried(server: Server) -> None:
    server.acts = [503, LOST, 429, HALF, SLOW, 507, "died"]
    with client(server, RequestOptions(timeout=0.5)) as sender:
        assert sender.classify(b"image").label == "cat"
    assert len(server.requests) == 8


@pytest.mark.parametrize("status", [302, 404, 413, 500])
def test_a_permanent_error_is_not_retried(status: int, server: Server) -> None:
    server.acts = [status]
    with client(server) as sender, pytest.raises(RefusedError) as refused:
        sender.classify(b"image")
    assert (refused.value.code, len(server.requests)) == (status, 1)


def test_a_refused_connection_is_retried_until_the_server_is_back() -> None:
    (port,) = unused_ports(1)

    def serve() -> None:
        time.sleep(0.5)
        with Server(port) as server:
            server.handle_request()

    threading.Thread(target=serve, daemon=True).start()
    with Client(f"http://127.0.0.1:{port}/") as sender:
        assert sender.classify(b"image").label == "cat"


@pytest.mark.parametrize(("header", "seconds"), [("1", 1), ("0", 0), ("soon", 0)])
def test_retry_after_is_honored(header: str, seconds: int, server: Server) -> None:
    server.acts, server.retry_after = [503], header
    began = time.monotonic()
    with client(server) as sender:
        sender.classify(b"image")
    assert seconds <= time.monotonic() - began < seconds + 0.9
    assert len(server.requests) == 2


def test_a_retry_after_beyond_the_patience_is_not_waited_for(server: Server) -> None:
    server.acts, server.retry_after = [503], "3600"
    with client(server) as sender, pytest.raises(UnavailableError, match="status 503"):
        sender.classify(b"image")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://no-such-host.invalid/x", "resolve|not known|resolution"),
        ("https://127.0.0.1:{}/x", "SSL|TLS|EOF"),
    ],
)
def test_a_wrong_address_fails_at_once(address: str, reason: str, server: Server) -> None:
    began = time.monotonic()
    with (
        Client(address.format(server.server_port)) as sender,
        pytest.raises(UnavailableError, match=reason),
    ):
        sender.classify(b"image")
    assert time.monotonic() - began < 10  # of a patience of 120


PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "[::1]"])
def test_loopback_is_reached_without_a_proxy(
    host: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    sender = Client(f"http://{host}:{unused_ports(1)[0]}/x", RequestOptions(patience=0))
    with sender, pytest.raises(UnavailableError, match="refused"):
        sender.classify(b"image")
    assert not server.requests


def test_another_host_is_reached_through_the_proxy(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Client("http://no-such-host.invalid/predictions/cats") as sender:
        assert sender.classify(b"image").label == "cat"


@pytest.mark.parametrize(
    ("act", "reason"),
    [(503, "status 503"), (SLOW, "timed out"), (LOST, "Remote end closed connection")],
)
def test_without_patience_there_is_one_attempt_and_its_own_reason(
    act: int | str, reason: str, server: Server
) -> None:
    server.acts = [act]
    sender = client(server, RequestOptions(patience=0, timeout=0.5))
    try:
        int("an error that the caller is handling")
    except ValueError:
        with sender, pytest.raises(UnavailableError, match=reason):
            sender.classify(b"image")
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", ["two\nlines", "\u2603"])
def test_a_key_that_cannot_be_sent_is_an_error(key: str, server: Server) -> None:
    with client(server, RequestOptions(key=key)) as sender, pytest.raises(UnavailableError):
        sender.classify(b"image")
    assert not server.requests


def test_a_token_is_not_replaced_by_what_the_user_has_for_other_servers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = RequestOptions(key="mine", headers={"Authorization": "Bearer token"})
    with client(server, options) as sender:
        sender.classify(b"image")
    assert server.requests[0]["Authorization"] == "Bearer token"
    assert server.requests[0]["X-API-Key"] == "mine"


def test_the_first_label_is_the_answer_though_another_class_is_more_probable() -> None:
    assert Classification.from_answer(BODY).labels is None
    several = Classification.from_answer({**BODY, "labels": [SEVERAL]})
    assert (several.label, several.best.class_id) == ("dog", "n2")
    none = Classification.from_answer({**BODY, "recognized": False, "labels": []})
    assert (none.labels, none.label) == ((), "cat")


@pytest.mark.parametrize(
    "body",
    [
        {"up": 1},
        {"predictions": [], "recognized": True},
        {"predictions": [{**PREDICTION, "probability": "high"}], "recognized": True},
        {**BODY, "labels": "dog"},
        {**BODY, "labels": [{"label": "dog"}]},
        {**BODY, "embedding": ["a"]},
    ],
)
def test_anything_else_is_no_answer(body: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not an answer"):
        Classification.from_answer(body)


@pytest.mark.parametrize(
    "address", ["foo", "127.0.0.1:8080/a", "http://", "ftp://host/x", "http://a:b"]
)
def test_what_is_no_address_is_rejected(address: str) -> None:
    with pytest.raises(ValueError, match="such as http://127"):
        check_address(address)


def test_an_empty_image_is_not_sent(server: Server) -> None:
    with client(server) as sender, pytest.raises(RefusedError, match="The image is empty"):
        sender.classify(b"")
    assert not server.requests


def test_the_server_decides_how_large_an_image_may_be(server: Server) -> None:
    with client(server) as sender:
        assert sender.classify(bytes(21_000_000)).label == "cat"
    server.acts = [LOST]
    with client(server) as sender, pytest.raises(RefusedError, match="20 MB unless") as refused:
        sender.classify(bytes(21_000_000))
    assert (refused.value.code, len(server.requests)) == (413, 2)
    sender = Client(f"http://127.0.0.1:{unused_ports(1)[0]}/", RequestOptions(patience=0))
    with sender, pytest.raises(UnavailableError, match="refused"):
        sender.classify(bytes(21_000_000))
