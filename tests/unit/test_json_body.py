"""JSON bodies of bounded memory."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from handler.protocols.json_body import parse_json
from handler.request import Options, Request

PROGRAM = """
import sys
from pathlib import Path
from handler.errors import BadRequest
from handler.protocols.json_body import parse_json
from handler.request import Options, Request
from tests.costs import kilobytes
body = eval(sys.argv[1])
before = kilobytes("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
try:
    parse_json(Request("id", {"body": body}, {"Content-Type": "application/json"}, Options(5, 0.1)))
except (ValueError, RecursionError, BadRequest):
    pass
print((kilobytes("VmHWM:") - before) * 1024)
"""


@pytest.mark.parametrize(
    "body",
    [
        "b'[' + b'[],' * 7_000_000 + b'1]'",
        "b'[' + b'{},' * 7_000_000 + b'1]'",
        "b'[' * 20_900_000",
        "b'[' + b'1,' * 10_000_000 + b'1]'",
        """b'{"a":"' + b'A' * 20_900_000 + b'"}'""",
        """b'{"a":"' + '\\U0001f600'.encode() + b'A' * 20_900_000 + b'"}'""",
        """b'{"a":' + b'9' * 20_900_000 + b'.5}'""",
    ],
)
@pytest.mark.slow
def test_no_json_body_needs_more_memory_than_a_worker_has(body: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, body],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert int(result.stdout) < 210_000_000


def parse(content: bytes) -> object:
    headers = {"Content-Type": "application/json"}
    body = parse_json(Request("id", {"body": content}, headers, Options(topk=5, threshold=0.1)))
    assert body is not None
    return body.document


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_json_of_16_images_is_read_in_each_encoding(encoding: str) -> None:
    image = base64.b64encode(bytes(1000)).decode()
    document = {"instances": [{"b64": image, "name": "\u732b"}] * 16, "topk": 3}
    assert parse(json.dumps(document, ensure_ascii=False).encode(encoding)) == document
