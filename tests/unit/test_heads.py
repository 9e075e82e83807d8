"""Heads of one's own: recognised, said by a person, or refused with a sentence."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from handler.cores import Cores
from handler.engines import load_engine
from scripts.build.archive import build, recipe
from scripts.build.weights import Weights, build_model, load
from scripts.samples import sample_batch
from scripts.store import read_card
from scripts.terminal import UserError

CLASSES = 3
PLACES = {
    "resnet18": ("fc", 512),
    "mobilenet_v2": ("classifier", 1280),
    "mobilenet_v3_small": ("classifier.3", 1024),
    "shufflenet_v2_x0_5": ("fc", 1024),
}


def saved(
    folder: Path,
    *layers: nn.Module,
    architecture: str = "resnet18",
    place: str = "",
    named: Any = None,
) -> tuple[nn.Module, Path]:
    """A model with such a head, and the file that `torch.save` makes of it.

    Args:
        folder: for the file.
        layers: of the head.
        architecture: of all but the head.
        place: of the head where it is not that of `PLACES`.
        named: the layers by their names instead.
    """
    torch.manual_seed(5)
    model: nn.Module = get_model(architecture, weights=None)
    model.set_submodule(
        place or PLACES[architecture][0], nn.Sequential(named) if named else nn.Sequential(*layers)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    torch.save(model.state_dict(), folder / "mine.pth")
    return model.eval(), folder / "mine.pth"


def largest_difference(model: nn.Module, weights: Weights) -> float:
    picture = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((model(picture) - build_model(weights)(picture)).abs().max())


@pytest.mark.parametrize("architecture", PLACES)
def test_dropout_and_a_linear_layer_are_the_architectures_own(
    architecture: str, tmp_path: Path
) -> None:
    features = PLACES[architecture][1]
    head = nn.Dropout(), nn.Linear(features, CLASSES)
    model, path = saved(tmp_path, *head, architecture=architecture)
    weights = load(path, architecture)
    assert (weights.head, weights.classes) == ("", CLASSES)
    assert largest_difference(model, weights) == 0


def test_layers_that_are_linear_together_become_one(tmp_path: Path) -> None:
    model, path = saved(
        tmp_path, nn.BatchNorm1d(512), nn.Linear(512, 64), nn.Linear(64, CLASSES, bias=False)
    )
    weights = load(path, "resnet18")
    assert (weights.head, weights.classes) == ("", CLASSES)
    assert largest_difference(model, weights) < 1e-5


@pytest.mark.parametrize(
    ("said", "layers"),
    [
        ("linear,relu,dropout,linear", [nn.ReLU(), nn.Dropout()]),
        ("Linear, GELU, Linear, LogSoftmax", [nn.GELU()]),
        ("linear,batchnorm1d,hardswish,linear", [nn.BatchNorm1d(64), nn.Hardswish()]),
        ("linear,layer_norm,tanh,linear", [nn.LayerNorm(64), nn.Tanh()]),
    ],
)
def test_what_a_person_says_of_a_head_is_served(
    said: str, layers: list[nn.Module], tmp_path: Path
) -> None:
    model, path = saved(tmp_path, nn.Linear(512, 64), *layers, nn.Linear(64, CLASSES))
    with pytest.raises(UserError, match=r"resnet18 with a fc of its own .*cannot be seen.* HEAD="):
        load(path, "resnet18")
    weights = load(path, "resnet18", said)
    assert weights.head.startswith("fc=linear:512:64,")
    assert largest_difference(model, weights) == 0


def test_the_layers_of_named_heads_are_told_by_their_order(tmp_path: Path) -> None:
    """As a widespread course has them."""
    names = OrderedDict(fc1=nn.Linear(512, 8), relu=nn.ReLU(), out=nn.Linear(8, CLASSES))
    model, path = saved(tmp_path, named=names)
    weights = load(path, "resnet18", "linear,relu,linear")
    assert weights.head == f"fc=linear:512:8,relu,linear:8:{CLASSES}"
    assert largest_difference(model, weights) == 0


@pytest.mark.parametrize(
    ("head", "shown", "said"),
    [
        (
            [nn.Linear(512, 64), nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Linear(64, CLASSES))],
            "0: linear, 512 to 64; 1.2: linear",
            "linear,relu,dropout,linear",
        ),
        (
            [nn.Sequential(nn.Linear(512, 64), nn.Tanh()), nn.Linear(64, CLASSES)],
            "0.0: linear, 512 to 64; 1: linear",
            "linear,tanh,linear",
        ),
        (
            {"0": nn.Linear(512, 64), "act": nn.GELU(), "out": nn.Linear(64, CLASSES)},
            "0: linear, 512 to 64; out: linear",
            "linear,gelu,linear",
        ),
    ],
)
def test_an_activation_can_stand_beside_any_layer_that_is_no_neighbour_by_number(
    head: Any, shown: str, said: str, tmp_path: Path
) -> None:
    named = OrderedDict(head) if isinstance(head, dict) else None
    model, path = saved(tmp_path, *([] if named else head), named=named)
    with pytest.raises(UserError, match=rf"{shown}.* HEAD=linear,relu,linear, just so"):
        load(path, "resnet18")
    weights = load(path, "resnet18", said)
    assert largest_difference(model, weights) == 0


@pytest.mark.parametrize(
    ("head", "layer", "said"),
    [
        ([nn.Tanh(), nn.Linear(512, CLASSES)], "fc.1", "tanh,linear"),
        ([nn.SELU(), nn.Dropout(), nn.Linear(512, CLASSES)], "fc.2", "selu,dropout,linear"),
        ({"act": nn.Tanh(), "out": nn.Linear(512, CLASSES)}, "fc.out", "tanh,linear"),
    ],
)
def test_what_is_taken_as_dropout_is_said_and_can_be_corrected(
    head: Any, layer: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = OrderedDict(head) if isinstance(head, dict) else None
    model, path = saved(tmp_path, *([] if named else head), named=named)
    assert not load(path, "resnet18").head
    output = " ".join(capsys.readouterr().out.split())
    assert f"before {layer} in mine.pth is taken as dropout" in output
    assert f"HEAD=relu,{said.partition(',')[2]}" in output
    assert largest_difference(model, load(path, "resnet18", said)) == 0
    assert "dropout" not in capsys.readouterr().out


def test_nothing_is_assumed_where_nothing_can_stand_before_a_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = saved(tmp_path, nn.Linear(512, CLASSES))
    load(path, "resnet18")
    assert "dropout" not in capsys.readouterr().out


def test_layers_of_a_nested_sequential_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Whatever their order in the file: a safetensors file keeps none."""
    inner = [nn.Linear(512, 8), nn.Tanh(), *[nn.Dropout()] * 8, nn.Linear(8, CLASSES)]
    inner[2] = nn.Linear(8, 8)
    model, _ = saved(tmp_path, nn.Sequential(*inner))
    torch.save(dict(sorted(model.state_dict().items())), tmp_path / "sorted.pth")
    weights = load(tmp_path / "sorted.pth", "resnet18", "linear,tanh,linear,linear")
    assert largest_difference(model, weights) == 0


