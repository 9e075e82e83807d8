"""Architectures of torchvision and timm: their preprocessing, and explanations if possible."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.models import get_model_weights

from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.torch_models import empty_model, with_features
from handler.settings import Preprocessing
from scripts.build.export import Normalized, features_node
from scripts.build.model_file import from_options
from scripts.build.sources import timm
from scripts.build.sources.torchvision import (
    architectures,
    class_layer,
    official_preprocessing,
    open_source,
)
from scripts.samples import sample_batch
from scripts.terminal import UserError
from tests.images import encode, photographs
from tests.timm_transforms import timm_transform

SMALL = Preprocessing(128, 128)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return sample_batch(SMALL, 6)


def test_the_preprocessing_of_every_architecture_is_understood() -> None:
    names = architectures()
    assert len(names) >= 80
    found = {name: official_preprocessing(name) for name in names}
    assert {p.interpolation for p in found.values()} == {"bilinear", "bicubic"}
    assert found["densenet121"].resize == 255
    assert found["densenet169"].resize == 256


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "efficientnet_b0",
        "vit_b_16",
        "inception_v3",
        "timm/densenet121.ra_in1k",
        "timm/resnet50.a1_in1k",
        "timm/test_vit.r160_in1k",
        "timm/mixer_b16_224.goog_in21k",
    ],
)
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    if name.startswith("timm/"):
        values = timm._preprocessing(timm._config(name))
        preprocessing, theirs = Preprocessing(**values), timm_transform(name.removeprefix("timm/"))
    else:
        preprocessing = official_preprocessing(name)
        theirs = get_model_weights(name).DEFAULT.transforms()
    normalize = Normalized(torch.nn.Identity(), preprocessing)
    for title, image in list(photographs())[::13]:
        rgb = image.convert("RGB")
        pixels = decode(encode(rgb), preprocessing, PixelBudget(10**8)).pixels
        mine = normalize(torch.from_numpy(pixels)[None])[0]
        assert torch.allclose(mine, theirs(rgb), atol=1e-6), title


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("resnet18", True),
        ("mobilenet_v2", True),
        ("shufflenet_v2_x0_5", True),
        ("googlenet", True),
        ("squeezenet1_1", False),
        ("mobilenet_v3_small", False),
        ("alexnet", False),
        pytest.param("vgg11", False, marks=pytest.mark.slow),
    ],
)
def test_features_are_found_if_logits_are_linear_in_them(
    name: str,
    linear: bool,
    images: NDArray[np.uint8],
) -> None:
    torch.manual_seed(0)
    model = empty_model(name, 10)
    last = model.get_submodule(class_layer(name))
    node = features_node(model, last, SMALL)
    assert bool(node) is linear
    if linear:
        with torch.inference_mode():
            pixels = torch.from_numpy(images)
            found = Normalized(with_features(model, node), SMALL)(pixels)
            logits, features = found["logits"], found["features"]
            assert torch.equal(logits, Normalized(model, SMALL)(pixels))
            assert features.shape[2:] == (4, 4)
            assert torch.allclose(last(features.mean((2, 3))), logits, atol=1e-3)


def test_a_name_that_torchvision_does_not_have_gets_similar_ones() -> None:
    with pytest.raises(UserError, match=r"no classifier 'resnet51'. ARCH can be: .*resnet50"):
        open_source(from_options(arch="resnet51"))
