"""Weights of training scripts fit their architecture, or are rejected with the reason."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import get_model

from scripts.build import state_dicts
from scripts.build.checkpoints import Checkpoint, StateDict, read_checkpoint
from scripts.build.sources import torchvision
from scripts.build.state_dicts import Fitted, Template, fit, load_into
from scripts.terminal import UserError

CLASSES = 3
Tensors = Mapping[str, Tensor]


class Net(nn.Module):
    """A small network with what large ones have: nested modules, batch normalization, a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, bias=False))
        self.fc = nn.Linear(8, classes)


SHAPES = {name: tensor.shape for name, tensor in Net(CLASSES).state_dict().items()}
NET = Template("net18", SHAPES | {"fc.weight": (2, 8), "fc.bias": (2,)}, ("fc",))
torch.manual_seed(2)
RAW = Net(CLASSES).state_dict()
AVERAGED = Net(CLASSES).state_dict()


def below(prefix: str, state: Tensors = RAW) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state: Tensors, old: str, new: str) -> dict[str, Tensor]:
    return {re.sub(old, new, name): tensor for name, tensor in state.items()}


Fit = Callable[..., Fitted]


@pytest.fixture
def fitted(tmp_path: Path) -> Fit:
    """Save weights to mine.pth, and fit those."""

    def save_and_fit(content: object, template: Template = NET, key: str | None = None) -> Fitted:
        torch.save(content, tmp_path / "mine.pth")
        return fit(read_checkpoint(tmp_path / "mine.pth"), template, key)

    return save_and_fit


def same(result: Mapping[str, NDArray[Any]], expected: Tensors) -> bool:
    return result.keys() == expected.keys() and all(
        np.array_equal(result[name], expected[name].numpy()) for name in expected
    )


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "net.backbone.", "timm_model.", "encoder.0.", "fc."]
)
def test_any_common_prefix_is_removed_and_noted(prefix: str, fitted: Fit) -> None:
    result = fitted({"state_dict": below(prefix)})
    assert same(result.state_dict, RAW)
    assert (result.classes, result.key) == (CLASSES, f"state_dict.{prefix[:-1]}")
    assert result.notes == (f"Removed the prefix {prefix} from the names.",)


def test_versions_of_layers_are_kept_without_the_prefix(fitted: Fit) -> None:
    net = Net(2)
    result = fitted(nn.Sequential(net).state_dict())
    metadata = net.state_dict()._metadata  # type: ignore[attr-defined]
    assert result.state_dict.versions == {name: at["version"] for name, at in metadata.items()}
    plain = fitted(below(""))
    assert plain.state_dict.versions == {}
    assert same(plain.state_dict, load_into(Net(CLASSES), plain).state_dict())


