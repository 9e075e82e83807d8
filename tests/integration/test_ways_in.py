"""Every way in that the README names, against the real server."""

import base64
import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import psutil
import pytest
import requests
from PIL import Image

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve import commands, management
from scripts.serve.management import poll, ready_workers, scale
from scripts.serve.running import HOST, Running, free_ports
from scripts.serve.server import start, stop
from scripts.terminal import UserError
from tests.pictures import encode

TIMEOUT = 60
CAT_BYTES = CAT.read_bytes()
FLOWER_BYTES = PHOTOGRAPHS[-1].read_bytes()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def expected(running: Running) -> dict[str, Any]:
    """The cat's answer."""
    answer = requests.post(running.predictions_url, files={"file": CAT_BYTES}, timeout=TIMEOUT)
    body: dict[str, Any] = answer.json()
    assert body["success"] is True
    return body


@pytest.mark.parametrize(
    "content_type",
    ["", "image/png", "image/jpeg", "application/octet-stream", "text/plain", "nonsense"],
)
def test_a_raw_body_of_any_content_type(
    running: Running, expected: dict[str, Any], content_type: str
) -> None:
    answer = requests.put(
        running.predictions_url,
        data=CAT_BYTES,
        headers={"Content-Type": content_type} if content_type else {},
        timeout=TIMEOUT,
    )
    assert answer.json() == expected


def test_a_chunked_upload(running: Running, expected: dict[str, Any]) -> None:
    pieces = (CAT_BYTES[i : i + 10_000] for i in range(0, len(CAT_BYTES), 10_000))
    answer = requests.post(running.predictions_url, data=pieces, timeout=TIMEOUT)
    assert answer.json() == expected


def test_a_query_may_hold_the_options(running: Running, expected: dict[str, Any]) -> None:
    url = running.predictions_url.replace("/predictions/densenet121", "/densenet121/predict")
    answer = requests.post(
        url,
        params={"topk": "3", "threshold": "0.99", "unknown": "x"},
        data=CAT_BYTES,
        headers={"Content-Type": "image/png"},
        timeout=TIMEOUT,
    ).json()
    assert answer["predictions"] == expected["predictions"][:3]
    assert answer["recognized"] is False


def test_json_with_base64(running: Running, expected: dict[str, Any]) -> None:
    document = {"image": in_base64(CAT_BYTES), "topk": 3}
    # As a browser's fetch announces a string.
    text = {"Content-Type": "text/plain;charset=UTF-8"}
    announced = {"Content-Type": "application/json; charset=utf-8"}
    for headers in (announced, text, {"Content-Type": "x/y"}):
        answer = requests.post(
            running.predictions_url, data=json.dumps(document), headers=headers, timeout=TIMEOUT
        )
        assert answer.json()["predictions"] == expected["predictions"][:3]


def test_kserve_v1(running: Running, expected: dict[str, Any]) -> None:
    instances = [{"b64": in_base64(CAT_BYTES)}, {"b64": "%"}, {"b64": in_base64(FLOWER_BYTES)}]
    answer = requests.post(running.predictions_url, json={"instances": instances}, timeout=TIMEOUT)
    predictions = answer.json()["predictions"]
    assert answer.status_code == 200
    assert [p["success"] for p in predictions] == [True, False, True]
    assert predictions[0]["predictions"] == expected["predictions"]
    assert predictions[1]["type"] == "BadRequest"


def test_kserve_v2(running: Running, expected: dict[str, Any]) -> None:
    tensor = {
        "name": "images",
        "shape": [2],
        "datatype": "BYTES",
        "data": [in_base64(CAT_BYTES), in_base64(FLOWER_BYTES)],
    }
    answer = requests.post(
        running.predictions_url, json={"id": "my-id", "inputs": [tensor]}, timeout=TIMEOUT
    ).json()
    assert answer["id"] == "my-id"
    assert answer["model_name"] == "densenet121"
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs["class_id"][0] == (expected["class_id"] or "")
    assert outputs["probability"][0] == expected["probability"]
    assert json.loads(outputs["result"][0])["predictions"] == expected["predictions"]
    assert len(outputs["result"]) == 2


