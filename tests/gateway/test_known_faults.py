"""The faults of TorchServe's frontend in docs/about/torchserve.md, and the gateway's protection.

Each test shows the fault on TorchServe's own port, then sends the same bytes to the gateway.
"""

import base64
import json
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.gateway.cluster import Gateway

PAGE = Path("docs/about/torchserve.md")
PREDICTIONS = "/predictions/densenet121"
IMAGE = CAT.read_bytes()
CLOSE = "Connection: close"

# Sends bytes and returns what arrives.
Exchange = Callable[..., bytes]


@pytest.fixture
def node(running: ServerState) -> Exchange:
    """Send bytes to TorchServe's frontend; this one needs no token."""
    return partial(_exchange, running.ports.inference)


@pytest.fixture
def gateway(client: Gateway) -> Exchange:
    """Send bytes to nginx."""
    return partial(_exchange, client.options.http_port)


def _exchange(port: int, sent: bytes, until: bytes = b"", timeout: float = 20) -> bytes:
    """Send bytes; return what arrives until `until` or the end of the connection.

    The end may be a reset, or the timeout in seconds.
    """
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection, suppress(OSError):
        connection.sendall(sent)
        while chunk := connection.recv(1 << 16):
            received += chunk
            if until and until in received:
                break
    return received


def request(
    line: str, body: bytes = b"", headers: Sequence[str] = (CLOSE,), *, length: bool = True
) -> bytes:
    """Return a request; `length` adds its Content-Length."""
    own = [f"Content-Length: {len(body)}"] if length else []
    head = [f"{line} HTTP/1.1", "Host: localhost", *headers, *own]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def _rejected(received: bytes) -> int:
    """Return the status of the only response, which must be an error in the service's format."""
    (status,) = statuses(received)
    body = json.loads(received.split(b"\r\n\r\n", 1)[1])
    assert (body["success"], body["code"]) == (False, status)
    return status


def test_responses_to_pipelined_requests_are_in_order(node: Exchange, gateway: Exchange) -> None:
    # Eight images, so that the response to the next request is ready first.
    images = json.dumps({"instances": [{"b64": base64.b64encode(IMAGE).decode()}] * 8}).encode()
    kind = "Content-Type: application/json"
    asked = [f"pipelined-{number}" for number in range(4)]
    ids = [f"X-Request-Id: {name}" for name in asked]
    requests = [
        request(f"POST {PREDICTIONS}", images, [kind, ids[0]]),
        request("GET /ping", headers=[ids[1]]),
        request(f"POST {PREDICTIONS}", images, [kind, ids[2]]),
        request("GET /ping", headers=[ids[3], CLOSE]),
    ]
    direct = node(b"".join(requests[:2]), until=b"predictions")
    assert direct.index(b"Healthy") < direct.index(b"predictions"), "in order"
    received = gateway(b"".join(requests))
    assert statuses(received) == [200, 404] * 2
    answered = re.findall(rb"(?i)x-request-id: (\S+)", received)
    assert [name.decode() for name in answered] == asked


def test_a_content_length_with_chunks_is_rejected(node: Exchange, gateway: Exchange) -> None:
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)
    both_ways = [CLOSE, "Transfer-Encoding: chunked", "Content-Length: 5"]
    smuggled = request(f"POST {PREDICTIONS}", chunked, both_ways, length=False)
    assert statuses(node(smuggled, until=b"predictions")) == [200]
    assert _rejected(gateway(smuggled)) == 400


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
    body = f"--x\r\n{head}\r\n\r\n".encode() + IMAGE + b"\r\n--x--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x"
    form = request(f"POST {PREDICTIONS}", body, [kind, CLOSE])
    assert statuses(node(form)) == [500]
    assert _rejected(gateway(form)) == 400


@pytest.mark.parametrize("line", ["OPTIONS *", "GET *", "CONNECT example.org:443"])
def test_targets_for_proxies_are_rejected(node: Exchange, gateway: Exchange, line: str) -> None:
    assert statuses(node(request(line))) == [500]
    assert _rejected(gateway(request(line))) == 400


@pytest.mark.parametrize("method", ["TRACE", "DELETE", "NONSENSE"])
def test_other_methods_are_rejected(node: Exchange, gateway: Exchange, method: str) -> None:
    # A worker gets the request, and reports a missing or empty image.
    assert b"Image" in node(request(f"{method} {PREDICTIONS}"))
    assert _rejected(gateway(request(f"{method} {PREDICTIONS}"))) == 405


def test_a_negative_content_length_is_rejected(node: Exchange, gateway: Exchange) -> None:
    negative = [CLOSE, "Content-Length: -5"]
    sent = request(f"POST {PREDICTIONS}", b"abc", negative, length=False)
    assert node(sent, timeout=3) == b""
    assert _rejected(gateway(sent)) == 400


@pytest.mark.parametrize("line", ["OPTIONS /", "GET /api-description", "GET /ping"])
def test_the_frontends_own_endpoints_are_unreachable(gateway: Exchange, line: str) -> None:
    assert _rejected(gateway(request(line))) in {404, 405}


def test_an_image_sent_with_curls_data_binary_is_read(node: Exchange, gateway: Exchange) -> None:
    kind = "Content-Type: application/x-www-form-urlencoded"
    sent = request(f"POST {PREDICTIONS}", IMAGE, [kind, CLOSE])
    assert statuses(node(sent)) == [500]
    assert statuses(gateway(sent)) == [200]


@pytest.mark.parametrize("header", ["describe: True", "explain: True"])
def test_a_clients_header_does_not_select_the_response(gateway: Exchange, header: str) -> None:
    sent = request(f"POST {PREDICTIONS}", IMAGE, [header, CLOSE])
    assert b'"predictions"' in gateway(sent)


def test_every_fault_of_the_page_has_its_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named
    assert named <= set(globals())
