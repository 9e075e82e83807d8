"""When the client retries, when it gives up, and how it reaches the server."""

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from classification_client import (
    Classification,
    Client,
    RejectedError,
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
ERRORS: dict[int | str, tuple[int | str, bytes]] = {
    "died": (500, b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'),
    "400 of nginx": (400, b"<center>The plain HTTP request was sent to HTTPS port</center>"),
}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(dict(self.headers))
        act = self.server.acts.pop(0) if self.server.acts else 200
        self.close_connection = act in {LOST, HALF}
        if act == LOST:
            return
        if act == SLOW:
            time.sleep(0.4)
        status, headers, answer = self.server.response(act, self.path, body)
        self.send_response(status)
        headers["Content-Length"] = str(len(answer) * (2 if act == HALF else 1))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Server(ThreadingHTTPServer):
    """Performs one of `acts` per request, then answers; `requests` has their headers."""

    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answers)
        self.acts: list[int | str] = []
        self.requests: list[dict[str, str]] = []
        self.retry_after: str | None = None

    def response(
        self, act: int | str, _path: str, _body: bytes, /
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body for an act, a path and a request's body."""
        status, answer = ERRORS.get(act, (act, ANSWER))
        headers = {"Location": "/elsewhere"}
        if self.retry_after and act != 200:
            headers["Retry-After"] = self.retry_after
        return status if isinstance(status, int) else 200, headers, answer

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


@pytest.mark.parametrize("act", [503, LOST, 429, HALF, SLOW, 507, "died"])
def test_a_transient_error_is_retried(act: int | str, server: Server) -> None:
    server.acts = [act, 503]
    with client(server, RequestOptions(timeout=0.2)) as sender:
        assert sender.classify(b"image").label == "cat"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 404, 413, 500])
def test_a_permanent_error_is_not_retried(status: int, server: Server) -> None:
    server.acts = [status]
    with client(server) as sender, pytest.raises(RejectedError) as error:
        sender.classify(b"image")
    assert (error.value.code, len(server.requests)) == (status, 1)


def test_a_refused_connection_is_retried_until_the_server_is_back() -> None:
    (port,) = unused_ports(1)

    def serve() -> None:
        time.sleep(0.1)
        with Server(port) as server:
            server.handle_request()

    threading.Thread(target=serve, daemon=True).start()
    with Client(f"http://127.0.0.1:{port}/") as sender:
        assert sender.classify(b"image").label == "cat"


def test_retry_after_is_honored_within_the_patience(server: Server) -> None:
    server.acts, server.retry_after = [503], "1"
    began = time.monotonic()
    with client(server) as sender:
        sender.classify(b"image")
        assert time.monotonic() - began >= 1
        server.acts, server.retry_after = [503], "3600"
        with pytest.raises(UnavailableError, match="status 503"):
            sender.classify(b"image")
    assert len(server.requests) == 3


def test_a_wrong_address_fails_at_once(server: Server) -> None:
    for address, reason in (
        ("http://no-such-host.invalid/x", "resolve|not known|resolution"),
        (f"https://127.0.0.1:{server.server_port}/x", "does not expect TLS: use http://"),
    ):
        began = time.monotonic()
        with Client(address) as sender, pytest.raises(UnavailableError, match=reason) as error:
            sender.classify(b"image")
        assert error.value.is_permanent
        assert time.monotonic() - began < 10  # of a patience of 120


def test_plain_http_for_a_port_with_tls_is_an_error_message(server: Server, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    create = f"openssl req -x509 -nodes -subj /CN=a -keyout {key} -out {certificate}"
    subprocess.run(create.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    sender = client(server, RequestOptions(patience=0))
    with sender, pytest.raises(UnavailableError, match="expects TLS: use https://") as error:
        sender.classify(b"image")
    assert error.value.is_permanent


def test_nginx_error_page_for_plain_http_is_an_error_message(server: Server) -> None:
    server.acts = ["400 of nginx"]
    with client(server) as sender, pytest.raises(RejectedError, match="expects TLS: use https://"):
        sender.classify(b"image")


@pytest.fixture
def proxied(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server is also every proxy of the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    return server


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "[::1]"])
def test_loopback_is_reached_without_a_proxy(host: str, proxied: Server) -> None:
    sender = Client(f"http://{host}:{unused_ports(1)[0]}/x", RequestOptions(patience=0))
    with sender, pytest.raises(UnavailableError, match="refused"):
        sender.classify(b"image")
    assert not proxied.requests


@pytest.mark.usefixtures("proxied")
def test_another_host_is_reached_through_the_proxy() -> None:
    with Client("http://no-such-host.invalid/predictions/cats") as sender:
        assert sender.classify(b"image").label == "cat"


@pytest.mark.parametrize(
    ("act", "reason"),
    [(503, "status 503"), (SLOW, "timed out"), (LOST, "Remote end closed connection")],
)
def test_without_patience_there_is_one_attempt_and_its_reason_is_reported(
    act: int | str, reason: str, server: Server
) -> None:
    server.acts = [act]
    sender = client(server, RequestOptions(patience=0, timeout=0.2))
    with sender, pytest.raises(UnavailableError, match=reason):
        sender.classify(b"image")
    assert len(server.requests) == 1


def test_a_key_that_cannot_be_sent_is_an_error(server: Server) -> None:
    for key in ("two\nlines", "\u2603"):
        with client(server, RequestOptions(key=key)) as sender, pytest.raises(UnavailableError):
            sender.classify(b"image")
    assert not server.requests


def test_netrc_does_not_replace_the_token(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = RequestOptions(key="mine", headers={"Authorization": "Bearer token"})
    with client(server, options) as sender:
        sender.classify(b"image")
    assert server.requests[0]["Authorization"] == "Bearer token"
    assert server.requests[0]["X-API-Key"] == "mine"


def test_the_top_label_of_a_multilabel_answer_precedes_a_more_probable_class() -> None:
    assert Classification.from_response(BODY).labels is None
    several = Classification.from_response({**BODY, "labels": [SEVERAL]})
    assert (several.label, several.best.class_id) == ("dog", "n2")
    none = Classification.from_response({**BODY, "recognized": False, "labels": []})
    assert (none.labels, none.label) == ((), "cat")


@pytest.mark.parametrize(
    "change",
    [
        {"predictions": []},
        {"predictions": [{**PREDICTION, "probability": "high"}]},
        {"labels": [{"label": "dog"}]},
        {"embedding": ["a"]},
    ],
)
def test_a_malformed_answer_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not an answer"):
        Classification.from_response({**BODY, **change})


def test_an_incomplete_address_is_rejected() -> None:
    for address in (
        "foo",
        "127.0.0.1:8080/a",
        "http://",
        "ftp://host/x",
        "http://a:b",
        "http://a..b/",
    ):
        with pytest.raises(ValueError, match="such as http://127"):
            check_address(address)


def test_the_server_decides_how_large_an_image_may_be_and_no_empty_one_is_sent(
    server: Server,
) -> None:
    with client(server) as sender:
        with pytest.raises(RejectedError, match="The image is empty"):
            sender.classify(b"")
        assert not server.requests
        assert sender.classify(bytes(21_000_000)).label == "cat"
        server.acts = [LOST]
        with pytest.raises(RejectedError, match="20 MB unless") as error:
            sender.classify(bytes(21_000_000))
    assert (error.value.code, len(server.requests)) == (413, 2)