def test_a_file_that_keeps_no_order_must_have_numbers(tmp_path: Path) -> None:
    layers = nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Linear(512, CLASSES)
    said = "linear,tanh,linear,linear"
    model, _ = saved(tmp_path, *layers)
    save_file(model.state_dict(), tmp_path / "numbers.safetensors")
    weights = load(tmp_path / "numbers.safetensors", "resnet18", said)
    assert largest_difference(model, weights) == 0
    named = OrderedDict(zip(("one", "act", "two", "out"), layers, strict=True))
    model, _ = saved(tmp_path, named=named)
    save_file(model.state_dict(), tmp_path / "names.safetensors")
    with pytest.raises(UserError, match=r"do not tell the order .* with torch\.save"):
        load(tmp_path / "names.safetensors", "resnet18", said)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(512))


@pytest.mark.parametrize(
    ("layers", "said", "message"),
    [
        ([nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3)], None, "0: linear, 512 to 8; 2: linear"),
        ([nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3)], "linear,relu6", "does not fit"),
        ([nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3)], "linear,snake", "no layer 'snake'"),
        ([Unknown(), nn.Linear(512, 3)], None, r"0: scale.*MODEL_FILE=model.onnx"),
        ([nn.Linear(100, 3)], None, "does not take what resnet18 gives"),
        ([nn.BatchNorm1d(100), nn.Linear(512, 3)], None, "does not take what resnet18 gives"),
        ([nn.Linear(512, 8), nn.Linear(9, 3)], None, "does not take what resnet18 gives"),
        ([nn.Linear(512, 3), nn.BatchNorm1d(3)], None, "the last with parameters a linear"),
    ],
)
def test_a_head_that_is_not_certain_gets_a_sentence(
    layers: list[nn.Module], said: str | None, message: str, tmp_path: Path
) -> None:
    _, path = saved(tmp_path, *layers)
    with pytest.raises(UserError, match=message):
        load(path, "resnet18", said)


