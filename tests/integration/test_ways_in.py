"""Every documented way to send an image, to a real server."""

import base64
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import psutil
import pytest
import requests
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from benchmarks.known import PHOTOGRAPHS
from scripts.samples import CAT
from scripts.serve import commands, management
from scripts.serve.management import ready_workers, scale, wait_until
from scripts.serve.running import HOST, ServerState
from scripts.terminal import UserError
from tests.images import encode
from tests.served import described, served

TIMEOUT = 60
CAT_BYTES = CAT.read_bytes()
FLOWER_BYTES = PHOTOGRAPHS[-1].read_bytes()


def post(url: str, **content: Any) -> Any:
    return requests.post(url, timeout=TIMEOUT, **content).json()


@pytest.fixture
def host(running: ServerState) -> str:
    return f"http://{HOST}:{running.ports.inference}"


@pytest.fixture(scope="module")
def expected(running: ServerState) -> dict[str, Any]:
    """The response to the cat image."""
    body: dict[str, Any] = post(running.predictions_url, files={"file": CAT_BYTES})
    assert body["success"] is True
    return body


def test_a_body_may_have_any_content_type_and_be_chunked(
    running: ServerState, expected: dict[str, Any]
) -> None:
    for content_type in ("image/png", "text/plain", "nonsense", None):
        headers = {"Content-Type": content_type}
        answer = requests.put(
            running.predictions_url, data=CAT_BYTES, headers=headers, timeout=TIMEOUT
        )
        assert answer.json() == expected
    pieces = (CAT_BYTES[i : i + 10_000] for i in range(0, len(CAT_BYTES), 10_000))
    assert post(running.predictions_url, data=pieces) == expected


def test_options_may_be_in_the_query(host: str, expected: dict[str, Any]) -> None:
    answer = post(
        f"{host}/densenet121/predict",
        params={"topk": "3", "threshold": "0.99", "unknown": "x"},
        data=CAT_BYTES,
        headers={"Content-Type": "image/png"},
    )
    assert answer["predictions"] == expected["predictions"][:3]
    assert answer["recognized"] is False
    url, headers = f"{host}/densenet121/predict?treshold=0.5", {"Content-Type": "image/png"}
    assert post(url, data=CAT_BYTES, headers=headers)["type"] == "InvalidOption"


def test_hugging_faces_client_gets_labels_scores_and_errors(
    host: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    url = f"{host}/predictions/densenet121/1.0-untrained/huggingface"
    client = InferenceClient(timeout=TIMEOUT)
    for options in ({}, {"top_k": 3, "function_to_apply": "softmax"}):
        found = client.image_classification(CAT_BYTES, model=url, **options)
        scores = [(each.label, each.score) for each in found]
        predictions = expected["predictions"][: options.get("top_k")]
        assert scores == [(row["label"], row["probability"]) for row in predictions]
    (tmp_path / "not.png").write_text("text")
    with pytest.raises(HfHubHTTPError) as raised:
        client.image_classification(tmp_path / "not.png", model=url)
    assert raised.value.response.status_code == 400
    assert "not an image" in str(raised.value)


def test_two_corrupt_images_of_five_do_not_fail_the_others(
    running: ServerState, expected: dict[str, Any]
) -> None:
    files = {
        "1": ("cat.png", CAT_BYTES, "image/png"),
        "2": ("cut.png", CAT_BYTES[:5000], "image/png"),
        "3": ("flower.jpg", FLOWER_BYTES, "image/jpeg"),
        "4": ("notes.pdf", b"%PDF-1.7", "application/pdf"),
        "5": ("wrong-name.heic", CAT_BYTES, "image/heic"),
    }
    answer = post(running.predictions_url, files=files, data={"topk": "1"})
    assert [(result["name"], result.get("type", "ok")) for result in answer["results"]] == [
        *(("1", "ok"), ("2", "DamagedImage"), ("3", "ok"), ("4", "UnsupportedFormat"), ("5", "ok"))
    ]
    assert answer["success"] is False
    assert answer["results"][0]["predictions"] == expected["predictions"][:1]
    assert answer["results"][4]["predictions"] == expected["predictions"][:1]


def test_only_repeated_part_names_are_rejected(running: ServerState) -> None:
    """Repeated parts of files above 1.4 kB are noticed, as documented."""

    def send(*files: tuple[str, tuple[str, bytes]]) -> Any:
        return httpx2.post(running.predictions_url, files=[*files], timeout=TIMEOUT).json()

    icon = encode(Image.effect_noise((40, 40), 80))
    assert 1_400 < len(icon) < 2_000
    assert send(("file", ("1.png", icon)))["success"]
    assert send(("file", ("1.png", icon)), ("file", ("2.png", icon)))["type"] == "RepeatedPart"
    for file_name in ("x" * 251 + ".png", "\u732b" * 83 + ".png"):
        answer = send(*((part, (file_name, CAT_BYTES)) for part in "abc"))
        assert [result["name"] for result in answer["results"]] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["explain", "describe", "Accept"])
