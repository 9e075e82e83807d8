"""timm's models: preprocessing of their own, weights from a file or from a hub on this machine."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from handler.images import PixelBudget, decode
from scripts.build import hub, timm_models
from scripts.build.architectures import check_architecture
from scripts.build.commands import main as make_archive
from scripts.build.export import Normalized
from scripts.build.packing import Said
from scripts.terminal import UserError
from tests.pictures import encode, photographs
from tests.timm_transforms import timm_transform

ARCHITECTURE = REPOSITORY = "timm/test_resnet.r160_in1k"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As the hub answers: a redirect with the file's SHA-256, then the file."""

    content = b""
    digest = ""
    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/file":
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            cut = len(self.content) // 2 if self.digest == "cut" else len(self.content)
            self.wfile.write(self.content[:cut])
        elif self.path == f"/{REPOSITORY}/resolve/{REVISION}/model.safetensors":
            self.send_response(302)
            self.send_header("Location", "/file")
            if self.digest:
                self.send_header("X-Linked-Etag", f'"{self.digest.replace("cut", "0" * 64)}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_error(404)

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
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        yield Hub
        server.shutdown()


def cached(folder: Path) -> list[Path]:
    return [path for path in (folder / "home").rglob("*") if path.is_file()]


def test_weights_of_the_hub_are_fetched_once_and_again_only_if_damaged(
    served: type[Hub], model: nn.Module, tmp_path: Path
) -> None:
    found = timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert (found.classes, found.sha256) == (3, served.digest)
    state_dict = model.state_dict()
    assert all(torch.equal(v, state_dict[k]) for k, v in found.module.state_dict().items())
    requests = len(served.requests)
    timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert len(served.requests) == requests
    (file,) = cached(tmp_path)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert timm_models.obtain(ARCHITECTURE, None, REVISION).sha256 == served.digest
    assert len(served.requests) > requests


@pytest.mark.parametrize(
    ("digest", "endpoint", "message"),
    [
        ("0" * 64, "", "is not the expected file.*thrown away"),
        ("", "", "does not say the file's SHA-256"),
        ("cut", "", "the connection was lost.*Run the same command again"),
        ("", "http://127.0.0.1:9", "cannot be reached.*WEIGHTS=path"),
    ],
)
def test_only_the_expected_file_is_cached(  # noqa: PLR0913, PLR0917
    digest: str,
    endpoint: str,
    message: str,
    served: type[Hub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served.digest = digest
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match=message):
        timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert cached(tmp_path) == []


@pytest.mark.parametrize("revision", [None, "main", REVISION[:7], REVISION.upper()])
def test_a_revision_that_can_change_is_rejected(revision: str | None, served: type[Hub]) -> None:
    with pytest.raises(UserError, match=r"at a fixed revision only: REVISION=... is a commit"):
        timm_models.obtain(ARCHITECTURE, None, revision)
    assert served.requests == []


def test_a_revision_that_the_hub_does_not_have_is_named(served: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answered 404 .*with safetensors, at this revision"):
        hub.fetch(REPOSITORY, REVISION[::-1], tmp_path)
    assert served.requests


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"more": torch.zeros(1)}, f"does not fit {ARCHITECTURE} with 3 classes"),
        ({"fc.weight": None}, "it has no fc.weight.* MODEL_FILE=model.onnx"),
        ({"fc.bias": torch.tensor([0, 0, torch.inf])}, "pth: fc.bias holds values .* not finite"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(
    changed: dict[str, torch.Tensor | None], message: str, model: nn.Module, tmp_path: Path
) -> None:
    state_dict = {k: v for k, v in {**model.state_dict(), **changed}.items() if v is not None}
    torch.save(state_dict, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=message):
        timm_models.obtain(ARCHITECTURE, tmp_path / "mine.pth", None)


def test_a_size_that_a_model_cannot_take_is_rejected(tmp_path: Path) -> None:
    vit, name = timm.create_model("vit_tiny_patch16_224"), "timm/vit_tiny_patch16_224"
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    mine = timm_models.obtain(name, tmp_path / "vit.pth", None)
    preprocessing = timm_models.preprocessing_of(name, Said(crop=64))
    with pytest.raises(UserError, match=r"cannot take pictures of 64 x 64 pixels.* another CROP"):
        timm_models.build(mine, preprocessing, model_store=tmp_path)


def test_a_crop_larger_than_the_image_is_rejected_unless_overridden() -> None:
    name = "timm/volo_d4_448.sail_in1k"
    with pytest.raises(UserError, match=r"crop 448 is larger than resize 389. RESIZE, CROP, MEAN"):
        timm_models.preprocessing_of(name, Said())
    mine = timm_models.preprocessing_of(name, Said(resize=512, crop=448))
    assert (mine.resize, mine.crop, mine.interpolation) == (512, 448, "bicubic")
    assert timm_models.preprocessing_of(name, Said(fit="squash")).resize == 448


def test_a_revision_is_rejected_if_weights_are_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"REVISION is of weights on the hub. Leave it out"):
        make_archive(arch=ARCHITECTURE, weights=tmp_path / "mine.pth", revision=REVISION)


def test_similar_names_are_suggested_for_an_unknown_one() -> None:
    with pytest.raises(UserError, match=r"no model 'resnet51'. Alike are: .*timm/resnet5"):
        timm_models.preprocessing_of("timm/resnet51", Said())
    with pytest.raises(UserError, match="built by make archive ARCH=timm/resnet50; then make"):
        check_architecture("timm/resnet50")


@pytest.mark.parametrize(
    "name",
    ["densenet121.ra_in1k", "resnet50.a1_in1k", "test_vit.r160_in1k", "mixer_b16_224.goog_in21k"],
)
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    preprocessing, theirs = (
        timm_models.preprocessing_of(f"timm/{name}", Said()),
        timm_transform(name),
    )
    normalize = Normalized(nn.Identity(), preprocessing)
    for title, image in list(photographs())[::17]:
        rgb = image.convert("RGB")
        pixels = decode(encode(rgb), preprocessing, PixelBudget(10**8))
        mine = normalize(torch.from_numpy(pixels)[None])[0]
        assert np.allclose(mine, theirs(rgb), atol=1e-6), title
