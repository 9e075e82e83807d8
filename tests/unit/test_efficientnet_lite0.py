"""EfficientNet-Lite0: the weights of a package are verified, named as timm does, and licensed."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm

from scripts import run
from scripts.build import pipeline
from scripts.build.model_file import ModelFile, from_options
from scripts.build.sources import efficientnet_lite0 as lite0
from scripts.build.sources import graph, torchvision
from scripts.build.sources.source import HostUnreachableError
from scripts.terminal import UserError

SPEC = from_options(arch="efficientnet_lite0")


@pytest.fixture
def own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, found in the place of the installed one; its file of weights."""
    installed = distribution(lite0.PACKAGE)
    for file in installed.files or ():
        source, target = Path(str(installed.locate_file(file))), tmp_path / "site" / str(file)
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    stamp = tmp_path / "installed-lite0"
    stamp.touch()
    monkeypatch.setattr(lite0, "stamp_of", lambda _: stamp)
    # The real one is installed: nothing is to be installed here.
    monkeypatch.setattr(lite0, "require", lambda *_, **__: None)
    return tmp_path / "site" / lite0.FILE


def test_the_packaged_weights_are_every_tensor_of_timms_model_and_carry_their_license() -> None:
    model = graph.open_source(SPEC)
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert {name: values.shape for name, values in model.weights.items()} == shapes
    assert (model.architecture, model.outputs) == ("efficientnet_lite0", 1000)
    assert model.sha256 == lite0.SHA256
    with pytest.raises(KeyError):
        lite0.timm_key("_unknown.weight")
    assert "Apache" in model.notice
    assert "Copyright (c) 2020, ML Illustrated" in model.notice
    assert "Changes: converted to ONNX" in model.notice


def test_damaged_weights_are_rejected_and_the_package_is_removed(own_copy: Path) -> None:
    content = bytearray(own_copy.read_bytes())
    content[len(content) // 2] ^= 1
    own_copy.write_bytes(content)
    with pytest.raises(UserError, match=r"its SHA-256 begins with .*, not 57934424.*was removed"):
        graph.open_source(SPEC)
    site = own_copy.parents[2]
    assert list(site.iterdir()) == []
    assert not (site.parent / "installed-lite0").exists()


def test_without_the_package_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lite0, "PACKAGE", "no-such-package-as-this")
    with pytest.raises(UserError, match="make setup-lite0"):
        graph.open_source(SPEC)


def test_an_http_error_of_the_official_host_is_a_reason_to_fall_back_but_not_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    built: list[tuple[ModelFile, str]] = []
    real = pipeline.build

    def build(spec: ModelFile, trained_model: str = "") -> Path:
        if spec.weights != "random" and spec.arch != "efficientnet_lite0":
            real(spec, tmp_path)
        built.append((spec, trained_model))
        return tmp_path / f"{spec.name}.mar"

    monkeypatch.setattr(run, "build", build)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as host:  # answers 501
        threading.Thread(target=host.serve_forever).start()
        url = f"http://127.0.0.1:{host.server_port}/squeezenet1_1-b8a52dc0.pth"
        monkeypatch.setattr(torchvision, "official_weights", lambda _: SimpleNamespace(url=url))
        spec = from_options(arch="squeezenet1_1")
        names = [path.stem for path in run._build(spec)]
        assert names == ["efficientnet_lite0", "squeezenet1_1"]
        assert built[1] == (spec.replace(weights="random"), "efficientnet_lite0")
        assert "answered 501" in capsys.readouterr().out
        with pytest.raises(UserError, match="answered 501"):
            run._build(spec.replace(weights=url))
        host.shutdown()


def test_without_a_sound_package_only_random_weights_are_served(
    own_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_copy.write_bytes(b"damaged")
    real = pipeline.build

    def build(spec: ModelFile, **_: str) -> Path:
        if spec.arch == "densenet121" and spec.weights is None:
            raise HostUnreachableError("cannot be reached.")
        return Path("random") if spec.weights == "random" else real(spec, own_copy.parent)

    monkeypatch.setattr(run, "build", build)
    assert run._build(from_options(arch="densenet121")) == [Path("random")]
    printed = " ".join(capsys.readouterr().out.split())
    assert "UNTRAINED random weights" in printed
    assert "is damaged or not the expected file" in printed
