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
from scripts.build.commands import main
from scripts.build.export import Normalized
from scripts.build.packing import Said
from scripts.terminal import UserError
from tests.pictures import encode, photographs
from tests.timm_transforms import timm_transform

ARCHITECTURE = "timm/test_resnet.r160_in1k"
REPOSITORY = "timm/test_resnet.r160_in1k"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As the hub answers: a redirect that says the file's SHA-256, then the file."""

    content = b""
    digest = ""
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
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

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


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
    Hub.digest, Hub.asked = hashlib.sha256(Hub.content).hexdigest(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def kept(folder: Path) -> list[Path]:
    return [path for path in (folder / "home").rglob("*") if path.is_file()]


def test_weights_of_the_hub_are_fetched_once_and_fit(
    served: type[Hub], model: nn.Module, tmp_path: Path
) -> None:
    found = timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert (found.classes, found.sha256) == (3, served.digest)
    state_dict = model.state_dict()
    assert all(torch.equal(v, state_dict[k]) for k, v in found.module.state_dict().items())
    asked = len(served.asked)
    timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert len(served.asked) == asked, "the second time from the disk"
    (file,) = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert timm_models.obtain(ARCHITECTURE, None, REVISION).sha256 == served.digest
    assert len(served.asked) > asked, "a damaged file is fetched again"


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ("0" * 64, "is not the expected file.*thrown away"),
        ("", "does not say the file's SHA-256"),
        ("cut", "the connection was lost.*Run the same command again"),
    ],
)
def test_what_is_not_the_file_is_not_kept(
    digest: str, message: str, served: type[Hub], tmp_path: Path
) -> None:
    served.digest = digest
    with pytest.raises(UserError, match=message):
        timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("revision", [None, "main", REVISION[:7], REVISION.upper()])
def test_a_revision_that_can_change_is_refused(revision: str | None, served: type[Hub]) -> None:
    with pytest.raises(UserError, match=r"at a fixed revision only: REVISION=... is a commit"):
        timm_models.obtain(ARCHITECTURE, None, revision)
    assert served.asked == []


def test_what_the_hub_does_not_have_is_said(served: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answered 404 .*with safetensors, at this revision"):
        hub.fetch(REPOSITORY, REVISION[::-1], tmp_path)
    assert served.asked


@pytest.mark.usefixtures("served")
def test_a_hub_that_cannot_be_reached_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached.*WEIGHTS=path"):
        timm_models.obtain(ARCHITECTURE, None, REVISION)
    assert kept(tmp_path) == []


def test_weights_that_do_not_fit_are_refused(model: nn.Module, tmp_path: Path) -> None:
    state_dict = dict(model.state_dict())
    torch.save({**state_dict, "more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"does not fit timm/test_resnet.r160_in1k with 3 classes"):
        timm_models.obtain(ARCHITECTURE, tmp_path / "more.pth", None)
    torch.save({"head.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"it has no fc.weight.* MODEL_FILE=model.onnx"):
        timm_models.obtain(ARCHITECTURE, tmp_path / "other.pth", None)
    torch.save({**state_dict, "fc.bias": torch.tensor([0, 0, torch.inf])}, tmp_path / "inf.pth")
    with pytest.raises(UserError, match=r"inf.pth: fc.bias holds values that are not finite"):
        timm_models.obtain(ARCHITECTURE, tmp_path / "inf.pth", None)


def test_another_size_than_a_model_takes_is_refused(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    name = "timm/vit_tiny_patch16_224"
    mine = timm_models.obtain(name, tmp_path / "vit.pth", None)
    preprocessing = timm_models.preprocessing_of(name, Said(crop=64))
    with pytest.raises(UserError, match=r"cannot take pictures of 64 x 64 pixels.* another CROP"):
        timm_models.build(mine, preprocessing, model_store=tmp_path)


def test_a_square_larger_than_the_picture_is_refused_unless_another_is_said() -> None:
    name = "timm/volo_d4_448.sail_in1k"
    with pytest.raises(UserError, match=r"crop 448 is larger than resize 389. RESIZE, CROP, MEAN"):
        timm_models.preprocessing_of(name, Said())
    mine = timm_models.preprocessing_of(name, Said(resize=512, crop=448))
    assert (mine.resize, mine.crop, mine.interpolation) == (512, 448, "bicubic")
    assert timm_models.preprocessing_of(name, Said(fit="squash")).resize == 448


def test_a_revision_is_refused_where_weights_are_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"REVISION is of weights on the hub. Leave it out"):
        main(arch=ARCHITECTURE, weights=tmp_path / "mine.pth", revision=REVISION)


def test_names_that_timm_does_not_have_get_similar_ones() -> None:
    with pytest.raises(UserError, match=r"no model 'resnet51'. Alike are: .*timm/resnet5"):
        timm_models.preprocessing_of("timm/resnet51", Said())
    with pytest.raises(UserError, match="built by make archive ARCH=timm/resnet50; then make"):
        check_architecture("timm/resnet50")


@pytest.mark.parametrize(
    "name",
    ["densenet121.ra_in1k", "resnet50.a1_in1k", "test_vit.r160_in1k", "mixer_b16_224.goog_in21k"],
)
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    preprocessing = timm_models.preprocessing_of(f"timm/{name}", Said())
    theirs = timm_transform(name)
    normalize = Normalized(nn.Identity(), preprocessing)
    for title, image in list(photographs())[::17]:
        rgb = image.convert("RGB")
        pixels = decode(encode(rgb), preprocessing, PixelBudget(10**8))
        mine = normalize(torch.from_numpy(pixels)[None])[0]
        assert np.allclose(mine, theirs(rgb), atol=1e-6), title
