"""The two default architectures without PyTorch: the same model as PyTorch's own."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from handler.settings import Preprocessing
from scripts.build import export_graphs
from scripts.build.convert import convert
from scripts.build.export import write_onnx
from scripts.build.model_file import ModelFile, from_options
from scripts.build.onnx_model import read
from scripts.build.packing import BUILD
from scripts.build.pipeline import build
from scripts.build.sources import graph, open_source
from scripts.build.sources.graph import GRAPHS, GraphSource, file_of, random_source
from scripts.samples import sample_batch
from scripts.store import WEIGHTS_NOTICE, read_card
from scripts.terminal import UserError
from tests import onnx_files
from tests.unit.parts import archive

MAX_DIFFERENCE = 1e-6


def module_of(architecture: str, weights: Mapping[str, NDArray[np.generic]]) -> nn.Module:
    """Return PyTorch's module with these weights."""
    classes = len(weights["classifier.bias"])
    module = export_graphs.module_of(architecture)
    module.classifier = nn.Linear(weights["classifier.weight"].shape[1], classes)
    module.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    return module.eval()


def outputs(file: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(file))
    names = [output.name for output in session.get_outputs()]
    rows = [session.run(None, {"images": images[i : i + 1]}) for i in range(len(images))]
    return {
        n: np.concatenate(parts) for n, parts in zip(names, zip(*rows, strict=True), strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GRAPHS)
def test_the_graph_in_the_repository_is_what_the_locked_pytorch_exports(architecture: str) -> None:
    exported, kept = export_graphs.export(architecture), onnx.load(file_of(architecture))
    assert file_of(architecture).stat().st_size < 200_000
    assert kept.graph.SerializeToString() == exported.graph.SerializeToString()
    assert kept.opset_import == exported.opset_import
    expected = export_graphs.module_of(architecture).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert graph.template(architecture).shapes == shapes


@pytest.mark.slow
@pytest.mark.parametrize("architecture", GRAPHS)
@pytest.mark.parametrize(("classes", "crop"), [(1000, 224), (3, 288)])
def test_a_filled_graph_computes_what_pytorchs_export_computes(
    architecture: str, classes: int, crop: int, tmp_path: Path, note: list[str]
) -> None:
    """Logits, embeddings and features of 26 images, relative to the largest."""
    values = {**vars(GRAPHS[architecture].preprocessing), "crop": crop, "resize": crop}
    preprocessing = Preprocessing(**values)
    source = random_source(architecture, classes)
    module = module_of(architecture, source.weights)
    write_onnx(module, crop, tmp_path / "exported.onnx", architecture)
    card = archive(classes=classes, preprocessing=preprocessing).card
    noise = np.random.default_rng(0).integers(0, 256, (8, 3, crop, crop), dtype=np.uint8)
    images = np.concatenate([sample_batch(preprocessing), noise])
    models = {
        "exported": read(tmp_path / "exported.onnx"),
        "filled": source.to_onnx(preprocessing, tmp_path),
    }
    found = {}
    for name, model in models.items():
        file = tmp_path / name / "converted.onnx"
        file.parent.mkdir()
        assert convert(model, card, file, allow_saturated=True).classifier.exists()
        found[name] = outputs(file, images)
    assert found["filled"].keys() == found["exported"].keys() == {"logits", "embedding", "features"}
    for name, expected in found["exported"].items():
        difference = np.abs(found["filled"][name] - expected).max() / max(1, np.abs(expected).max())
        assert difference <= MAX_DIFFERENCE
        note.append(
            f"{architecture}, {classes} classes, {crop} pixels: {name} of {len(images)} images "
            f"differ by {difference:.1e} from PyTorch's export"
        )


def saved(state: Mapping[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("architecture", GRAPHS)
def test_fine_tuned_weights_of_another_number_of_classes_are_taken(
    architecture: str, tmp_path: Path
) -> None:
    weights = {n: torch.from_numpy(v) for n, v in random_source(architecture, 3).weights.items()}
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    file = saved({"model_state": prefixed, "epoch": 4}, tmp_path / "pets.pth")
    source = open_source(from_options(arch=architecture, weights=file))
    assert isinstance(source, GraphSource)
    assert (source.outputs, source.file, source.trained) == (3, "pets.pth", True)
    assert source.weights.keys() == weights.keys()
    assert all(np.array_equal(source.weights[n], t.numpy()) for n, t in weights.items())
    other = from_options(arch=({*GRAPHS} - {architecture}).pop(), weights=file)
    with pytest.raises(UserError, match=r"pets\.pth does not fit (densenet|efficientnet)"):
        open_source(other)


def test_a_crop_that_the_padding_of_the_graph_is_wrong_for_is_rejected(tmp_path: Path) -> None:
    source = random_source("efficientnet_lite0", 2)
    with pytest.raises(UserError, match="crop of efficientnet_lite0 must be a multiple of 32"):
        source.to_onnx(Preprocessing(resize=240, crop=240), tmp_path)


# Fails any import of PyTorch and of what evaluation needs.
_WITHOUT = """\
import sys
from pathlib import Path
for name in "torch torchvision onnxscript timm scipy sklearn matplotlib skimage".split():
    sys.modules[name] = None
import scripts.__main__
scripts.__main__.program()
import scripts.run
from scripts.build.model_file import ModelFile, from_options
from scripts.build.packing import BUILD
from scripts.build.pipeline import build
folder = Path(sys.argv[1])
build(from_options(arch="efficientnet_lite0", name="alone"), folder)
build(from_options(arch="densenet121", weights="random", name="untrained"), folder)
spec = from_options(arch="densenet121", weights=str(folder / "pets.pth"), classes=["a", "b"])
build(spec, folder)
preprocessing = {"resize": 72, "crop": 64, "mean": 0.5, "std": 0.25}
spec = from_options(model=folder / "mine.onnx", classes=[*"abcde"], preprocessing=preprocessing)
build(spec, folder)
"""


def test_archives_are_built_without_pytorch_and_are_the_same_as_with_it(tmp_path: Path) -> None:
    weights = random_source("densenet121", 2).weights
    saved({n: torch.from_numpy(v) for n, v in weights.items()}, tmp_path / "pets.pth")
    (tmp_path / "mine.onnx").write_bytes(onnx_files.model().SerializeToString())
    command = [sys.executable, "-c", _WITHOUT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch" in sys.modules
    for kept in BUILD.glob("converted-alone-*"):
        shutil.rmtree(kept)
    again = build(from_options(arch="efficientnet_lite0", name="alone"), tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "alone.mar").read_bytes()
    card = read_card(again)
    assert card is not None
    assert (card.trained, card.classes, card.embedding) == (True, 1000, 1280)
    assert card.features == "features"
    with zipfile.ZipFile(again) as content:
        assert "Apache" in content.read(WEIGHTS_NOTICE).decode()


@pytest.mark.parametrize("architecture", ["efficientnet_lite0", "resnet18"])
def test_random_weights_have_as_many_classes_as_a_model_file_lists(architecture: str) -> None:
    spec = ModelFile(name="pets", arch=architecture, weights="random", classes=["cat", "dog"])
    assert open_source(spec).outputs == 2
