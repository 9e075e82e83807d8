"""Several models side by side, each of another architecture, preprocessing and class list."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from torchvision.models import get_model_weights

from scripts.build.archive import build, recipe
from scripts.build.weights import Weights, build_model, untrained
from scripts.samples import CAT
from scripts.serve.management import model_status, ready_workers, scale
from scripts.serve.running import Running, free_ports
from scripts.serve.server import start, stop
from tests.pictures import encode, photographs
from tests.unit.test_images import TUTORIAL

TIMEOUT = 60
IMAGES = 50
CLASSES = ("<b>cat</b>", "chien", "鳥")


@pytest.fixture(scope="module")
def models(weights: Weights) -> dict[str, Weights]:
    return {
        "densenet121": weights,
        # Light, with class activation maps, and resized otherwise.
        "mobilenet_v2": untrained("mobilenet_v2"),
        # Without class activation maps, with PyTorch's engine, and a name and classes of its own.
        "pets": untrained("squeezenet1_1", len(CLASSES)),
    }


@pytest.fixture(scope="module")
def server(
    archive: Path, models: dict[str, Weights], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "classes.txt").write_text("\n".join(CLASSES), "utf-8")
    pets = recipe(models["pets"], "pets", folder / "classes.txt", engine="torch")
    archives = [
        Path(shutil.copy(archive, folder)),
        build(recipe(models["mobilenet_v2"]), folder),
        build(pets, folder),
    ]
    running = start(archives[0], free_ports(), 1, folder / "run", beside=archives[1:])
    yield running
    stop(running, folder / "run")


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2"])
def test_each_equals_plain_pytorch_with_its_own_transforms(
    name: str, server: Running, models: dict[str, Weights], note: list[str]
) -> None:
    transform = TUTORIAL if name == "densenet121" else get_model_weights(name).DEFAULT.transforms()
    model = build_model(models[name])
    worst, labels = 0.0, set()
    for title, image in list(photographs())[:IMAGES]:
        rgb = image.convert("RGB")
        with torch.inference_mode():
            expected = model(transform(rgb).unsqueeze(0)).softmax(1)[0].numpy()
        served = requests.post(
            server.serving(name).predictions_url, files={"file": encode(rgb)}, timeout=TIMEOUT
        ).json()["predictions"]
        order = [row["class_index"] for row in served]
        assert order == np.argsort(-expected, kind="stable")[:5].tolist(), title
        got = np.array([row["probability"] for row in served])
        worst = max(worst, float(np.abs(got - expected[order]).max()))
        labels.add(order[0])
    note.append(
        f"side by side: {name} against plain PyTorch over {IMAGES} images, {len(labels)} different "
        f"first labels, worst difference of a probability {worst:.1e}"
    )
    assert len(labels) >= 8
    assert worst <= 1e-4


def test_each_describes_itself(server: Running) -> None:
    for name, architecture, explains in (
        ("densenet121", "densenet121", True),
        ("mobilenet_v2", "mobilenet_v2", True),
        ("pets", "squeezenet1_1", False),
    ):
        url = server.serving(name).model_url
        (model,) = requests.get(url, params={"customized": "true"}, timeout=TIMEOUT).json()
        metadata = model["customizedMetadata"]
        assert (metadata["architecture"], metadata["explains"]) == (architecture, explains)
    assert metadata["classes"] == len(CLASSES)


def test_classes_of_ones_own_are_answered(server: Running) -> None:
    url = server.serving("pets").predictions_url
    body = requests.post(url, data=CAT.read_bytes(), timeout=TIMEOUT).json()
    assert sorted(row["label"] for row in body["predictions"]) == sorted(CLASSES)
    assert body["class_id"] == body["class_name"] == body["predictions"][0]["label"]


def test_what_cannot_be_explained_is_refused_and_the_page_knows(server: Running) -> None:
    pets = server.serving("pets")
    explanations = pets.predictions_url.replace("predictions", "explanations")
    refused = requests.post(explanations, data=CAT.read_bytes(), timeout=TIMEOUT)
    assert (refused.status_code, refused.json()["type"]) == (404, "NoExplanation")
    assert "squeezenet1_1 has no class activation map" in refused.json()["message"]
    page = requests.get(pets.predictions_url, headers={"Accept": "text/html"}, timeout=TIMEOUT)
    assert '"explains": false' in page.text


@pytest.mark.parametrize("form", ["a picture's field", "KServe's tensor"])
def test_an_archive_for_pytorch_gives_no_embeddings(form: str, server: Running) -> None:
    pets = server.serving("pets")
    (model,) = requests.get(pets.model_url, params={"customized": "true"}, timeout=TIMEOUT).json()
    assert model["customizedMetadata"]["engine"].startswith("PyTorch")
    asked: dict[str, object] = {"files": {"file": CAT.read_bytes()}, "data": {"embedding": "true"}}
    if form == "KServe's tensor":
        content = base64.b64encode(CAT.read_bytes()).decode()
        tensor = {"name": "i", "shape": [1], "datatype": "BYTES", "data": [content]}
        asked = {"json": {"inputs": [tensor], "outputs": [{"name": "embedding"}]}}
    refused = requests.post(pets.predictions_url, timeout=TIMEOUT, **asked)  # type: ignore[arg-type]
    assert refused.status_code == 404, refused.text
    text = refused.json()["error"] if form == "KServe's tensor" else refused.json()["message"]
    assert "gives no embeddings: it was built for PyTorch (ENGINE=torch)" in text
    if form == "a picture's field":
        assert refused.json()["type"] == "NoEmbedding"
    answer = requests.post(pets.predictions_url, data=CAT.read_bytes(), timeout=TIMEOUT)
    assert answer.status_code == 200


def test_another_architecture_is_explained(server: Running) -> None:
    url = server.serving("mobilenet_v2").predictions_url.replace("predictions", "explanations")
    headers = {"Accept": "application/json"}
    answer = requests.post(url, data=CAT.read_bytes(), headers=headers, timeout=TIMEOUT).json()
    assert np.array(answer["map"]).shape == (7, 7)


def test_each_is_scaled_on_its_own(server: Running) -> None:
    other = server.serving("mobilenet_v2")
    scale(other, 2)
    assert ready_workers(other) == 2
    assert ready_workers(server) == 1
    scale(other, 1)
    assert model_status(other)["modelName"] == "mobilenet_v2"


def test_no_path_of_another_model_is_taken(server: Running) -> None:
    url = server.predictions_url.replace("densenet121", "nobody")
    answer = requests.post(url, data=Path(CAT).read_bytes(), timeout=TIMEOUT)
    assert answer.status_code == 404