@pytest.mark.parametrize(
    "foreign",
    [
        {"criterion.weight": torch.ones(3), "ce_loss.pos_weight": torch.ones(3)},
        {"class_weights": torch.ones(3), "n_averaged": torch.tensor(4)},
        {"train_metrics.total": torch.tensor(4.0)},
        {"layer1.0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_losses_and_counters_are_left_out_and_named(
    foreign: dict[str, Tensor], prefix: str, fitted: Fit
) -> None:
    result = fitted(below(prefix) | foreign)
    assert same(result.state_dict, RAW)
    assert f"Left out, since they are no part of the model: {', '.join(foreign)}." in result.notes


@pytest.mark.parametrize(
    ("prefix", "name", "tensor"),
    [
        ("0.", "1.weight", torch.ones(2, 3)),
        ("0.", "1.running_mean", torch.ones(3)),
        ("model.", "normalize.mean", torch.ones(3)),
        ("model.", "temperature", torch.ones(1)),
        ("model.", "arcface_loss.weight", torch.ones(3, 8)),
        ("", "layer1.1.se.weight", torch.ones(8, 8, 1, 1)),
        ("", "layer1.1.loss.weight", torch.ones(8)),
        ("", "fc.scale", torch.ones(1)),
        ("", "attention.weight", torch.ones(8)),
    ],
)
def test_what_may_compute_is_rejected_by_name(
    prefix: str, name: str, tensor: Tensor, fitted: Fit
) -> None:
    message = rf"further layers that change its answers: {re.escape(name)} \[.*torch\.onnx\.export"
    with pytest.raises(UserError, match=message):
        fitted(below(prefix) | {name: tensor})


def test_another_part_under_another_key_is_left_out_only_if_a_key_is_chosen(fitted: Fit) -> None:
    parts = {"encoder": RAW, "classifier": {"weight": torch.ones(2, 3)}}
    with pytest.raises(UserError, match=r"further layers under classifier\..*WEIGHTS_KEY=encoder"):
        fitted(parts)
    assert same(fitted(parts, key="encoder").state_dict, RAW)


@pytest.mark.parametrize(
    ("content", "averaged", "raw"),
    [
        ({"model": RAW, "model_ema": AVERAGED}, "model_ema", "model"),
        ({"state_dict": RAW, "state_dict_ema": AVERAGED}, "state_dict_ema", "state_dict"),
        ({"net": RAW, "ema": below("module.", AVERAGED)}, "ema.module", "net"),
        ({"net": RAW, "swa": {"weights": AVERAGED}}, "swa.weights", "net"),
        (below("model.") | below("ema_model.module.", AVERAGED), "ema_model.module", "model"),
        (below("model.") | below("ema.model.", AVERAGED), "ema.model", "model"),
        (below("") | below("averaged.", AVERAGED), "averaged", "."),
    ],
)
def test_averaged_weights_are_taken_unless_the_key_of_the_raw_ones_is_given(
    content: Mapping[str, object], averaged: str, raw: str, fitted: Fit
) -> None:
    result = fitted(content)
    assert same(result.state_dict, AVERAGED)
    assert result.key == averaged
    assert f"Took the averaged weights, {averaged}. The raw ones: WEIGHTS_KEY={raw}" in result.notes
    assert same(fitted(content, key=raw).state_dict, RAW)
    assert same(fitted(content, key=averaged.partition(".")[0]).state_dict, AVERAGED)
    keys = rf"({re.escape(averaged)}, {re.escape(raw)}|{re.escape(raw)}, {re.escape(averaged)})"
    with pytest.raises(UserError, match=rf"no weights 'emma'\. WEIGHTS_KEY can be: {keys}\.$"):
        fitted(content, key="emma")


def test_incomplete_averaged_weights_are_not_taken(fitted: Fit) -> None:
    parameters = {name: t for name, t in AVERAGED.items() if "running" not in name}
    for content in ({"net": RAW, "ema": parameters}, below("net.") | below("ema.", parameters)):
        result = fitted(content)
        assert same(result.state_dict, RAW)
        note = "Took net, since the averaged weights, ema, are incomplete: it lacks"
        assert result.notes[0].startswith(note)


def test_several_models_are_not_guessed_among(fitted: Fit) -> None:
    for content in ({"student": RAW, "teacher": AVERAGED}, below("a.") | below("b.", AVERAGED)):
        with pytest.raises(UserError, match=r"several models.* WEIGHTS_KEY: (student|a), "):
            fitted(content)


@pytest.mark.parametrize(("new", "assumed"), [("fc.0.", 0), ("fc.1.", 1), ("fc.4.", 1)])
def test_a_last_layer_after_dropout_is_recognized(new: str, assumed: int, fitted: Fit) -> None:
    result = fitted(renamed(RAW, r"^fc\.", new))
    assert same(result.state_dict, RAW)
    note = f"Whatever comes before {new[:-1]} in fc is taken as dropout"
    assert sum(text.startswith(note) for text in result.notes) == assumed


def test_a_last_layer_may_have_one_output_or_no_bias(fitted: Fit) -> None:
    result = fitted({n: t for n, t in Net(1).state_dict().items() if n != "fc.bias"})
    assert result.classes == 1
    assert result.state_dict["fc.bias"].tolist() == [0]


HIDDEN = {"fc.0.weight": torch.ones(8, 8), "fc.2.weight": torch.ones(3, 8)}
WITHOUT_HEAD = {name: tensor for name, tensor in RAW.items() if "fc" not in name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer1.1.weight": torch.ones(8, 4, 3, 3)}, r"3 classes: layer1\.1\.weight has the"),
        ({"fc.weight": torch.ones(3, 9)}, r"fc\.weight has the shape \[3, 9\] instead of \[2, 8\]"),
        ({"fc.weight": torch.ones(0, 8)}, r"fc\.weight has the shape \[0, 8\]"),
        ({"fc.weight": torch.tensor(1.0)}, r"fc\.weight has the shape \[\]"),
        ({"conv1.weight": torch.ones(4, 1, 3, 3)}, "takes images of 1 channel.*Grayscale"),
        ({"fc.bias": torch.tensor([0, 1, torch.nan])}, r"fc\.bias holds values that are not"),
    ],
)
def test_tensors_of_other_shapes_or_values_are_rejected(
    changes: dict[str, Tensor], message: str, fitted: Fit
) -> None:
    with pytest.raises(UserError, match=rf"mine\.pth.*{message}"):
        fitted(RAW | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WITHOUT_HEAD, r"it lacks fc\.weight, fc\.bias\."),
        (WITHOUT_HEAD | HIDDEN, r"layers.*: fc\.0\.weight \[8, 8\], fc\.2\.weight.*it lacks fc"),
        (WITHOUT_HEAD | {"fc.x.weight": torch.ones(3, 8)}, r"it lacks fc\.weight"),
        ({"a.weight": torch.ones(1), "b": torch.eye(2)}, r"first names are a\.weight, b\."),
        ({"_conv_stem.weight": torch.ones(1)}, "efficientnet_pytorch"),
        ({"vit.embeddings.cls_token": torch.ones(1)}, "Hugging Face.*MODEL_FILE=folder with conf"),
        ({"resnet.embedder.embedder.x": torch.ones(1)}, "Hugging Face's names"),
        ({"conv_stem.weight": torch.ones(1)}, "ARCH=timm/NAME"),
        ({"patch_embed.proj.weight": torch.ones(1)}, "ARCH=timm/NAME"),
        ({"stages.0.blocks.0.x": torch.ones(1)}, "ARCH=timm/NAME"),
    ],
)
def test_weights_that_do_not_fit_are_rejected_with_the_reason_and_what_to_do(
    content: Tensors, message: str, fitted: Fit
) -> None:
    with pytest.raises(UserError, match=message):
        fitted(content)


