"""Models of several sources in one server: each predicts what its own library does."""

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
from torchvision.models import get_model_weights
from torchvision.transforms._presets import ImageClassification

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.samples import CAT
from scripts.serve.management import ready_workers, scale
from scripts.serve.running import ServerState
from tests.images import encode, photographs
from tests.onnx_files import Made
from tests.onnx_files import model as onnx_model
from tests.served import described, served
from tests.timm_transforms import timm_transform

TIMEOUT = 60
IMAGES = 20
CLASSES = ("cat", "dog", "bird", "fish", "horse")
PETS = ("<b>cat</b>", "chien", "鳥")

# Returns probabilities, float32 (classes,), and the last layer's input, float32 (channels,), of an
# RGB image, computed by a model's own library.
Expected = Callable[[Image.Image], tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Kind:
    """A model of one source.

    Attributes:
        archive: the model archive.
        expected: predictions of its own library.
        explained: whether it has class activation maps.
    """

    archive: Path
    expected: Expected
    explained: bool


def pytorch(model: nn.Module, last: nn.Module, transform: Callable[[Image.Image], Any]) -> Expected:
    def answer(image: Image.Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        taken: list[torch.Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
        with torch.inference_mode():
            found = model(transform(image)[None]).softmax(1)[0].numpy()
        hook.remove()
        return found, taken[0][0].numpy()

    return answer


def spread(model: nn.Module, transform: Callable[[Image.Image], Any]) -> None:
    """Scale the last layer of random weights so that predictions differ between images."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    given = [transform(image.convert("RGB")) for _, image in images()[::2]]
    with torch.inference_mode():
        logits = model(torch.stack(given))
        scale = 2 / logits.std(0)
        last.weight *= scale[:, None]
        last.bias.copy_((last.bias - logits.mean(0)) * scale)


@cache
def images() -> list[tuple[str, Image.Image]]:
    """Return small photographs and crops with their names."""
    small = ((title, image) for title, image in photographs() if max(image.size) <= 700)
    return list(islice(small, IMAGES))


CODE = """
from torch import nn
from torchvision.models import resnet18

class Pets(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = resnet18()
        self.body.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(512, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 5))

    def forward(self, images):
        return self.head(self.body(images))
"""


def of_python(folder: Path) -> Kind:
    """Build a model from Python code with a custom head."""
    (folder / "pets.py").write_text(CODE)
    torch.manual_seed(3)
    made: dict[str, Any] = {}
    exec(CODE, made)
    model = made["Pets"]().eval()
    transform = get_model_weights("resnet18").DEFAULT.transforms()
    spread(model, transform)
    torch.save({"model_state_dict": model.state_dict()}, folder / "pets.pth")
    spec = from_options(
        name="python",
        model=folder / "pets.py",
        weights=folder / "pets.pth",
        classes=folder / "classes.txt",
        preprocessing={"preset": "torch", "resize": 256, "crop": 224},
    )
    return Kind(build(spec, folder), pytorch(model, model.head[-1], transform), explained=False)


def of_onnx(folder: Path) -> Kind:
    """Build an ONNX file as TensorFlow exports it: channels last, with a softmax."""
    made = Made(shape=("N", 64, 64, 3), nhwc=True, end=("Softmax",))
    file = folder / "from-elsewhere.onnx"
    file.write_bytes(onnx_model(made).SerializeToString())
    preprocessing = {"resize": 72, "crop": 64, "mean": 0.5, "std": 0.25}
    spec = from_options(model=file, classes=folder / "classes.txt", preprocessing=preprocessing)
    transform = ImageClassification(
        crop_size=64, resize_size=72, mean=(0.5,) * 3, std=(0.25,) * 3, antialias=True
    )

    proto = onnx_model(made)
    pooled = next(node.input[0] for node in proto.graph.node if node.op_type == "Gemm")
    proto.graph.output.append(helper.make_tensor_value_info(pooled, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString())

    def answer(image: Image.Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        given = transform(image)[None].permute(0, 2, 3, 1).numpy()
        probabilities, embedding = session.run(None, {"input": given})
        return probabilities[0], embedding[0]

    return Kind(build(spec, folder), answer, explained=True)


def of_timm(folder: Path) -> Kind:
    """Build a timm model that gets the whole image, padded, unlike its configuration."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=len(CLASSES)).eval()
    transform = timm_transform("test_resnet.r160_in1k", crop_mode="border", crop_pct=1.0)
    spread(model, transform)
    save_file(model.state_dict(), folder / "timm.safetensors")
    spec = from_options(
        name="from-timm",
        arch="timm/test_resnet.r160_in1k",
        weights=folder / "timm.safetensors",
        classes=folder / "classes.txt",
        preprocessing={"fit": "pad"},
    )
    last = model.get_submodule("fc")
    return Kind(build(spec, folder), pytorch(model, last, transform), explained=True)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return {
        "python": of_python(folder),
        "from-elsewhere": of_onnx(folder),
        "from-timm": of_timm(folder),
    }


@pytest.fixture(scope="module")
def server(
    kinds: dict[str, Kind], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerState]:
    """A server of all kinds, and of `pets`: the PyTorch engine, no activation maps, own classes."""
    first, *others = (kind.archive for kind in kinds.values())
    classes = first.parent / "pets.txt"
    classes.write_text("\n".join(PETS), "utf-8")
    pets = from_options(
        name="pets", arch="squeezenet1_1", weights="random", classes=classes, engine="torch"
    )
    others.append(build(pets, first.parent))
    with served(first, tmp_path_factory.mktemp("run"), extra_archives=others) as running:
        yield running


def ask(url: str, **options: Any) -> requests.Response:
    return requests.post(url, **options or {"data": CAT.read_bytes()}, timeout=TIMEOUT)


def explain(running: ServerState) -> requests.Response:
    url = running.predictions_url.replace("predictions", "explanations")
    return ask(url, data=CAT.read_bytes(), headers={"Accept": "application/json"})


@pytest.mark.parametrize("name", ["python", "from-elsewhere", "from-timm"])
def test_predictions_and_embeddings_equal_its_own_librarys(
    name: str, server: ServerState, kinds: dict[str, Kind], note: list[str]
) -> None:
    model = server.serving(name)
    worst, labels = [0.0, 0.0], set()
    for title, image in images():
        rgb = image.convert("RGB")
        expected, embedding = kinds[name].expected(rgb)
        files = {"file": encode(rgb, compress_level=1)}
        found = ask(model.predictions_url, files=files, data={"embedding": "true"}).json()
        order = [row["class_index"] for row in found["predictions"]]
        assert order == np.argsort(-expected, kind="stable")[:5].tolist(), title
        got = np.array([row["probability"] for row in found["predictions"]])
        vector = np.array(found["embedding"], np.float32)
        for index, difference in enumerate((got - expected[order], vector - embedding)):
            worst[index] = max(worst[index], float(np.abs(difference).max()))
        labels.add(order[0])
    note.append(
        f"kinds: {name} against its own library over {IMAGES} images, {len(labels)} different "
        f"top-1 predictions, worst difference of a probability {worst[0]:.1e}, of an embedding "
        f"{worst[1]:.1e}"
    )
    assert len(labels) >= 3
    assert max(worst) <= 1e-4
    # A model with a linear head has activation maps.
    explained = explain(model)
    if kinds[name].explained:
        height, width = np.array(explained.json()["map"]).shape
        assert height == width > 4
    else:
        assert (explained.status_code, explained.json()["type"]) == (404, "NoExplanation")


def test_a_model_with_custom_classes_but_no_maps_and_embeddings_describes_itself_and_predicts(
    server: ServerState,
) -> None:
    pets = server.serving("pets")
    description = described(pets)
    assert (description["architecture"], description["explains"]) == ("squeezenet1_1", False)
    assert description["classes"] == len(PETS)
    assert description["engine"].startswith("PyTorch")
    explained = explain(pets)
    assert (explained.status_code, explained.json()["type"]) == (404, "NoExplanation")
    assert "squeezenet1_1 has no class activation map" in explained.json()["message"]
    files = {"file": CAT.read_bytes()}
    embedded = ask(pets.predictions_url, files=files, data={"embedding": "true"})
    assert (embedded.status_code, embedded.json()["type"]) == (404, "NoEmbedding")
    message = "gives no embeddings: it was built for PyTorch (engine: torch)"
    assert message in embedded.json()["message"]
    page = requests.get(pets.predictions_url, headers={"Accept": "text/html"}, timeout=TIMEOUT)
    assert '"explains": false' in page.text
    body = ask(pets.predictions_url).json()
    assert sorted(row["label"] for row in body["predictions"]) == sorted(PETS)
    assert body["class_id"] == body["class_name"] == body["predictions"][0]["label"]


def test_each_model_is_scaled_separately_and_an_unknown_one_is_not_found(
    server: ServerState,
) -> None:
    other, pets = server.serving("from-timm"), server.serving("pets")
    scale(other, 2)
    assert ready_workers(other) == 2
    assert ready_workers(pets) == 1
    assert ask(pets.predictions_url.replace("pets", "nobody")).status_code == 404
