"""timm's models: preprocessing of their own, weights from a file or from a hub on this machine."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from handler.labels import CLASS_INDEX, Label
from handler.settings import Preprocessing
from scripts.build.model_file import from_options
from scripts.build.packing import class_index
from scripts.build.pipeline import build
from scripts.build.preprocessing import PreprocessingOptions, resolve
from scripts.build.sources.source import TorchSource
from scripts.build.sources.timm import _config, _preprocessing, open_source
from scripts.terminal import UserError

ARCHITECTURE = REPOSITORY = "timm/test_resnet.r160_in1k"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As the hub answers: the file's size and SHA-256, then the file."""

    content = b""
    digest = ""
    requests: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.requests.append(self.path)
        if self.path != f"/{REPOSITORY}/resolve/{REVISION}/model.safetensors":
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
        else:
            self.send_response(200)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{self.digest}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(4)
    made: nn.Module = timm.create_model("test_resnet", num_classes=3).eval()
    return made


@pytest.fixture
def served(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[Hub]]:
    Hub.content = safetensors.torch.save(model.state_dict())
    Hub.digest, Hub.requests = hashlib.sha256(Hub.content).hexdigest(), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        constants = huggingface_hub.constants
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield Hub
        server.shutdown()


def of_hub(revision: str | None = REVISION) -> TorchSource:
    return open_source(from_options(arch=ARCHITECTURE, revision=revision))


def test_weights_of_the_hub_are_fetched_once_and_again_only_if_damaged(
    served: type[Hub], model: nn.Module, tmp_path: Path
) -> None:
    found = of_hub()
    assert (found.outputs, found.sha256) == (3, served.digest)
    state_dict = model.state_dict()
    assert all(torch.equal(v, state_dict[k]) for k, v in found.module.state_dict().items())
    requests = len(served.requests)
    of_hub()
    assert len(served.requests) == requests
    (file,) = (path for path in tmp_path.rglob("blobs/*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"thrown away. Run the same command again"):
        of_hub()
    assert of_hub().sha256 == served.digest
    assert len(served.requests) > requests


def test_a_file_that_is_not_the_hubs_is_not_loaded(served: type[Hub], tmp_path: Path) -> None:
    served.digest = "0" * 64
    with pytest.raises(UserError, match=r"is not the expected file.*thrown away"):
        of_hub()
    assert not [path for path in tmp_path.rglob("blobs/*") if path.is_file()]


@pytest.mark.usefixtures("served")
def test_a_revision_that_the_hub_does_not_have_and_a_hub_out_of_reach_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"hub has no model.safetensors of timm/test_resnet"):
        of_hub(REVISION[::-1])
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its retries
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(UserError, match=r"cannot be reached.*WEIGHTS=path"):
        of_hub()


@pytest.mark.parametrize("revision", [None, "main", REVISION[:7], REVISION.upper()])
def test_a_revision_that_can_change_is_rejected(revision: str | None, served: type[Hub]) -> None:
    with pytest.raises(UserError, match=r"at a fixed revision only: revision: .* is a commit"):
        of_hub(revision)
    assert served.requests == []


def test_weights_that_do_not_fit_are_rejected(model: nn.Module, tmp_path: Path) -> None:
    state_dict = {**model.state_dict(), "fc.bias": torch.zeros(4)}
    torch.save(state_dict, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=f"mine.pth does not fit {ARCHITECTURE}"):
        open_source(from_options(arch=ARCHITECTURE, weights=tmp_path / "mine.pth"))


def test_a_size_that_a_model_cannot_take_is_rejected(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    spec = from_options(
        arch="timm/vit_tiny_patch16_224",
        weights=tmp_path / "vit.pth",
        preprocessing={"crop": 64},
    )
    with pytest.raises(UserError, match=r"cannot take images of 64 x 64 pixels.* another crop"):
        build(spec, tmp_path)


def preprocessing_of(name: str, **options: Any) -> Preprocessing:
    said = PreprocessingOptions(**options)
    return resolve(said, _preprocessing(_config(f"timm/{name}")), {}, name)


def test_a_crop_larger_than_the_image_is_rejected_unless_overridden() -> None:
    name = "volo_d4_448.sail_in1k"
    with pytest.raises(UserError, match=r"crop 448 is larger than resize 389"):
        preprocessing_of(name)
    mine = preprocessing_of(name, resize=512, crop=448)
    assert (mine.resize, mine.crop, mine.interpolation) == (512, 448, "bicubic")
    assert preprocessing_of(name, fit="squash").resize == 448


def test_similar_names_are_suggested_for_an_unknown_one() -> None:
    with pytest.raises(UserError, match=r"no model 'resnet51'. Alike are: .*timm/resnet5"):
        open_source(from_options(arch="timm/resnet51", revision=REVISION))


def test_the_class_index_of_imagenet_has_the_tutorials_ids_and_names() -> None:
    """The name is the first lemma of the class's WordNet synset, with underscores for spaces."""
    info = files("timm") / "data" / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text("utf-8").split()
    lines = (info / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines)
    labels = [Label(s, lemmas[s].split(",")[0].strip().replace(" ", "_")) for s in synsets]
    assert Path("handler", CLASS_INDEX).read_text("utf-8") == class_index(labels)
