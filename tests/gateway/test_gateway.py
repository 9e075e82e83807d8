"""What a client sees of the gateway, and what it must not see."""

import base64
import json
import re
import struct
import subprocess
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.gateway.config import routes
from scripts.gateway.gateway import Gateway
from scripts.samples import CAT
from tests.gateway.client import Client
from tests.gateway.conftest import KEYS


def _error(answer: requests.Response) -> tuple[int, str]:
    """Status and type of an error in the service's own form."""
    body = answer.json()
    assert (body["success"], body["code"]) == (False, answer.status_code)
    assert body["message"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, body["type"]


def test_the_tutorials_calls_work_but_for_host_and_port(client: Client) -> None:
    url = client.gateway.url
    with CAT.open("rb") as file:
        resp = requests.post(f"{url}/predict", files={"file": file}, timeout=60)
    assert set(resp.json()) >= {"class_id", "class_name"}
    image = CAT.read_bytes()
    r = requests.post(f"{url}/predict", files={"image": image}, timeout=60).json()
    assert r["success"]
    assert [set(row) >= {"label", "probability"} for row in r["predictions"]] == [True] * 5
    curl = _curl("-X", "POST", "-F", f"image=@{CAT}", f"{url}/predict")
    assert curl == r
    # The plain form of a tutorial's page, which has no action, is sent to the page's own address.
    form = requests.post(f"{url}/", files={"file": ("cat.png", image)}, timeout=60)
    assert form.json() == r


@pytest.mark.parametrize(
    "arguments",
    [
        ["-T", str(CAT)],
        ["--data-binary", f"@{CAT}"],
        ["-H", "Content-Type;", "--data-binary", f"@{CAT}"],
        ["-H", "Content-Type:", "--data-binary", f"@{CAT}"],
        ["-H", "Content-Type: text/plain", "--data-binary", f"@{CAT}"],
    ],
)
def test_a_body_of_whatever_type_is_an_image(client: Client, arguments: list[str]) -> None:
    assert _curl(*arguments, f"{client.gateway.url}/predict")["success"] is True


def _curl(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        ["curl", "--silent", *arguments],  # noqa: S607
        capture_output=True,
        check=True,
    )
    body: dict[str, object] = json.loads(done.stdout)
    return body


def test_json_and_the_query_reach_the_handler(client: Client) -> None:
    image = base64.b64encode(CAT.read_bytes()).decode()
    by_json = client.ask("POST", "/predict", json={"image": image, "topk": 2}).json()
    by_query = client.ask("POST", "/predict?topk=2", files={"file": CAT.read_bytes()}).json()
    assert len(by_json["predictions"]) == len(by_query["predictions"]) == 2


def test_kserves_addresses_lead_to_the_handler(client: Client) -> None:
    image = base64.b64encode(CAT.read_bytes()).decode()
    v1 = {"instances": [{"b64": image}]}
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [image]}
    for path, document, member in (
        ("/v1/models/densenet121:predict", v1, "predictions"),
        ("/v1/models/densenet121:explain", v1, "explanations"),
        ("/v2/models/densenet121/infer", {"inputs": [tensor]}, "outputs"),
        ("/v2/models/densenet121/explain", {"inputs": [tensor]}, "outputs"),
    ):
        answer = client.ask("POST", path, json=document)
        assert answer.status_code == HTTPStatus.OK, answer.text
        assert answer.json()[member]
        assert _error(client.ask("GET", path)) == (405, "MethodNotAllowed")


