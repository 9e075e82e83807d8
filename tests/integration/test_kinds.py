"""Kinds of models that people bring, side by side: each answers as what it was made of does."""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import requests
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.transforms._presets import ImageClassification

from classification_client import RequestOptions
from classification_client.command import classify
from scripts.build import timm_models
from scripts.build.archive import build, recipe
from scripts.build.onnx_archive import build as build_onnx
from scripts.build.packing import Said
from scripts.build.weights import load
from scripts.samples import CAT
from scripts.serve.running import Running, free_ports
from scripts.serve.server import start, stop
from tests.onnx_files import Made
from tests.onnx_files import model as onnx_model
from tests.pictures import encode, photographs
from tests.timm_transforms import timm_transform

TIMEOUT = 60
IMAGES = 50
CLASSES = ("cat", "dog", "bird", "fish", "horse")

# What a kind's own library makes of an RGB picture: float32 (classes,), probabilities.
Expected = Callable[[Image.Image], NDArray[np.float32]]


@dataclass(frozen=True)
class Kind:
    """One model.

    Attributes:
        archive: as built from files that the test made.
        expected: its own library's answers.
        explained: whether it has maps.
        embedding: of an RGB picture, what its last layer takes: float32 (channels,).
    """

    archive: Path
    expected: Expected
    explained: bool
    embedding: Expected


def given_to(
    layer: nn.Module, model: nn.Module, transform: Callable[[Image.Image], Any]
) -> Expected:
    def answer(picture: Image.Image) -> NDArray[np.float32]:
        taken: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
        with torch.inference_mode():
            model(transform(picture)[None])
        hook.remove()
        found: NDArray[np.float32] = taken[0][0].numpy()
        return found

    return answer


def pytorch(model: nn.Module, transform: Callable[[Image.Image], Any]) -> Expected:
    def answer(picture: Image.Image) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = model(transform(picture)[None]).softmax(1)[0].numpy()
        return found

    return answer


def spread(model: nn.Module, transform: Callable[[Image.Image], Any]) -> None:
    """Gives random weights answers that differ: the last layer is scaled on the pictures."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    given = [transform(image.convert("RGB")) for _, image in pictures()[::5]]
    with torch.inference_mode():
        logits = model(torch.stack(given))
        scale = 2 / logits.std(0)
        last.weight *= scale[:, None]
        last.bias.copy_((last.bias - logits.mean(0)) * scale)


@cache
def pictures() -> list[tuple[str, Image.Image]]:
    """Photographs and parts of them, none so large that decoding takes the time of the test."""
    small = ((title, image) for title, image in photographs() if max(image.size) <= 700)
    return list(islice(small, IMAGES))


def of_a_head(folder: Path, name: str, layers: list[nn.Module], said: str | None) -> Kind:
    torch.manual_seed(3)
    model = get_model("resnet18", weights=None).eval()
    model.fc = nn.Sequential(*layers).eval()
    transform = get_model_weights("resnet18").DEFAULT.transforms()
    spread(model, transform)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    weights = load(folder / f"{name}.pth", "resnet18", said)
    archive = build(recipe(weights, name, folder / "classes.txt"), folder)
    last = given_to(layers[-1], model, transform)
    return Kind(archive, pytorch(model, transform), explained=said is None, embedding=last)


def of_onnx(folder: Path) -> Kind:
    """A file that no PyTorch wrote, channels last and with a softmax, as TensorFlow's are."""
    made = Made(shape=("N", 64, 64, 3), nhwc=True, end=("Softmax",))
    file = folder / "from-elsewhere.onnx"
    file.write_bytes(onnx_model(made).SerializeToString())
    said = Said(resize=72, crop=64, mean="0.5", std="0.25")
    archive = build_onnx(file, said, classes=folder / "classes.txt", model_store=folder)
    session = onnxruntime.InferenceSession(file)
    transform = ImageClassification(
        crop_size=64, resize_size=72, mean=(0.5,) * 3, std=(0.25,) * 3, antialias=True
    )

    def answer(picture: Image.Image) -> NDArray[np.float32]:
        given = transform(picture)[None].permute(0, 2, 3, 1).numpy()
        found: NDArray[np.float32] = session.run(None, {"input": given})[0][0]
        return found

    proto = onnx_model(made)
    pooled = next(node.input[0] for node in proto.graph.node if node.op_type == "Gemm")
    proto.graph.output.append(helper.make_tensor_value_info(pooled, TensorProto.FLOAT, None))
    with_pooled = onnxruntime.InferenceSession(proto.SerializeToString())

    def embed(picture: Image.Image) -> NDArray[np.float32]:
        given = transform(picture)[None].permute(0, 2, 3, 1).numpy()
        found: NDArray[np.float32] = with_pooled.run([pooled], {"input": given})[0][0]
        return found

    return Kind(archive, answer, explained=True, embedding=embed)