def test_features_that_are_no_flat_row_need_a_flatten(tmp_path: Path) -> None:
    model, path = saved(
        tmp_path,
        *(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, CLASSES)),
        architecture="convnext_tiny",
        place="classifier",
    )
    message = r"does not take what convnext_tiny gives it: .*: HEAD=flatten,batchnorm,linear"
    for said in (None, "dropout,batchnorm,linear"):
        with pytest.raises(UserError, match=message):
            load(path, "convnext_tiny", said)
    weights = load(path, "convnext_tiny", "flatten,batchnorm,linear")
    assert largest_difference(model, weights) == 0


def test_other_channels_are_named(tmp_path: Path) -> None:
    model = get_model("resnet18", num_classes=CLASSES)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"grey.pth takes pictures of 1 channel.*conv1.weight"):
        load(tmp_path / "grey.pth", "resnet18")


@pytest.mark.slow
def test_the_architecture_of_a_head_of_ones_own_is_suggested(tmp_path: Path) -> None:
    _, path = saved(tmp_path, nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    with pytest.raises(UserError, match="All but its head is resnet18's: ARCH=resnet18"):
        load(path, "densenet121")


def test_head_is_refused_where_there_is_none(tmp_path: Path) -> None:
    torch.save(get_model("resnet18", num_classes=CLASSES).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="Leave HEAD out"):
        load(tmp_path / "plain.pth", "resnet18", "linear")


def test_a_head_of_the_architectures_sizes_can_have_other_activations(tmp_path: Path) -> None:
    layers = nn.Linear(576, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, CLASSES)
    model, path = saved(tmp_path, *layers, architecture="mobilenet_v3_small", place="classifier")
    assert not load(path, "mobilenet_v3_small").head
    weights = load(path, "mobilenet_v3_small", "linear,relu,dropout,linear")
    assert weights.head == f"classifier=linear:576:1024,relu,dropout,linear:1024:{CLASSES}"
    assert largest_difference(model, weights) == 0
    with pytest.raises(
        UserError, match=r"usual sizes, .*0: linear, .*; 3: linear, .* does not fit"
    ):
        load(path, "mobilenet_v3_small", "linear,relu,linear")


def test_what_stands_before_an_architectures_only_layer_can_be_said(tmp_path: Path) -> None:
    layers = nn.Tanh(), nn.Linear(1280, CLASSES)
    model, path = saved(tmp_path, *layers, architecture="mobilenet_v2")
    assert not load(path, "mobilenet_v2", "dropout,linear").head
    weights = load(path, "mobilenet_v2", "tanh,linear")
    assert weights.head == f"classifier=tanh,linear:1280:{CLASSES}"
    assert largest_difference(model, weights) == 0


@pytest.mark.parametrize("middle", [[], [nn.Linear(512, 8), nn.ReLU()]])
def test_one_output_tells_two_classes_apart(middle: list[nn.Module], tmp_path: Path) -> None:
    features = 8 if middle else 512
    model, path = saved(tmp_path, *middle, nn.Linear(features, 1))
    weights = load(path, "resnet18", "linear,relu,linear" if middle else None)
    (tmp_path / "classes.txt").write_text("healthy\n")
    with pytest.raises(UserError, match="one output: it tells two classes apart"):
        recipe(weights, "ill", tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("healthy\nill\n")
    two = recipe(weights, "ill", tmp_path / "classes.txt").weights
    picture = torch.randn(3, 3, 224, 224)
    with torch.inference_mode():
        expected = model(picture).sigmoid()[:, 0]
        got = build_model(two)(picture).softmax(1)[:, 1]
    assert torch.allclose(got, expected, atol=1e-6)


def test_pytorch_serves_a_head_of_ones_own_too(tmp_path: Path) -> None:
    model, path = saved(tmp_path, nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    weights = load(path, "resnet18", "linear,relu,linear")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    mine = recipe(weights, "mine", tmp_path / "classes.txt", engine="torch")

    archive = build(mine, tmp_path)
    card = read_card(archive)
    assert card is not None
    assert card.head == "fc=linear:512:8,relu,linear:8:3"
    torch.save(weights.state_dict, tmp_path / "model.pth")
    engine = load_engine(tmp_path / "model.pth", card, Cores(1, 1, tmp_path / "busy"))
    images = sample_batch(mine.preprocessing)[:2]
    mean, std = (
        np.array(v, np.float32).reshape(3, 1, 1)
        for v in (mine.preprocessing.mean, mine.preprocessing.std)
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy((images.astype(np.float32) / 255 - mean) / std)).numpy()
    assert np.abs(engine.logits(images) - expected).max() < 1e-4
