"""Custom heads: recognized, described with HEAD, or rejected with the reason."""

from collections.abc import Sequence
from pathlib import Path

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
SMALL = "shufflenet_v2_x0_5"  # 5 MB; its head is `fc`
FEATURES = 1024

Head = Sequence[nn.Module] | dict[str, nn.Module]


def saved(
    folder: Path, head: Head, architecture: str = SMALL, place: str = "fc"
) -> tuple[nn.Module, Path]:
    """Return a model with such a head, and the file that `torch.save` writes of it."""
    torch.manual_seed(5)
    model: nn.Module = get_model(architecture, weights=None)
    layers = nn.Sequential()
    for name, layer in head.items() if isinstance(head, dict) else enumerate(head):
        layers.add_module(str(name), layer)
    model.set_submodule(place, layers)
    for module in layers.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    torch.save(model.state_dict(), folder / "mine.pth")
    return model.eval(), folder / "mine.pth"


def largest_difference(model: nn.Module, weights: Weights) -> float:
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((model(images) - build_model(weights)(images)).abs().max())


def linear(inputs: int, outputs: int = CLASSES) -> nn.Module:
    return nn.Linear(inputs, outputs)


def wide(*between: nn.Module) -> list[nn.Module]:
    return [linear(FEATURES, 64), *between, linear(64)]


@pytest.mark.parametrize(
    ("architecture", "place", "head", "largest"),
    [
        ("resnet18", "fc", [nn.Dropout(), linear(512)], 0),
        ("mobilenet_v2", "classifier", [nn.Dropout(), linear(1280)], 0),
        ("mobilenet_v3_small", "classifier.3", [nn.Dropout(), linear(1024)], 0),
        (SMALL, "fc", [nn.Dropout(), linear(FEATURES)], 0),
        (SMALL, "fc", [nn.BatchNorm1d(FEATURES), linear(FEATURES, 64), linear(64)], 1e-5),
    ],
)
def test_layers_that_are_one_linear_layer_together_need_no_head(
    architecture: str, place: str, head: Head, largest: float, tmp_path: Path
) -> None:
    model, path = saved(tmp_path, head, architecture, place)
    weights = load(path, architecture)
    assert (weights.head, weights.classes) == ("", CLASSES)
    assert largest_difference(model, weights) <= largest


@pytest.mark.parametrize(
    ("head", "shown", "said"),
    [
        (wide(nn.ReLU(), nn.Dropout()), "", "linear,relu,dropout,linear"),
        (wide(nn.GELU()), "", "Linear, GELU, Linear, LogSoftmax"),
        (wide(nn.BatchNorm1d(64), nn.Hardswish()), "", "linear,batchnorm1d,hardswish,linear"),
        (wide(nn.LayerNorm(64), nn.Tanh()), "", "linear,layer_norm,tanh,linear"),
        (
            {"fc1": linear(FEATURES, 64), "relu": nn.ReLU(), "out": linear(64)},
            "",
            "linear,relu,linear",
        ),
        (
            [linear(FEATURES, 64), nn.Sequential(nn.ReLU(), nn.Dropout(), linear(64))],
            r"0: linear, 1024 to 64; 1.2: linear.* HEAD=linear,relu,linear, just so",
            "linear,relu,dropout,linear",
        ),
        (
            [nn.Sequential(linear(FEATURES, 64), nn.Tanh()), linear(64)],
            r"0.0: linear, 1024 to 64; 1: linear.* HEAD=linear,relu,linear, just so",
            "linear,tanh,linear",
        ),
        (
            {"0": linear(FEATURES, 64), "act": nn.GELU(), "out": linear(64)},
            r"0: linear, 1024 to 64; out: linear.* HEAD=linear,relu,linear, just so",
            "linear,gelu,linear",
        ),
    ],
)
def test_activations_that_a_file_does_not_name_are_asked_for_and_served(
    head: Head, shown: str, said: str, tmp_path: Path
) -> None:
    model, path = saved(tmp_path, head)
    message = shown or rf"{SMALL} with a fc of its own .*cannot be seen.* HEAD="
    with pytest.raises(UserError, match=message):
        load(path, SMALL)
    weights = load(path, SMALL, said)
    assert weights.head.startswith("fc=linear:1024:64,")
    assert largest_difference(model, weights) == 0