def test_kserves_tensors_pass_in_binary(client: Client) -> None:
    picture = CAT.read_bytes()
    data = struct.pack("<I", len(picture)) + picture
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES"}
    document = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
        "outputs": [{"name": "probability", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(document).encode()
    answer = client.ask(
        "POST",
        "/v2/models/densenet121/infer",
        data=text + data,
        headers={"Inference-Header-Content-Length": str(len(text))},
    )
    assert answer.status_code == HTTPStatus.OK, answer.text
    length = int(answer.headers["Inference-Header-Content-Length"])
    (probability,) = struct.unpack("<f", answer.content[length:])
    expected = client.predict().json()["predictions"][0]["probability"]
    assert probability == pytest.approx(expected, abs=1e-6)


def test_the_handlers_own_errors_pass(client: Client) -> None:
    refusal = client.ask("POST", "/predict", data=b"no picture")
    assert _error(refusal) == (400, "NotAnImage")
    assert _error(client.ask("POST", "/predict", files={"file": b""})) == (400, "EmptyImage")


def test_the_root_goes_to_the_handler(client: Client) -> None:
    """The page, where the archive has one; else the handler's word for a GET."""
    answer = client.ask("GET", "/", headers={"Accept": "text/html"})
    assert answer.headers["x-model-weights"] == "untrained"


def test_which_model_answers_is_known_through_the_gateway(client: Client) -> None:
    answer = client.ask("POST", "/predict")
    assert answer.headers["x-model-name"] == "densenet121"
    assert re.fullmatch(r"1\.0-untrained\+[0-9a-f]{8}", answer.headers["x-model-version"])


def test_nothing_else_of_torchserve_can_be_reached(client: Client) -> None:
    known = {path for path, _, _ in routes("densenet121")}
    for path in (
        "/models",
        "/models/densenet121",
        "/ping",
        "/metrics",
        "/token?type=inference",
        "/invocations",
        "/api-description",
        "/predictions/other",
        "/predictions/densenet121/1.0",
        "/densenet121/predict",
        "/predict/",
        "/predict/../models",
        "/predict/%2e%2e/models",
        "//models",
        "/probe",
        "/error",
    ):
        assert path not in known
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert _error(client.ask(method, path)) == (404, "NotFound"), (method, path)


def test_other_methods_are_refused(client: Client) -> None:
    assert _error(client.ask("GET", "/predict")) == (405, "MethodNotAllowed")
    assert _error(client.ask("DELETE", "/predict")) == (405, "MethodNotAllowed")


def test_headers_that_torchserve_acts_on_do_not_pass(client: Client) -> None:
    answer = client.ask(
        "POST", "/predict", data=CAT.read_bytes(), headers={"describe": "True", "explain": "True"}
    )
    assert answer.json()["success"] is True


def test_an_oversize_body_is_refused_before_a_worker_sees_it(client: Client) -> None:
    answer = client.ask("POST", "/predict", data=bytes(21 << 20))
    assert _error(answer) == (413, "TooLarge")


def test_without_a_key_nobody_gets_in(guarded: Client) -> None:
    assert _error(guarded.predict()) == (401, "Unauthorized")
    assert _error(guarded.predict("wrong-key-0123456789")) == (401, "Unauthorized")
    assert _error(guarded.predict(KEYS["alice"].upper())) == (401, "Unauthorized")
    assert guarded.predict(KEYS["alice"]).status_code == HTTPStatus.OK
    bearer = {"Authorization": f"Bearer {KEYS['bob']}"}
    answer = guarded.ask("POST", "/predict", data=CAT.read_bytes(), headers=bearer)
    assert answer.status_code == HTTPStatus.OK
    assert guarded.ask("GET", "/healthz").status_code == HTTPStatus.OK


def test_over_the_limit_one_client_gets_429_and_another_goes_on(guarded: Client) -> None:
    answers = [guarded.predict(KEYS["alice"]) for _ in range(12)]
    refused = [a for a in answers if a.status_code == HTTPStatus.TOO_MANY_REQUESTS]
    assert refused
    assert _error(refused[0]) == (429, "TooManyRequests")
    assert refused[0].headers["retry-after"] == "1"
    assert guarded.predict(KEYS["bob"]).status_code == HTTPStatus.OK


def test_a_request_keeps_its_id_from_the_client_to_the_workers_log(
    client: Client,
) -> None:
    given = client.ask(
        "POST", "/predict", data=CAT.read_bytes(), headers={"X-Request-Id": "order-4711-abc"}
    )
    assert given.headers["x-request-id"] == "order-4711-abc"
    forged = client.ask(
        "POST", "/predict", data=CAT.read_bytes(), headers={"X-Request-Id": 'a"},{"b":1'}
    )
    made = forged.headers["x-request-id"]
    assert len(made) == 32
    lines = _eventually(lambda: _worker_lines(client.gateway), {"order-4711-abc", made})
    line = lines["order-4711-abc"]
    assert (line["status"], line["outcomes"]) == (200, ["recognized"])
    assert line["bytes_in"] == CAT.stat().st_size
    _eventually(lambda: _lines(_log(client)), {"order-4711-abc", made})


def _log(client: Client) -> Path:
    return Path(client.gateway.options.certificate).parent / "access.log"


def test_the_log_says_what_was_asked_for_where_nginx_answered_itself(guarded: Client) -> None:
    asked = [
        ("GET", "/nowhere", 404),
        ("POST", "/predict", 401),
        ("DELETE", "/predict", 405),
        ("POST", "/sign-in", 403),
    ]
    for number, (method, path, status) in enumerate(asked):
        answer = guarded.ask(
            method, f"{path}?key=secret", headers={"X-Request-Id": f"mistake-{number}"}
        )
        assert answer.status_code == status
    lines = _eventually(lambda: _lines(_log(guarded)), {f"mistake-{n}" for n in range(4)})
    logged = [lines[f"mistake-{number}"] for number in range(4)]
    assert [(line["method"], line["path"], line["status"]) for line in logged] == asked
    assert "secret" not in _log(guarded).read_text()


def _worker_lines(gateway: Gateway) -> dict[str, Any]:
    logs = [Path(node.run_dir) / "logs" / "requests.log" for node in gateway.nodes]
    return {request_id: line for log in logs for request_id, line in _lines(log).items()}


def _lines(log: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {line["id"]: line for line in lines}


def _eventually(read: Callable[[], dict[str, Any]], ids: set[str]) -> dict[str, Any]:
    """Logs are written by threads of their own, and nginx's once a second."""
    deadline = time.monotonic() + 10
    while not ids <= (lines := read()).keys():
        assert time.monotonic() < deadline, f"{ids} are not in the log"
        time.sleep(0.1)
    return lines