def bytes_tensor(*pictures: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures)


def v2_url(running: Running) -> str:
    return f"http://{HOST}:{running.ports.inference}/v2/models/densenet121/infer"


def test_kserve_v2_in_binary(running: Running, expected: dict[str, Any]) -> None:
    data = bytes_tensor(CAT_BYTES, FLOWER_BYTES)
    document = {
        "inputs": [
            {
                "name": "images",
                "shape": [2],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(data)},
            }
        ],
        "outputs": [
            {"name": "probability", "parameters": {"binary_data": True}},
            {"name": "class_id", "parameters": {"binary_data": False}},
        ],
    }
    text = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = requests.post(v2_url(running), data=text + data, headers=headers, timeout=TIMEOUT)
    length = int(answer.headers["Inference-Header-Content-Length"])
    probability, class_id = json.loads(answer.content[:length])["outputs"]
    assert class_id["data"][0] == (expected["class_id"] or "")
    assert probability["parameters"] == {"binary_data_size": 8}
    first, _ = struct.unpack("<2f", answer.content[length:])
    assert first == pytest.approx(expected["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("more", "word"),
    [({"shape": [2]}, "shape"), ({"outputs": [{"name": "x"}]}, "outputs"), ({"id": []}, "id")],
)
def test_kserve_v2_refuses_with_an_error_member(
    running: Running, more: dict[str, Any], word: str
) -> None:
    tensor = {"name": "images", "datatype": "BYTES", "data": [in_base64(CAT_BYTES)]}
    document = {"inputs": [{**tensor, "shape": more.pop("shape", [1])}], **more}
    answer = requests.post(v2_url(running), json=document, timeout=TIMEOUT)
    assert answer.status_code == 400
    assert word in answer.json()["error"]


def test_five_images_of_which_two_are_bad(running: Running, expected: dict[str, Any]) -> None:
    files = {
        "1": ("cat.png", CAT_BYTES, "image/png"),
        "2": ("cut.png", CAT_BYTES[:5000], "image/png"),
        "3": ("flower.jpg", FLOWER_BYTES, "image/jpeg"),
        "4": ("notes.pdf", b"%PDF-1.7", "application/pdf"),
        "5": ("wrong-name.heic", CAT_BYTES, "image/heic"),
    }
    answer = requests.post(running.predictions_url, files=files, timeout=TIMEOUT).json()
    outcomes = [(r["name"], r.get("type", "ok")) for r in answer["results"]]
    assert outcomes == [
        ("1", "ok"),
        ("2", "DamagedImage"),
        ("3", "ok"),
        ("4", "UnsupportedFormat"),
        ("5", "ok"),
    ]
    assert answer["success"] is False
    assert answer["results"][0]["predictions"] == expected["predictions"]
    assert answer["results"][4]["predictions"] == expected["predictions"]


def test_two_parts_of_one_name_are_not_silently_one(running: Running) -> None:
    answer = requests.post(
        running.predictions_url,
        files=[("file", ("1.png", CAT_BYTES)), ("file", ("2.png", FLOWER_BYTES))],
        timeout=TIMEOUT,
    )
    assert answer.status_code == 400
    assert answer.json()["type"] == "RepeatedPart"


@pytest.mark.parametrize("client", ["curl", "requests", "httpx"])
def test_a_lost_part_is_noticed_above_the_bound_that_the_readme_names(
    running: Running, client: str, tmp_path: Path
) -> None:
    """1.4 kB for a form of one file: two small icons of one name are not silently one."""
    icon = encode(Image.effect_noise((40, 40), 80), "PNG")
    assert 1_400 < len(icon) < 2_000
    once, twice = [("file", ("1.png", icon))], [("file", ("1.png", icon))] * 2
    for files, status in ((once, 200), (twice, 400)):
        answer = send(client, running.predictions_url, files, tmp_path)
        assert ("RepeatedPart" in answer) is (status == 400), answer


@pytest.mark.parametrize("client", ["curl", "requests", "httpx"])
@pytest.mark.parametrize("file_name", ["x" * 251 + ".png", "\u732b" * 83 + ".png"])
def test_a_long_file_name_is_no_lost_part(
    running: Running, client: str, file_name: str, tmp_path: Path
) -> None:
    files = [(part, (file_name, CAT_BYTES)) for part in ("a", "b", "c")]
    answer = send(client, running.predictions_url, files, tmp_path)
    assert [r["name"] for r in json.loads(answer)["results"]] == ["a", "b", "c"]


def send(client: str, url: str, files: list[tuple[str, tuple[str, bytes]]], folder: Path) -> str:
    """Sends a form as a client's own code writes it."""
    if client == "requests":
        return requests.post(url, files=files, timeout=TIMEOUT).text
    if client == "httpx":
        return httpx2.post(url, files=files, timeout=TIMEOUT).text
    arguments = []
    for index, (part, (file_name, content)) in enumerate(files):
        path = folder / f"{index}.png"
        path.write_bytes(content)
        arguments += ["-F", f"{part}=@{path};filename={file_name}"]
    return curl(*arguments, url)


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@pytest.mark.parametrize("name", ["explain", "describe", "Accept"])
def test_a_file_named_as_a_header_is_an_image(
    running: Running, expected: dict[str, Any], name: str
) -> None:
    files = {name: ("cat.png", CAT_BYTES, "image/png")}
    answer = requests.post(
        running.predictions_url, files=files, headers={"explain": "no"}, timeout=TIMEOUT
    )
    assert answer.json() == expected


def test_a_form_with_a_forgotten_at_sign_is_told_so(running: Running) -> None:
    answer = requests.post(running.predictions_url, data={"file": "cat.jpg"}, timeout=TIMEOUT)
    assert answer.status_code == 400
    assert "file=@" in answer.json()["message"]
    # Who uses no curl is not told of it.
    answer = requests.post(running.predictions_url, data=b"cat.jpg", timeout=TIMEOUT)
    assert answer.json()["type"] == "NotAnImage"
    assert "curl" not in answer.json()["message"]


def test_json_without_its_header_is_told_of_it(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"image": in_base64(CAT_BYTES)}))
    refusal = json.loads(curl("-d", f"@{path}", running.predictions_url))
    assert (refusal["code"], refusal["type"]) == (400, "BadRequest")
    assert "Content-Type: application/json" in refusal["message"]
    header = "Content-Type: application/json"
    assert json.loads(curl("-H", header, "-d", f"@{path}", running.predictions_url))["success"]


