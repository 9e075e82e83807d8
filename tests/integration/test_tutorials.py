"""The tutorials' own clients and calls, against the real server."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from handler.settings import Preprocessing
from scripts.build.weights import Weights, build_model
from scripts.samples import CAT
from scripts.serve.running import Running
from tests.pictures import encode, generated, photographs
from tests.unit.test_images import TUTORIAL, is_very_long

TIMEOUT = 60


def test_the_flask_tutorials_request_prints_class_id_and_name(running: Running) -> None:
    with CAT.open("rb") as file:
        answer = requests.post(running.predictions_url, files={"file": file}, timeout=TIMEOUT)
    body = answer.json()
    assert answer.status_code == 200
    assert body["class_id"].startswith("n")
    assert body["class_name"] == body["predictions"][0]["label"]


def test_the_keras_tutorials_client_runs_as_it_is(running: Running) -> None:
    image = CAT.read_bytes()
    r = requests.post(running.predictions_url, files={"image": image}, timeout=TIMEOUT).json()
    assert r["success"]
    lines = [
        "{}. {}: {:.4f}".format(i + 1, result["label"], result["probability"])
        for (i, result) in enumerate(r["predictions"])
    ]
    assert len(lines) == 5
    assert lines[0].startswith("1. ")


def test_curl_uploads_a_file_as_the_body_and_as_a_form(running: Running) -> None:
    answers = [
        subprocess.run(
            ["curl", "--silent", "--fail", *arguments, running.predictions_url],  # noqa: S607
            capture_output=True,
            check=True,
        ).stdout
        for arguments in (
            ["-T", str(CAT)],
            ["-F", f"file=@{CAT}"],
            ["-X", "POST", "-F", f"image=@{CAT}"],
        )
    ]
    assert answers[0] == answers[1] == answers[2]
    assert json.loads(answers[0])["success"] is True


def test_served_answers_equal_plain_pytorch(
    running: Running, weights: Weights, note: list[str]
) -> None:
    pictures = [
        (name, image) for name, image in (*photographs(), *generated()) if not is_very_long(image)
    ][:240]
    model = build_model(weights)
    session = requests.Session()

    def ask(body: bytes) -> Any:
        answer = session.post(running.predictions_url, files={"file": body}, timeout=TIMEOUT)
        return answer.json()

    worst, labels = 0.0, set()
    bodies = [encode(image, compress_level=1) for _, image in pictures]
    # One at a time, so that no batch rounds otherwise; PyTorch computes meanwhile.
    with ThreadPoolExecutor(1) as client:
        answers = client.map(ask, bodies)
        expectations = [_expected(model, image) for _, image in pictures]
    for (name, _), expected, answer in zip(pictures, expectations, answers, strict=True):
        served = answer["predictions"]
        order = [row["class_index"] for row in served]
        probabilities = np.array([row["probability"] for row in served])
        worst = max(worst, float(np.abs(probabilities - expected[order]).max()))
        labels.add(order[0])
        best_first = np.argsort(-expected, kind="stable")[:5].tolist()
        assert order == best_first or _is_tie(expected, order, best_first), name
    note.append(
        f"served answers: {len(pictures)} images against plain PyTorch, {len(labels)} different "
        f"first labels, worst difference of a probability {worst:.1e}"
    )
    assert len(pictures) >= 200
    assert len(labels) >= 10
    assert worst <= 1e-5


@torch.inference_mode()
def _expected(model: nn.Module, image: Image.Image) -> NDArray[np.float32]:
    """Probabilities of all classes, in plain PyTorch."""
    logits = model(TUTORIAL(image.convert("RGB")).unsqueeze(0))
    found: NDArray[np.float32] = logits.softmax(1)[0].numpy()
    return found


def _is_tie(expected: np.ndarray, order: list[int], best_first: list[int]) -> bool:
    """Two classes closer than float32's sums in another order can tell apart."""
    return bool(np.abs(expected[order] - expected[best_first]).max() < 1e-7)


def test_topk_and_threshold_are_form_fields(running: Running) -> None:
    body = requests.post(
        running.predictions_url,
        files={"file": CAT.read_bytes()},
        data={"topk": "3", "threshold": "0.999"},
        timeout=TIMEOUT,
    ).json()
    assert len(body["predictions"]) == 3
    assert (body["recognized"], body["class_id"], body["class_name"]) == (False, None, None)
    assert body["success"] is True


def test_untrained_weights_cannot_be_missed(running: Running) -> None:
    answer = requests.post(running.predictions_url, data=CAT.read_bytes(), timeout=TIMEOUT)
    refusal = requests.post(running.predictions_url, data=b"no picture", timeout=TIMEOUT)
    for response in (answer, refusal):
        assert "untrained" in response.json()["warning"]
        assert response.headers["x-model-weights"] == "untrained"
    described = requests.get(running.model_url, params={"customized": "true"}, timeout=TIMEOUT)
    (model,) = described.json()
    assert model["modelVersion"] == "1.0-untrained"
    assert "untrained" in model["customizedMetadata"]["warning"]


def test_the_model_describes_itself(running: Running, weights: Weights) -> None:
    described = requests.get(running.model_url, params={"customized": "true"}, timeout=TIMEOUT)
    metadata = described.json()[0]["customizedMetadata"]
    assert metadata["architecture"] == "densenet121"
    assert metadata["weights_sha256"] == weights.sha256
    assert metadata["trained"] is False
    assert metadata["classes"] == 1000
    assert metadata["engine"].startswith("ONNX Runtime")
    assert metadata["preprocessing"]["crop"] == Preprocessing().crop


def test_the_worker_imports_neither_torch_nor_torchvision(running: Running) -> None:
    """They would cost each worker 450 and 160 MB that ONNX Runtime has no use for."""
    process = running.process()
    assert process is not None
    workers = [p for p in process.children() if "model_service_worker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        mapped = {mapping.path for mapping in worker.memory_maps()}
        assert any("onnxruntime" in path for path in mapped)
        assert not [path for path in mapped if {"torch", "torchvision"} & set(Path(path).parts)]