def test_a_form_field_named_like_a_header_is_an_image(
    running: ServerState, expected: dict[str, Any], name: str
) -> None:
    files = {name: ("cat.png", CAT_BYTES, "image/png")}
    assert post(running.predictions_url, files=files, headers={"explain": "no"}) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("", "MissingImage", "curl -T"),
        ("-H Accept:text/html;q=0,*/*", "MissingImage", "curl -T"),
        ("-F file=cat.png", "NotAnImage", "file=@"),
        ("-d @cat.json", "BadRequest", "Content-Type: application/json"),
        ("-T empty.png", "EmptyImage", ""),
        ("-F file=@empty.png", "EmptyImage", ""),
        ("-F file=@cat.png -F treshold=0.5 -F submit=Upload", "InvalidOption", "mean threshold?"),
        ("-F file=@cat.png -F topk=0", "InvalidOption", "topk must be"),
    ],
)
def test_a_mistake_with_curl_is_explained(
    running: ServerState, arguments: str, error: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(CAT_BYTES)
    document = {"image": base64.b64encode(CAT_BYTES).decode()}
    (tmp_path / "cat.json").write_text(json.dumps(document))
    (tmp_path / "empty.png").touch()
    command = ["curl", "--silent", *arguments.split(), running.predictions_url]
    answer = json.loads(subprocess.check_output(command, cwd=tmp_path))
    assert answer["type"] == error
    assert message in answer["message"]


def test_clients_of_predictions_cannot_get_the_model_description(
    running: ServerState, host: str
) -> None:
    for path in ("predictions/densenet121", "densenet121/predict", "v1/models/densenet121:predict"):
        for content_type in (None, "application/x-www-form-urlencoded", "multipart/form-data; x"):
            headers = {"describe": "True", "Content-Type": content_type}
            answer = requests.post(f"{host}/{path}", headers=headers, timeout=TIMEOUT)
            assert "weights_sha256" not in answer.text
    assert "weights_sha256" in described(running)


def test_a_response_above_the_frontends_limit_is_replaced_by_413(
    running: ServerState, one_worker: psutil.Process
) -> None:
    """It would crash the worker. Part names are repeated in the results."""
    files = {letter * 3_500_000: ("x.png", CAT_BYTES, "image/png") for letter in "ab"}
    answer = requests.post(running.predictions_url, files=files, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()["type"]) == (413, "AnswerTooLarge")
    assert one_worker.is_running()
    assert post(running.predictions_url, data=CAT_BYTES)["success"]


def test_an_explanation_is_a_heat_map_of_the_top_1_class(
    host: str, expected: dict[str, Any]
) -> None:
    best = expected["predictions"][0]
    answer = requests.post(f"{host}/explanations/densenet121", data=CAT_BYTES, timeout=TIMEOUT)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-class-index"] == str(best["class_index"])
    assert answer.headers["x-class-id"] == best["class_id"]
    assert answer.headers["x-class-name"] == best["label"]
    assert float(answer.headers["x-probability"]) == pytest.approx(best["probability"], abs=1e-5)
    assert answer.headers["x-model-weights"] == "untrained"
    with Image.open(io.BytesIO(answer.content)) as image, Image.open(CAT) as cat:
        assert image.size == cat.size
        pixels, original = np.asarray(image.convert("RGB")), np.asarray(cat.convert("L"))
    # Left of the crop there is the photo, gray and dimmed.
    assert np.abs(pixels[:, :80] - original[:, :80, None] * 0.4).max() <= 1


def grpc_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Generate the modules of TorchServe's messages and services as a user generates them."""
    proto = Path(__file__).with_name("inference.proto")
    outputs = (f"--python_out={folder}", f"--grpc_python_out={folder}")
    protoc = (sys.executable, "-m", "grpc_tools.protoc", f"-I{proto.parent}")
    subprocess.run([*protoc, *outputs, str(proto)], check=True)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("inference_pb2"), importlib.import_module("inference_pb2_grpc")


@pytest.mark.slow
def test_grpc_predicts_and_a_worker_that_a_stream_crashed_is_not_counted_as_ready(
    archive: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Streams crash workers, so gRPC is off by default."""
    messages, services = grpc_modules(tmp_path, monkeypatch)

    def request(content: bytes, **more: Any) -> Any:
        data = {"data": content, "topk": b"2"}
        return messages.PredictionsRequest(model_name="densenet121", input=data, **more)

    with served(archive, tmp_path / "run", grpc=True) as server:
        with grpc.insecure_channel(f"{HOST}:{server.ports.grpc_inference}") as channel:
            client = services.InferenceAPIsServiceStub(channel)
            answer = json.loads(client.Predictions(request(CAT_BYTES), timeout=TIMEOUT).prediction)
            assert answer["predictions"] == expected["predictions"][:2]
            # TorchServe has no gRPC status for errors; the body has the status.
            rejected = json.loads(client.Predictions(request(b"text"), timeout=TIMEOUT).prediction)
            assert (rejected["success"], rejected["code"]) == (False, 400)
            stream = iter([request(CAT_BYTES, sequence_id="1")])
            with pytest.raises(grpc.RpcError):
                list(client.StreamPredictions2(stream, timeout=TIMEOUT))
        assert wait_until(lambda: ready_workers(server) == 0, TIMEOUT)
        (worker,) = management.model_status(server)["workers"]
        assert worker["status"] == "READY", "TorchServe reports the crashed worker as ready"

        monkeypatch.setattr(commands, "require_running", lambda: server)
        assert commands.status_command() == 1
        shown = capsys.readouterr().out
        assert "READY" not in shown
        assert "0 of 1 worker(s) can answer" in shown

        monkeypatch.setattr(management, "WORKER_REPLACEMENT_SECONDS", 1.0)
        with pytest.raises(
            UserError, match=r"reports 1 worker\(s\) as ready, 0 of them are running"
        ):
            scale(server, 1)
