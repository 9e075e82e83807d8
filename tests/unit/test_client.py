"""When the client retries and when it gives up, at a server that does as it is told."""

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
)
from classification_client.printing import Format, print_rest, show
from classification_client.results import Row

PREDICTION = {"label": "cat", "probability": 0.5, "class_id": "n1", "class_index": 0}
SEVERAL = {**PREDICTION, "label": "dog", "class_id": "n2", "class_index": 1}
ANSWER = json.dumps({"predictions": [PREDICTION], "recognized": True}).encode()
LOST, HALF, SLOW = "loses the connection", "half an answer", "slow"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(dict(self.headers))
        act = self.server.acts.pop(0) if self.server.acts else 200
        self.close_connection = act in {LOST, HALF}
        if act == LOST:
            return
        if act == SLOW:
            time.sleep(1)
        self.send_response(act if isinstance(act, int) else 200)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(ANSWER) * (2 if act == HALF else 1)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Server(ThreadingHTTPServer):
    """Does what `acts` says, one for each request, then answers; `asked` has each one's headers."""

    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.acts: list[int | str] = []
        self.asked: list[dict[str, str]] = []

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
    server.acts = [503, LOST, 429, HALF, SLOW]
    with client(server, RequestOptions(timeout=0.5)) as asking:
        assert asking.classify(b"image").label == "cat"
    assert len(server.asked) == 6


@pytest.mark.parametrize("status", [302, 404, 413, 500])
def test_a_permanent_error_is_not_retried(status: int, server: Server) -> None:
    server.acts = [status]
    with client(server) as asking, pytest.raises(RefusedError) as refused:
        asking.classify(b"image")
    assert (refused.value.code, len(server.asked)) == (status, 1)


@pytest.mark.parametrize(
    ("act", "reason"),
    [(503, "status 503"), (SLOW, "timed out"), (LOST, "Remote end closed connection")],
)
def test_without_patience_there_is_one_try_and_its_own_reason(
    act: int | str, reason: str, server: Server
) -> None:
    server.acts = [act]
    asking = client(server, RequestOptions(patience=0, timeout=0.5))
    try:
        int("a mistake that the caller is handling")
    except ValueError:
        with asking, pytest.raises(UnavailableError, match=reason):
            asking.classify(b"image")
    assert len(server.asked) == 1


@pytest.mark.parametrize("key", ["two\nlines", "\u2603"])
def test_a_key_that_cannot_be_sent_is_told(key: str, server: Server) -> None:
    with client(server, RequestOptions(key=key)) as asking, pytest.raises(UnavailableError):
        asking.classify(b"image")
    assert not server.asked


def test_a_token_is_not_replaced_by_what_the_user_has_for_other_servers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = RequestOptions(key="mine", headers={"Authorization": "Bearer token"})
    with client(server, options) as asking:
        asking.classify(b"image")
    assert server.asked[0]["Authorization"] == "Bearer token"
    assert server.asked[0]["X-API-Key"] == "mine"


def test_the_first_label_is_the_answer_though_another_class_is_more_probable() -> None:
    body = {"predictions": [PREDICTION], "recognized": True}
    assert Classification.from_answer(body).labels is None
    several = Classification.from_answer({**body, "labels": [SEVERAL]})
    assert (several.label, several.best.class_id) == ("dog", "n2")
    none = Classification.from_answer({**body, "recognized": False, "labels": []})
    assert (none.labels, none.label) == ((), "cat")
    for labels in ("dog", [{"label": "dog"}]):
        with pytest.raises(ValueError, match="no"):
            Classification.from_answer({**body, "labels": labels})


def test_what_is_printed_has_every_label(capsys: pytest.CaptureFixture[str]) -> None:
    body = {"predictions": [PREDICTION], "recognized": True, "labels": [SEVERAL]}
    row = Row("a.png", Classification.from_answer(body))
    print_rest([row], Format.TEXT)
    assert capsys.readouterr().out == "labels: dog\n1. cat: 0.5000\n2. dog: 0.5000\n"
    print_rest([row], Format.TABLE)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a.png" in line]
    assert ("dog" in line, "cat" in line) == (True, False)
    assert isinstance(row.answer, Classification)
    show("a.png", row.answer)
    lines = [line for line in capsys.readouterr().out.splitlines() if "0.5" in line]
    assert [("cat" in line, "dog" in line, "yes" in line) for line in lines] == [
        (True, False, False),
        (False, True, True),
    ]
