"""The server's predictions are those of the PyTorch tutorials."""

from pathlib import Path

import numpy as np
import requests
import torch

from handler.settings import Preprocessing
from scripts.build.sources.graph import random_source
from scripts.build.sources.torchvision import TorchvisionSource
from scripts.samples import CAT
from scripts.serve.management import model_status
from scripts.serve.running import ServerState
from tests.images import encode, generated, photographs
from tests.served import described
from tests.unit.test_images import TUTORIAL, is_very_long

TIMEOUT = 60


def test_predictions_equal_plain_pytorch(running: ServerState, densenet: TorchvisionSource) -> None:
    """One image at a time, since batches round differently. Unit tests compare more images."""
    images = [
        (name, image) for name, image in (*photographs(), *generated()) if not is_very_long(image)
    ][::12]
    model = densenet.module
    labels = set()
    for name, image in images:
        body = encode(image, compress_level=1)
        answer = requests.post(running.predictions_url, files={"file": body}, timeout=TIMEOUT)
        served = answer.json()["predictions"]
        order = [row["class_index"] for row in served]
        probabilities = np.array([row["probability"] for row in served])
        with torch.inference_mode():
            logits = model(TUTORIAL(image.convert("RGB")).unsqueeze(0))
        expected = logits.softmax(1)[0].numpy()
        assert np.abs(probabilities - expected[order]).max() <= 1e-5, name
        best_first = np.argsort(-expected, kind="stable")[:5].tolist()
        # The order of classes that are equal within float32 rounding may differ.
        assert np.abs(expected[order] - expected[best_first]).max() < 1e-7, name
        labels.add(order[0])
    assert len(images) >= 20
    assert len(labels) >= 5


def test_untrained_weights_cause_a_warning_and_the_model_describes_itself(
    running: ServerState,
) -> None:
    for body in (CAT.read_bytes(), b"no image"):
        response = requests.post(running.predictions_url, data=body, timeout=TIMEOUT)
        assert "untrained" in response.json()["warning"]
        assert response.headers["x-model-weights"] == "untrained"
    assert model_status(running)["modelVersion"] == "1.0-untrained"
    metadata = described(running)
    assert "untrained" in metadata["warning"]
    assert metadata["architecture"] == "densenet121"
    assert metadata["weights_sha256"] == random_source("densenet121").sha256
    assert metadata["trained"] is False
    assert metadata["classes"] == 1000
    assert metadata["explains"] is True
    assert metadata["engine"].startswith("ONNX Runtime")
    assert metadata["preprocessing"]["crop"] == Preprocessing().crop


def test_the_worker_imports_neither_torch_nor_torchvision(running: ServerState) -> None:
    """They would take 450 and 160 MB per worker, and ONNX Runtime does not need them."""
    process = running.process()
    assert process is not None
    workers = [p for p in process.children() if "model_service_worker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        mapped = {mapping.path for mapping in worker.memory_maps()}
        assert any("onnxruntime" in path for path in mapped)
        assert not [path for path in mapped if {"torch", "torchvision"} & set(Path(path).parts)]
