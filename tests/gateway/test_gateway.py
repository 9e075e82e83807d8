"""Requests through the gateway: protocols, errors, logs, and paths that it must not pass on."""

import base64
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import InferenceClient

from scripts.samples import CAT
from scripts.serve.running import ServerState
from tests.gateway.cluster import Gateway, error, wait_for


def test_the_tutorials_calls_get_torchserves_responses(
    client: Gateway, running: ServerState
) -> None:
    image = CAT.read_bytes()
    expected = requests.post(running.predictions_url, files={"file": image}, timeout=60).json()
    assert expected.keys() >= {"success", "class_id", "class_name", "predictions"}
    # A tutorial's HTML form without an action posts to `/`.
    for path, name in (("/predict", "file"), ("/predict", "image"), ("/", "file")):
        assert client.ask("POST", path, files={name: ("cat.png", image)}).json() == expected
    assert _curl("-F", f"image=@{CAT}", f"{client.url}/predict") == expected


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
def test_a_body_of_any_type_is_an_image(client: Gateway, arguments: list[str]) -> None:
    assert _curl(*arguments, f"{client.url}/predict")["success"] is True


def _curl(*arguments: str) -> dict[str, object]:
    command = ["curl", "--silent", *arguments]
    body: dict[str, object] = json.loads(subprocess.check_output(command))
    return body


def test_json_options_in_the_query_and_gzip_reach_the_handler(client: Gateway) -> None:
    image = base64.b64encode(CAT.read_bytes()).decode()
    by_json = client.ask("POST", "/predict", json={"image": image, "topk": 2}).json()
    assert len(by_json["predictions"]) == 2
    for path in ("/predict", "/predictions/densenet121", "/"):
        by_query = client.ask("POST", f"{path}?topk=2", files={"file": CAT.read_bytes()}).json()
        assert len(by_query["predictions"]) == 2
    explained = client.ask(
        *("POST", "/explain?class_name=tabby"),
        data=gzip.compress(CAT.read_bytes()),
        headers={"Accept": "application/json", "Content-Encoding": "gzip"},
    )
    assert explained.json()["class_name"] == "tabby"


def test_a_query_is_passed_on_whole_or_rejected(client: Gateway) -> None:
    for length in (6900, 7100, 15_000):
        answer = client.ask("POST", f"/predict?thresold={'x' * length}", data=CAT.read_bytes())
        assert error(answer) == ((422, "InvalidOption") if length < 7000 else (414, "TooLarge"))


def test_hugging_faces_path_selects_its_protocol(client: Gateway) -> None:
    image = base64.b64encode(CAT.read_bytes()).decode()
    url = f"{client.url}/huggingface/densenet121"
    found = client.ask("POST", "/huggingface/densenet121", json={"inputs": image}).json()
    assert len(found) == 5
    scores = InferenceClient().image_classification(CAT.read_bytes(), model=url, top_k=5)
    assert [{"label": each.label, "score": each.score} for each in scores] == found
    # A client's header does not.
    assert client.predict(**{"X-Protocol": "huggingface"}).json()["success"] is True


def test_the_root_is_the_web_ui_and_headers_name_the_model(client: Gateway) -> None:
    answer = client.ask("GET", "/", headers={"Accept": "text/html"})
    assert answer.headers["x-model-weights"] == "untrained"
    assert answer.headers["x-model-name"] == "densenet121"
    assert re.fullmatch(r"1\.0-untrained\+[0-9a-f]{8}", answer.headers["x-model-version"])


def test_other_paths_of_torchserve_are_unreachable(client: Gateway) -> None:
    paths = """
        /models /models/densenet121 /ping /metrics /token?type=inference /invocations /probe /error
        /api-description /predictions/other /predictions/densenet121/1.0 /densenet121/predict
        /predict/ /predict/../models /predict/%2e%2e/models //models
    """
    for path in paths.split():
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert error(client.ask(method, path)) == (404, "NotFound"), (method, path)


@pytest.mark.parametrize("version", ["1.1", "2"])
@pytest.mark.parametrize("length", ["declared", "unknown"])
def test_an_oversize_upload_gets_413_before_a_worker_sees_it(
    client: Gateway, tmp_path: Path, version: str, length: str
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(21 << 20))
    body = {"declared": str(large), "unknown": "-"}[length]
    shown = "%{http_code} %{http_version} %{content_type} %header{x-model-name}"
    with large.open() as stdin:
        answer = subprocess.check_output(
            [
                *("curl", "--silent", f"--http{version}", "--upload-file", body),
                *("--cacert", client.folder / "certificate.pem"),
                *("--write-out", shown, f"{client.https_url}/predict"),
            ],
            stdin=stdin,
            text=True,
        )
    document, described = answer.rsplit("\n", 1)
    assert json.loads(document)["type"] == "TooLarge"
    assert described == f"413 {version} application/json "


def test_a_request_id_is_in_the_response_and_all_logs(client: Gateway, run_dir: Path) -> None:
    given = client.predict(**{"X-Request-Id": "order-4711-abc"})
    assert given.headers["x-request-id"] == "order-4711-abc"
    forged = client.predict(**{"X-Request-Id": 'a"},{"b":1'}).headers["x-request-id"]
    assert len(forged) == 32
    logged = _logged(run_dir / "logs" / "requests.log", "order-4711-abc", forged)
    outcome = "recognized" if given.json()["recognized"] else "unrecognized"
    assert (logged[0]["status"], logged[0]["outcomes"]) == (200, [outcome])
    assert logged[0]["bytes_in"] == CAT.stat().st_size
    _logged(client.access_log, "order-4711-abc", forged)


def test_the_log_has_nginxs_own_responses_and_no_secrets(keyed: Gateway) -> None:
    asked = [("GET", "/nowhere", 404), ("POST", "/predict", 401), ("DELETE", "/predict", 405)]
    for method, path, status in asked:
        headers = {"X-Request-Id": f"mistake-{status}"}
        assert keyed.ask(method, f"{path}?key=secret", headers=headers).status_code == status
    lines = _logged(keyed.access_log, *(f"mistake-{status}" for *_, status in asked))
    assert [(line["method"], line["path"], line["status"]) for line in lines] == asked
    assert "secret" not in keyed.access_log.read_text()


def _logged(log: Path, *ids: str) -> list[dict[str, Any]]:
    """Wait for the lines of these requests in a log; nginx writes once per second."""

    def lines() -> dict[str, dict[str, Any]]:
        texts = log.read_text().splitlines() if log.exists() else []
        return {line["id"]: line for line in map(json.loads, texts)}

    wait_for(lambda: {*ids} <= lines().keys())
    return [lines()[each] for each in ids]