@pytest.mark.parametrize(
    ("head", "layer", "said"),
    [
        ([nn.Tanh(), linear(FEATURES)], "fc.1", "tanh,linear"),
        ([nn.SELU(), nn.Dropout(), linear(FEATURES)], "fc.2", "selu,dropout,linear"),
        ({"act": nn.Tanh(), "out": linear(FEATURES)}, "fc.out", "tanh,linear"),
    ],
)
def test_a_layer_that_is_assumed_to_be_dropout_is_reported_and_can_be_overridden(
    head: Head, layer: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = saved(tmp_path, head)
    assert not load(path, SMALL).head
    output = " ".join(capsys.readouterr().out.split())
    assert f"before {layer} in mine.pth is taken as dropout" in output
    assert f"HEAD=relu,{said.partition(',')[2]}" in output
    assert largest_difference(model, load(path, SMALL, said)) == 0
    assert "dropout" not in capsys.readouterr().out


def test_nothing_is_assumed_if_no_layer_can_stand_before_the_linear_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(saved(tmp_path, [linear(FEATURES)])[1], SMALL)
    assert "dropout" not in capsys.readouterr().out


def test_numbered_layers_are_in_the_order_of_their_numbers_whatever_the_order_in_the_file(
    tmp_path: Path,
) -> None:
    """There are more than nine, so that their order as text is another one."""
    inner = [linear(FEATURES, 8), nn.Tanh(), linear(8, 8), *[nn.Dropout()] * 7, linear(8)]
    model, _ = saved(tmp_path, [nn.Sequential(*inner)])
    torch.save(dict(sorted(model.state_dict().items())), tmp_path / "sorted.pth")
    weights = load(tmp_path / "sorted.pth", SMALL, "linear,tanh,linear,linear")
    assert largest_difference(model, weights) == 0


def test_layers_in_safetensors_must_be_numbered_since_the_format_keeps_no_order(
    tmp_path: Path,
) -> None:
    layers = linear(FEATURES, 64), nn.Tanh(), linear(64, 64), linear(64)
    file, said = tmp_path / "model.safetensors", "linear,tanh,linear,linear"
    model, _ = saved(tmp_path, layers)
    save_file(model.state_dict(), file)
    assert largest_difference(model, load(file, SMALL, said)) == 0
    model, _ = saved(tmp_path, dict(zip(("one", "act", "two", "out"), layers, strict=True)))
    save_file(model.state_dict(), file)
    with pytest.raises(UserError, match=r"do not tell the order .* with torch\.save"):
        load(file, SMALL, said)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))


@pytest.mark.parametrize(
    ("head", "said", "message"),
    [
        (wide(nn.ReLU()), None, "0: linear, 1024 to 64; 2: linear"),
        (wide(nn.ReLU()), "linear,relu6", "does not fit"),
        (wide(nn.ReLU()), "linear,snake", "no layer 'snake'"),
        ([Unknown(), linear(FEATURES)], None, r"0: scale.*MODEL_FILE=model.onnx"),
        ([linear(100)], None, f"does not take what {SMALL} gives"),
        ([nn.BatchNorm1d(100), linear(FEATURES)], None, f"does not take what {SMALL} gives"),
        ([linear(FEATURES, 8), linear(9)], None, f"does not take what {SMALL} gives"),
        ([linear(FEATURES), nn.BatchNorm1d(3)], None, "the last with parameters a linear"),
    ],
)
def test_a_head_that_is_not_certain_is_rejected_with_the_reason(
    head: Head, said: str | None, message: str, tmp_path: Path
) -> None:
    _, path = saved(tmp_path, head)
    with pytest.raises(UserError, match=message):
        load(path, SMALL, said)