def test_code_that_fixes_the_number_of_classes_needs_no_last_layer(fitted: Fit) -> None:
    python_class = Template("MyNet", SHAPES)
    result = fitted(below("module."), python_class)
    assert same(result.state_dict, RAW)
    with pytest.raises(UserError, match=r"MyNet: .*fc\.weight has the shape \[5, 8\] instead of"):
        fitted(Net(5).state_dict(), python_class)


def test_chexnets_published_layout_fits_densenet121(fitted: Fit) -> None:
    state = get_model("densenet121", num_classes=14).state_dict()
    old = renamed(state, r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2")
    old = renamed(old, r"classifier\.", "classifier.0.")
    published = {n: t for n, t in old.items() if not n.endswith("num_batches_tracked")}
    result = fitted(
        {"state_dict": below("module.densenet121.", published), "best_loss": 0.1},
        torchvision.template("densenet121"),
    )
    assert result.classes == 14
    assert same(result.state_dict, state)


@pytest.mark.parametrize(
    ("architecture", "old", "new"),
    [
        ("mobilenet_v2", r"classifier\.1\.", "classifier."),
        ("mobilenet_v2", r"classifier\.1\.", "classifier.0."),
        ("vit_b_32", r"heads\.head\.", "heads."),
        ("vit_b_32", r"mlp\.0\.", "mlp.linear_1."),
        ("googlenet", "^(?=conv1)", ""),
    ],
)
def test_usual_replacements_of_torchvisions_heads_and_its_old_names_fit(
    architecture: str, old: str, new: str
) -> None:
    template = torchvision.template(architecture)
    auxiliary = {"init_weights": False} if architecture == "googlenet" else {}
    with torch.device("meta"):
        model = get_model(architecture, num_classes=CLASSES, **auxiliary)
    zeros = {n: np.broadcast_to(np.float32(0), t.shape) for n, t in model.state_dict().items()}
    state = StateDict((re.sub(old, new, name), values) for name, values in zeros.items())
    checkpoint = Checkpoint("mine.pth", "", {"": state})
    result = fit(checkpoint, template)
    assert result.state_dict.keys() == template.shapes.keys()


def test_the_right_architecture_of_torchvision_is_suggested(fitted: Fit) -> None:
    squeezenet = below("module.", get_model("squeezenet1_1", num_classes=CLASSES).state_dict())
    for template in (NET, torchvision.template("squeezenet1_0")):
        with pytest.raises(UserError, match=r"layers are those of squeezenet1_1: ARCH=squeezenet1"):
            fitted(squeezenet, template)


def test_the_command_that_exports_a_model_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = re.findall(r"torch\.onnx\.export\(.*\)", state_dicts._EXPORT)[0]
    model = nn.Sequential(nn.Conv2d(3, 2, 3, 16), nn.Flatten(), nn.Linear(392, 2)).eval()
    exec(command, {"torch": torch, "model": model})
    assert Path("m.onnx").exists()