def test_a_file_without_bytes_is_empty(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    for arguments in (("-T", str(path)), ("-F", f"file=@{path}")):
        assert json.loads(curl(*arguments, running.predictions_url))["type"] == "EmptyImage"
    assert json.loads(curl(running.predictions_url))["type"] == "MissingImage"


def test_a_misspelt_option_is_refused_with_the_nearest_name(running: Running) -> None:
    query = running.predictions_url.replace("/predictions/densenet121", "/densenet121/predict")
    document = {"image": in_base64(CAT_BYTES), "treshold": 0.5}
    for answer in (
        requests.post(
            running.predictions_url,
            files={"file": CAT_BYTES},
            data={"treshold": "0.5", "submit": "Upload", "csrf_token": "x"},
            timeout=TIMEOUT,
        ),
        requests.post(
            query,
            params={"treshold": "0.5"},
            data=CAT_BYTES,
            headers={"Content-Type": "image/png"},
            timeout=TIMEOUT,
        ),
        requests.post(running.predictions_url, json=document, timeout=TIMEOUT),
    ):
        assert answer.status_code == 422
        assert answer.json()["type"] == "InvalidOption"
        assert "did you mean threshold?" in answer.json()["message"]


def test_a_client_of_predictions_gets_no_description(running: Running) -> None:
    host = f"http://{HOST}:{running.ports.inference}"
    describe = {"describe": "True"}
    for path in ("predictions/densenet121", "densenet121/predict", "v1/models/densenet121:predict"):
        for content_type in ("", "application/x-www-form-urlencoded", "multipart/form-data; x"):
            headers = describe | ({"Content-Type": content_type} if content_type else {})
            answer = requests.post(f"{host}/{path}", headers=headers, timeout=TIMEOUT)
            assert "weights_sha256" not in answer.text
    described = requests.get(running.model_url, params={"customized": "true"}, timeout=TIMEOUT)
    assert "weights_sha256" in described.json()[0]["customizedMetadata"]


def test_an_answer_above_the_frontends_limit_is_refused(
    running: Running, one_worker: psutil.Process
) -> None:
    """It would end the worker: names of parts come back with the results."""
    files = {letter * 3_500_000: ("x.png", CAT_BYTES, "image/png") for letter in "ab"}
    answer = requests.post(running.predictions_url, files=files, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()["type"]) == (413, "AnswerTooLarge")
    assert one_worker.is_running()
    answer = requests.post(running.predictions_url, data=CAT_BYTES, timeout=TIMEOUT)
    assert answer.status_code == 200


def test_a_get_says_how_to_send_an_image(running: Running) -> None:
    for accept in ("*/*", "text/html;q=0, */*"):
        headers = {"Accept": accept}
        answer = requests.get(running.predictions_url, headers=headers, timeout=TIMEOUT)
        assert answer.status_code == 400
        assert "curl -T" in answer.json()["message"]


def test_a_get_from_a_browser_is_the_page_wherever_it_may_look(running: Running) -> None:
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    for path in ("predictions/densenet121", "explanations/densenet121", "densenet121/predict?a=b"):
        url = f"http://{HOST}:{running.ports.inference}/{path}"
        answer = requests.get(url, headers={"Accept": accept}, timeout=TIMEOUT)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.text.startswith("<!doctype html>")


@pytest.fixture(scope="module")
def grpc_server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that was asked for gRPC; the tests end its workers."""
    folder = tmp_path_factory.mktemp("grpc")
    running = start(archive, free_ports(), 1, folder, grpc=True)
    yield running
    stop(running, folder)


def test_grpc_predictions(
    grpc_server: Running, expected: dict[str, Any], stubs: tuple[Any, Any]
) -> None:
    messages, services = stubs
    with grpc.insecure_channel(f"{HOST}:{grpc_server.ports.grpc_inference}") as channel:
        client = services.InferenceAPIsServiceStub(channel)
        request = messages.PredictionsRequest(
            model_name="densenet121", input={"data": CAT_BYTES, "topk": b"2"}
        )
        answer = json.loads(client.Predictions(request, timeout=TIMEOUT).prediction)
        assert answer["predictions"] == expected["predictions"][:2]

        bad = messages.PredictionsRequest(model_name="densenet121", input={"data": b"text"})
        # TorchServe has no status for it: over gRPC the body tells.
        refusal = json.loads(client.Predictions(bad, timeout=TIMEOUT).prediction)
        assert (refusal["success"], refusal["code"]) == (False, 400)


@pytest.mark.slow
def test_a_worker_that_a_grpc_stream_ended_is_not_believed_to_be_ready(
    grpc_server: Running,
    stubs: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Why gRPC is off unless asked for. Goes last: it leaves nothing that answers."""
    messages, services = stubs
    request = messages.PredictionsRequest(
        model_name="densenet121", input={"data": CAT_BYTES}, sequence_id="1"
    )
    with grpc.insecure_channel(f"{HOST}:{grpc_server.ports.grpc_inference}") as channel:
        client = services.InferenceAPIsServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            list(client.StreamPredictions2(iter([request]), timeout=TIMEOUT))
    assert poll(lambda: ready_workers(grpc_server) == 0, TIMEOUT)
    (worker,) = management.model_status(grpc_server)["workers"]
    assert worker["status"] == "READY", "this is what TorchServe says of it"

    monkeypatch.setattr(commands, "require_running", lambda: grpc_server)
    commands.status_command()
    shown = capsys.readouterr().out
    assert "ended" in shown
    assert "READY" not in shown
    assert "1 worker(s) that TorchServe counts as ready have ended" in shown

    monkeypatch.setattr(management, "REPLACED_WITHIN", 1.0)
    with pytest.raises(UserError, match=r"counts 1 worker\(s\), of which 0 live"):
        scale(grpc_server, 1)
