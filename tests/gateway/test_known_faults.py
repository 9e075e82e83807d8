"""docs/known-faults.md: what TorchServe's frontend does wrong, and that the gateway stops it.

Each fault is shown on a node directly, so that the page is true, and then asked of the gateway.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import faults
from scripts.gateway.gateway import Gateway
from scripts.samples import CAT
from scripts.serve.running import Running
from tests.gateway.raw import exchange, request, statuses

PAGE = Path("docs/known-faults.md")
PREDICTIONS = "/predictions/densenet121"
PICTURE = CAT.read_bytes()


@dataclass(frozen=True)
class Both:
    """The same bytes for a node and for the gateway before it."""

    node: Running
    gateway: Gateway

    def ask_node(self, *requests: bytes, patience: float = 20.0) -> bytes:
        """To the frontend; this one asks for no token."""
        return exchange(self.node.ports.inference, b"".join(requests), patience=patience)

    def ask_gateway(self, *requests: bytes) -> bytes:
        """To nginx."""
        return exchange(self.gateway.options.http_port, b"".join(requests))


@pytest.fixture
def both(cluster: Gateway, running: Running) -> Both:
    return Both(running, cluster)


def _ids(received: bytes) -> list[str]:
    return [m.decode() for m in re.findall(rb"(?i)x-request-id: (\S+)", received)]


def _refused(received: bytes) -> int:
    """The status of the one answer, which must be an error in the service's own form."""
    (status,) = statuses(received)
    body = json.loads(received.split(b"\r\n\r\n", 1)[1])
    assert (body["success"], body["code"]) == (False, status)
    return status


def _form(*parts: tuple[str, bytes]) -> bytes:
    """A form with headers of parts as given."""
    written = [f"--x\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts]
    kind = "Content-Type: multipart/form-data; boundary=x"
    return request(f"POST {PREDICTIONS}", b"".join(written) + b"--x--\r\n", headers=[kind])


def test_answers_to_pipelined_requests_come_in_order(both: Both) -> None:
    asked = [f"pipelined-{number}" for number in range(6)]
    requests = [
        request(f"POST {PREDICTIONS}", PICTURE, headers=[f"X-Request-Id: {name}"])
        if number % 2 == 0
        else request("GET /ping", headers=[f"X-Request-Id: {name}"])
        for number, name in enumerate(asked)
    ]
    direct = both.ask_node(*requests)
    assert direct.index(b"Healthy") < direct.index(b"predictions"), "the first was answered first"
    received = both.ask_gateway(*requests)
    assert statuses(received) == [200, 404] * 3
    assert _ids(received) == asked


def test_a_length_beside_chunks_is_refused(both: Both) -> None:
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PICTURE), PICTURE)
    both_ways = ["Transfer-Encoding: chunked", "Content-Length: 5"]
    smuggled = request(f"POST {PREDICTIONS}", chunked, headers=both_ways, length=False)
    assert statuses(both.ask_node(smuggled)) == [200]
    assert _refused(both.ask_gateway(smuggled)) == 400


@pytest.mark.parametrize(
    "head",
    [
        "Content-Disposition: form-data",
        "Content-Disposition: form-data; name",
        "Content-Type: image/png",
        "Content-Disposition: form-data; name=file; filename=a\r\nContent-Type: a/b; charset=none",
    ],
)
def test_a_malformed_form_is_the_clients_mistake(both: Both, head: str) -> None:
    form = _form((head, PICTURE))
    assert statuses(both.ask_node(form)) == [500]
    faults.wait_for(lambda: statuses(both.ask_gateway(form)) == [400])
    assert _refused(both.ask_gateway(form)) == 400


@pytest.mark.parametrize("line", ["OPTIONS *", "GET *", "CONNECT example.org:443"])
def test_targets_of_proxies_are_refused(both: Both, line: str) -> None:
    assert statuses(both.ask_node(request(line))) == [500]
    assert _refused(both.ask_gateway(request(line))) == 400


@pytest.mark.parametrize("method", ["TRACE", "DELETE", "NONSENSE"])
def test_methods_that_do_not_exist_are_refused(both: Both, method: str) -> None:
    # A worker gets it, and says which image is missing or empty.
    assert b"Image" in both.ask_node(request(f"{method} {PREDICTIONS}"))
    assert _refused(both.ask_gateway(request(f"{method} {PREDICTIONS}"))) == 405


def test_a_negative_length_is_answered(both: Both) -> None:
    sent = request(f"POST {PREDICTIONS}", b"abc", headers=["Content-Length: -5"], length=False)
    assert both.ask_node(sent, patience=5) == b""
    assert _refused(both.ask_gateway(sent)) == 400


@pytest.mark.parametrize(
    "line", ["OPTIONS /", "GET /models", "GET /api-description", "GET /metrics", "GET /ping"]
)
def test_nothing_tells_about_the_server(both: Both, line: str) -> None:
    assert _refused(both.ask_gateway(request(line))) in {404, 405}


def test_a_picture_sent_as_curls_data_binary_does_is_read(both: Both) -> None:
    kind = ["Content-Type: application/x-www-form-urlencoded"]
    sent = request(f"POST {PREDICTIONS}", PICTURE, headers=kind)
    assert statuses(both.ask_node(sent)) == [500]
    assert statuses(both.ask_gateway(sent)) == [200]


@pytest.mark.parametrize("header", ["describe: True", "explain: True"])
def test_a_clients_header_does_not_choose_what_is_answered(both: Both, header: str) -> None:
    sent = request(f"POST {PREDICTIONS}", PICTURE, headers=[header])
    assert b'"predictions"' in both.ask_gateway(sent)


def test_every_fault_of_the_page_has_its_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named
    assert named <= set(globals())