def of_timm(folder: Path) -> Kind:
    """The whole picture, padded, and not what the model's configuration says of that."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=len(CLASSES)).eval()
    transform = timm_transform("test_resnet.r160_in1k", crop_mode="border", crop_pct=1.0)
    spread(model, transform)
    save_file(model.state_dict(), folder / "timm.safetensors")
    name = "timm/test_resnet.r160_in1k"
    preprocessing = timm_models.preprocessing_of(name, Said(fit="pad"))
    mine = timm_models.obtain(name, folder / "timm.safetensors", None)
    archive = timm_models.build(
        mine, preprocessing, "from-timm", folder / "classes.txt", model_store=folder
    )
    last = given_to(model.get_submodule("fc"), model, transform)
    return Kind(archive, pytorch(model, transform), explained=True, embedding=last)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    two = [nn.Linear(512, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, len(CLASSES))]
    return {
        "head": of_a_head(folder, "head", two, "linear,gelu,dropout,linear"),
        "from-elsewhere": of_onnx(folder),
        "from-timm": of_timm(folder),
    }


@pytest.fixture(scope="module")
def server(kinds: dict[str, Kind], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run_dir = tmp_path_factory.mktemp("run")
    first, *others = (kind.archive for kind in kinds.values())
    running = start(first, free_ports(), 1, run_dir, beside=others)
    yield running
    stop(running, run_dir)


NAMES = ["head", "from-elsewhere", "from-timm"]


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_as_its_own_library(
    name: str, server: Running, kinds: dict[str, Kind], note: list[str]
) -> None:
    url = server.serving(name).predictions_url
    worst, labels = 0.0, set()
    for title, image in pictures():
        rgb = image.convert("RGB")
        expected = kinds[name].expected(rgb)
        files = {"file": encode(rgb, compress_level=1)}
        served = requests.post(url, files=files, timeout=TIMEOUT).json()
        order = [row["class_index"] for row in served["predictions"]]
        assert order == np.argsort(-expected, kind="stable")[:5].tolist(), title
        got = np.array([row["probability"] for row in served["predictions"]])
        worst = max(worst, float(np.abs(got - expected[order]).max()))
        labels.add(order[0])
    note.append(
        f"kinds: {name} against its own library over {IMAGES} images, {len(labels)} different "
        f"first labels, worst difference of a probability {worst:.1e}"
    )
    assert len(labels) >= 3
    assert worst <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_where_the_head_is_linear(
    name: str, server: Running, kinds: dict[str, Kind]
) -> None:
    url = server.serving(name).predictions_url.replace("predictions", "explanations")
    headers = {"Accept": "application/json"}
    answer = requests.post(url, data=CAT.read_bytes(), headers=headers, timeout=TIMEOUT)
    if kinds[name].explained:
        height, width = np.array(answer.json()["map"]).shape
        assert height == width > 4
    else:
        assert (answer.status_code, answer.json()["type"]) == (404, "NoExplanation")


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_what_the_last_layer_takes(
    name: str, server: Running, kinds: dict[str, Kind], note: list[str]
) -> None:
    running = server.serving(name)
    rgb = [image.convert("RGB") for _, image in pictures()]
    expected = np.array([kinds[name].embedding(picture) for picture in rgb])
    content = [encode(picture, compress_level=1) for picture in rgb]
    options = {"embedding": "true", "topk": "1"}
    found: list[list[float]] = []
    for first in range(0, IMAGES, 5):
        files = {str(number): data for number, data in enumerate(content[first : first + 5])}
        answer = requests.post(running.predictions_url, files=files, data=options, timeout=TIMEOUT)
        found += [result["embedding"] for result in answer.json()["results"]]
    vectors = np.array(found, np.float32)
    worst = float(np.abs(vectors - expected).max())
    note.append(f"embeddings: {name} against its own library over {IMAGES} images: {worst:.1e}")
    assert worst < 1e-4
    plain = requests.post(running.predictions_url, files={"one": content[0]}, timeout=TIMEOUT)
    assert "embedding" not in plain.json()
    tensor = {"name": "i", "shape": [1], "datatype": "BYTES"}
    tensor["data"] = [base64.b64encode(content[0]).decode()]
    asked = {"inputs": [tensor], "outputs": [{"name": "class_id"}, {"name": "embedding"}]}
    url = f"{running.predictions_url.rsplit('/predictions', 1)[0]}/v2/models/{name}/infer"
    outputs = requests.post(url, json=asked, timeout=TIMEOUT).json()["outputs"]
    assert outputs[1]["shape"] == [1, vectors.shape[1]]
    assert np.array_equal(np.float32(outputs[1]["data"]), vectors[0])


def test_the_command_writes_embeddings(
    server: Running, kinds: dict[str, Kind], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (_, image) in enumerate(pictures()[:3]):
        image.convert("RGB").save(folder / f"{number}.png")
    url = server.serving("from-timm").predictions_url
    code = classify([str(folder)], url, RequestOptions(), output=tmp_path / "v.npy")
    rows = np.load(tmp_path / "v.npy")
    assert (code, rows["picture"].tolist()) == (0, [str(folder / f"{i}.png") for i in range(3)])
    for row, (_, image) in zip(rows, pictures(), strict=False):
        expected = kinds["from-timm"].embedding(image.convert("RGB"))
        assert np.abs(row["embedding"] - expected).max() < 1e-4
