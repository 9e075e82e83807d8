"""docs/about/torchserve.md: what TorchServe's frontend does wrong, and that the gateway stops it.

Each fault is shown on a node directly, so that the page is true, and then asked of the gateway.
"""

import base64
import json
import re
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.gateway.cluster import Gateway

PAGE = Path("docs/about/torchserve.md")
PREDICTIONS = "/predictions/densenet121"
IMAGE = CAT.read_bytes()


Exchange = Callable[[bytes], bytes]


@pytest.fixture
def node(running: ServerState) -> Exchange:
    """Sends bytes to TorchServe's frontend; this one needs no token."""
    return partial(_exchange, running.ports.inference)


@pytest.fixture
def gateway(client: Gateway) -> Exchange:
    """Sends the same bytes to nginx."""
    return partial(_exchange, client.options.http_port)


def _exchange(port: int, sent: bytes) -> bytes:
    """Send bytes; return all that comes until 1.5 s are quiet or the connection is closed."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(1 << 16):
                received += chunk
                connection.settimeout(1.5)
        except (TimeoutError, ConnectionError):
            pass
    return received


def request(
    line: str, body: bytes = b"", *, headers: Sequence[str] = (), length: bool = True
) -> bytes:
    """Return a request; `length` adds its Content-Length."""
    head = [f"{line} HTTP/1.1", "Host: localhost", *headers]
    if length:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def _refused(received: bytes) -> int:
    """The status of the one answer, which must be an error in the service's own form."""
    (status,) = statuses(received)
    body = json.loads(received.split(b"\r\n\r\n", 1)[1])
    assert (body["success"], body["code"]) == (False, status)
    return status


def _form(head: str) -> bytes:
    """Return a form whose one part has headers as given."""
    body = f"--x\r\n{head}\r\n\r\n".encode() + IMAGE + b"\r\n--x--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x"
    return request(f"POST {PREDICTIONS}", body, headers=[kind])


def test_answers_to_pipelined_requests_come_in_order(node: Exchange, gateway: Exchange) -> None:
    asked = [f"pipelined-{number}" for number in range(6)]
    # Of eight images, so that on a busy machine too the next request has its answer before.
    images = json.dumps({"instances": [{"b64": base64.b64encode(IMAGE).decode()}] * 8}).encode()
    kind = "Content-Type: application/json"
    requests = [
        request(f"POST {PREDICTIONS}", images, headers=[kind, f"X-Request-Id: {name}"])
        if number % 2 == 0
        else request("GET /ping", headers=[f"X-Request-Id: {name}"])
        for number, name in enumerate(asked)
    ]
    direct = node(b"".join(requests))
    assert direct.index(b"Healthy") < direct.index(b"predictions"), "the first was answered first"
    received = gateway(b"".join(requests))
    assert statuses(received) == [200, 404] * 3
    ids = re.findall(rb"(?i)x-request-id: (\S+)", received)
    assert [i.decode() for i in ids] == asked


def test_a_length_beside_chunks_is_refused(node: Exchange, gateway: Exchange) -> None:
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)
    both_ways = ["Transfer-Encoding: chunked", "Content-Length: 5"]
    smuggled = request(f"POST {PREDICTIONS}", chunked, headers=both_ways, length=False)
    assert statuses(node(smuggled)) == [200]
    assert _refused(gateway(smuggled)) == 400


@pytest.mark.parametrize(
    "head",
    [
        "Content-Disposition: form-data",
        "Content-Disposition: form-data; name",
        "Content-Type: image/png",
        "Content-Disposition: form-data; name=file; filename=a\r\nContent-Type: a/b; charset=none",
    ],
)
def test_a_malformed_form_is_the_clients_mistake(
    node: Exchange, gateway: Exchange, head: str
) -> None:
    form = _form(head)
    assert statuses(node(form)) == [500]
    assert _refused(gateway(form)) == 400


@pytest.mark.parametrize("line", ["OPTIONS *", "GET *", "CONNECT example.org:443"])
def test_targets_of_proxies_are_refused(node: Exchange, gateway: Exchange, line: str) -> None:
    assert statuses(node(request(line))) == [500]
    assert _refused(gateway(request(line))) == 400


@pytest.mark.parametrize("method", ["TRACE", "DELETE", "NONSENSE"])
def test_methods_that_do_not_exist_are_refused(
    node: Exchange, gateway: Exchange, method: str
) -> None:
    # A worker gets it, and says which image is missing or empty.
    assert b"Image" in node(request(f"{method} {PREDICTIONS}"))
    assert _refused(gateway(request(f"{method} {PREDICTIONS}"))) == 405


def test_a_negative_length_is_answered(node: Exchange, gateway: Exchange) -> None:
    sent = request(f"POST {PREDICTIONS}", b"abc", headers=["Content-Length: -5"], length=False)
    assert node(sent) == b""
    assert _refused(gateway(sent)) == 400


@pytest.mark.parametrize(
    "line", ["OPTIONS /", "GET /models", "GET /api-description", "GET /metrics", "GET /ping"]
)
def test_nothing_tells_about_the_server(gateway: Exchange, line: str) -> None:
    assert _refused(gateway(request(line))) in {404, 405}


def test_a_picture_sent_as_curls_data_binary_does_is_read(
    node: Exchange, gateway: Exchange
) -> None:
    kind = ["Content-Type: application/x-www-form-urlencoded"]
    sent = request(f"POST {PREDICTIONS}", IMAGE, headers=kind)
    assert statuses(node(sent)) == [500]
    assert statuses(gateway(sent)) == [200]


@pytest.mark.parametrize("header", ["describe: True", "explain: True"])
def test_a_clients_header_does_not_choose_what_is_answered(gateway: Exchange, header: str) -> None:
    sent = request(f"POST {PREDICTIONS}", IMAGE, headers=[header])
    assert b'"predictions"' in gateway(sent)


def test_every_fault_of_the_page_has_its_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named
    assert named <= set(globals())