def test_features_of_several_dimensions_need_a_flatten(tmp_path: Path) -> None:
    name = "convnext_tiny"
    head = nn.Flatten(), nn.BatchNorm1d(768), linear(768)
    model, path = saved(tmp_path, head, name, "classifier")
    message = rf"does not take what {name} gives it: .*: HEAD=flatten,batchnorm,linear"
    for said in (None, "dropout,batchnorm,linear"):
        with pytest.raises(UserError, match=message):
            load(path, name, said)
    assert largest_difference(model, load(path, name, "flatten,batchnorm,linear")) == 0


def test_weights_for_gray_images_are_rejected_by_their_first_layer(tmp_path: Path) -> None:
    model = get_model("resnet18", num_classes=CLASSES)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    torch.save(model.state_dict(), tmp_path / "gray.pth")
    with pytest.raises(UserError, match=r"gray.pth takes pictures of 1 channel.*conv1.weight"):
        load(tmp_path / "gray.pth", "resnet18")


@pytest.mark.slow
def test_the_architecture_is_suggested_if_all_but_the_head_is_its(tmp_path: Path) -> None:
    _, path = saved(tmp_path, wide(nn.ReLU()))
    with pytest.raises(UserError, match=f"All but its head is {SMALL}'s: ARCH={SMALL}"):
        load(path, "densenet121")


def test_a_head_is_rejected_for_a_single_layer(tmp_path: Path) -> None:
    torch.save(get_model(SMALL, num_classes=CLASSES).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="Leave HEAD out"):
        load(tmp_path / "plain.pth", SMALL, "linear")


@pytest.mark.parametrize(
    ("architecture", "usual", "head", "said", "expected"),
    [
        (
            "mobilenet_v3_small",
            None,
            [linear(576, 1024), nn.ReLU(), nn.Dropout(), linear(1024)],
            "linear,relu,dropout,linear",
            "classifier=linear:576:1024,relu,dropout,linear:1024:3",
        ),
        (
            "mobilenet_v2",
            "dropout,linear",
            [nn.Tanh(), linear(1280)],
            "tanh,linear",
            "classifier=tanh,linear:1280:3",
        ),
    ],
)
def test_activations_of_the_architectures_own_head_can_be_overridden(  # noqa: PLR0913, PLR0917
    architecture: str, usual: str | None, head: Head, said: str, expected: str, tmp_path: Path
) -> None:
    model, path = saved(tmp_path, head, architecture, "classifier")
    assert not load(path, architecture, usual).head
    weights = load(path, architecture, said)
    assert weights.head == expected
    assert largest_difference(model, weights) == 0
    with pytest.raises(UserError, match=r"usual sizes, .* does not fit"):
        load(path, architecture, f"{said},relu,linear")


@pytest.mark.parametrize(
    ("head", "said"),
    [([linear(FEATURES, 1)], None), ([*wide(nn.ReLU())[:2], linear(64, 1)], "linear,relu,linear")],
)
def test_one_output_distinguishes_two_classes(head: Head, said: str | None, tmp_path: Path) -> None:
    model, path = saved(tmp_path, head)
    weights, names = load(path, SMALL, said), tmp_path / "classes.txt"
    names.write_text("healthy\n")
    with pytest.raises(UserError, match="one output: it tells two classes apart"):
        recipe(weights, "ill", names)
    names.write_text("healthy\nill\n")
    two = build_model(recipe(weights, "ill", names).weights)
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images).sigmoid()[:, 0]
        assert torch.allclose(two(images).softmax(1)[:, 1], expected, atol=1e-6)


def test_pytorch_serves_a_custom_head(tmp_path: Path) -> None:
    model, path = saved(tmp_path, wide(nn.ReLU()))
    weights = load(path, SMALL, "linear,relu,linear")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    mine = recipe(weights, "mine", tmp_path / "classes.txt", engine="torch")
    card = read_card(build(mine, tmp_path))
    assert card is not None
    assert card.head == "fc=linear:1024:64,relu,linear:64:3"
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
