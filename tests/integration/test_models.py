"""Several models side by side, each of another architecture, preprocessing and class list."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
import torch
from torchvision.models import get_model_weights

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.build.sources.torchvision import TorchvisionSource, random_source
from scripts.samples import CAT
from scripts.serve.management import ready_workers, scale
from scripts.serve.running import ServerState, free_ports
from scripts.serve.server import start, stop
from tests.pictures import encode, photographs

TIMEOUT = 60
CLASSES = ("<b>cat</b>", "chien", "鳥")


@pytest.fixture(scope="module")
def mobilenet() -> TorchvisionSource:
    """It has class activation maps, and resizes to another size than DenseNet-121."""
    return random_source("mobilenet_v2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerState]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "classes.txt").write_text("\n".join(CLASSES), "utf-8")
    # Without class activation maps, with PyTorch's engine, and a name and classes of its own.
    classes = folder / "classes.txt"
    spec = from_options(
        name="pets", arch="squeezenet1_1", weights="random", classes=classes, engine="torch"
    )
    pets = build(spec, folder)
    other = build(from_options(arch="mobilenet_v2", weights="random"), folder)
    running = start(pets, free_ports(), 1, folder / "run", extra_archives=[other])
    yield running
    stop(running, folder / "run")


def ask(url: str, **options: Any) -> requests.Response:
    return requests.post(url, **options or {"data": CAT.read_bytes()}, timeout=TIMEOUT)


def description(running: ServerState) -> dict[str, Any]:
    url, query = running.model_url, {"customized": "true"}
    found: dict[str, Any] = requests.get(url, query, timeout=TIMEOUT).json()[0]
    return found["customizedMetadata"]  # type: ignore[no-any-return]


def test_answers_equal_plain_pytorch_with_the_architectures_own_transform(
    server: ServerState, mobilenet: TorchvisionSource
) -> None:
    transform = get_model_weights("mobilenet_v2").DEFAULT.transforms()
    model, labels = mobilenet.module, set()
    url = server.serving("mobilenet_v2").predictions_url
    for title, image in list(photographs())[:50:3]:
        rgb = image.convert("RGB")
        with torch.inference_mode():
            expected = model(transform(rgb).unsqueeze(0)).softmax(1)[0].numpy()
        served = ask(url, files={"file": encode(rgb)}).json()["predictions"]
        order = [row["class_index"] for row in served]
        assert order == np.argsort(-expected, kind="stable")[:5].tolist(), title
        np.testing.assert_allclose([row["probability"] for row in served], expected[order], 0, 1e-4)
        labels.add(order[0])
    assert len(labels) >= 5


def test_a_model_with_custom_classes_and_no_maps_describes_itself_and_answers(
    server: ServerState,
) -> None:
    pets = server.serving("pets")
    described = description(pets)
    assert (described["architecture"], described["explains"]) == ("squeezenet1_1", False)
    assert described["classes"] == len(CLASSES)
    body = ask(pets.predictions_url).json()
    assert sorted(row["label"] for row in body["predictions"]) == sorted(CLASSES)
    assert body["class_id"] == body["class_name"] == body["predictions"][0]["label"]
    rejected = ask(pets.predictions_url.replace("predictions", "explanations"))
    assert (rejected.status_code, rejected.json()["type"]) == (404, "NoExplanation")
    assert "squeezenet1_1 has no class activation map" in rejected.json()["message"]
    page = requests.get(pets.predictions_url, headers={"Accept": "text/html"}, timeout=TIMEOUT)
    assert '"explains": false' in page.text


def test_another_architecture_is_explained(server: ServerState) -> None:
    running = server.serving("mobilenet_v2")
    described = description(running)
    assert (described["architecture"], described["explains"]) == ("mobilenet_v2", True)
    url = running.predictions_url.replace("predictions", "explanations")
    wants_json = {"Accept": "application/json"}
    answer = ask(url, data=CAT.read_bytes(), headers=wants_json)
    assert np.array(answer.json()["map"]).shape == (7, 7)


def test_an_archive_for_pytorch_rejects_requests_for_embeddings_and_no_others(
    server: ServerState,
) -> None:
    pets, image = server.serving("pets"), CAT.read_bytes()
    assert description(pets)["engine"].startswith("PyTorch")
    data = [base64.b64encode(image).decode()]
    tensor = {"name": "i", "shape": [1], "datatype": "BYTES", "data": data}
    kserve = {"inputs": [tensor], "outputs": [{"name": "embedding"}]}
    by_form = ask(pets.predictions_url, files={"file": image}, data={"embedding": "true"})
    by_tensor = ask(pets.predictions_url, json=kserve)
    assert by_form.status_code == by_tensor.status_code == 404
    assert by_form.json()["type"] == "NoEmbedding"
    for message in (by_form.json()["message"], by_tensor.json()["error"]):
        assert "gives no embeddings: it was built for PyTorch (engine: torch)" in message
    assert ask(pets.predictions_url).status_code == 200


def test_each_model_is_scaled_on_its_own(server: ServerState) -> None:
    other = server.serving("mobilenet_v2")
    scale(other, 2)
    assert ready_workers(other) == 2
    assert ready_workers(server.serving("pets")) == 1
    scale(other, 1)


def test_an_unknown_model_is_not_found(server: ServerState) -> None:
    assert ask(server.predictions_url.replace("pets", "nobody")).status_code == 404
