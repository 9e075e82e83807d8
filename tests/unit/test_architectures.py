"""Any of torchvision's classifiers: preprocessing as its weights', explanations where they are."""

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import get_model_weights

from handler.images import PixelBudget, decode
from handler.settings import Preprocessing
from scripts.build.architectures import (
    architectures,
    check_architecture,
    class_layer,
    last_layer,
    official_preprocessing,
)
from scripts.build.archive import preprocessing_of
from scripts.build.export import Normalized, WithFeatures, features_node
from scripts.build.packing import Said
from scripts.build.weights import build_model, untrained
from scripts.samples import sample_batch
from scripts.terminal import UserError
from tests.pictures import encode, photographs


def test_the_preprocessing_of_every_architecture_is_understood() -> None:
    names = architectures()
    assert len(names) >= 80
    found = {name: official_preprocessing(name) for name in names}
    assert {p.interpolation for p in found.values()} == {"bilinear", "bicubic"}
    assert found["densenet121"].resize == 255
    assert found["densenet169"].resize == 256


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "vit_b_16", "inception_v3"])
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    preprocessing = official_preprocessing(name)
    theirs = get_model_weights(name).DEFAULT.transforms()
    normalize = Normalized(torch.nn.Identity(), preprocessing)
    pictures = list(photographs())[:20]
    for title, image in pictures:
        rgb = image.convert("RGB")
        pixels = decode(encode(rgb), preprocessing, PixelBudget(10**8))
        mine = normalize(torch.from_numpy(pixels)[None])[0]
        assert torch.allclose(mine, theirs(rgb), atol=1e-6), title


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("densenet121", "classifier.weight"),
        ("resnet50", "fc.weight"),
        ("vit_b_16", "heads.head.weight"),
        ("squeezenet1_1", "classifier.1.weight"),
        ("mobilenet_v3_small", "classifier.3.weight"),
        ("inception_v3", "fc.weight"),
    ],
)
def test_the_layer_that_depends_on_the_classes_is_found(name: str, layer: str) -> None:
    assert class_layer(name) == layer


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "googlenet"])
def test_where_logits_are_linear_in_the_features_they_are_found(name: str) -> None:
    weights = untrained(name)
    preprocessing = official_preprocessing(name)
    model, images = build_model(weights), sample_batch(preprocessing)[:3]
    last = last_layer(model, name)
    node = features_node(model, last, preprocessing, images)
    with torch.inference_mode():
        logits, features = Normalized(WithFeatures(model, node), preprocessing)(
            torch.from_numpy(images)
        )
        plain = Normalized(model, preprocessing)(torch.from_numpy(images))
        again = last(features.mean((2, 3)))
    assert features.shape[2:] == (7, 7)
    assert torch.equal(logits, plain)
    assert torch.allclose(again, logits, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        "mobilenet_v3_small",
        "alexnet",
        pytest.param("vgg11", marks=pytest.mark.slow),
    ],
)
def test_where_they_are_not_there_is_no_explanation(name: str) -> None:
    model = build_model(untrained(name, 10))
    preprocessing = official_preprocessing(name)
    images = sample_batch(preprocessing)[:2]
    assert features_node(model, last_layer(model, name), preprocessing, images) == ""


def test_a_name_that_torchvision_does_not_have_gets_similar_ones() -> None:
    with pytest.raises(UserError, match=r"no classifier 'resnet51'. ARCH can be: .*resnet50"):
        check_architecture("resnet51")


def test_untrained_answers_differ_with_other_architectures_too() -> None:
    preprocessing = official_preprocessing("resnet18")
    model = Normalized(build_model(untrained("resnet18")), preprocessing).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(sample_batch(preprocessing)))
    assert len(set(logits.argmax(1).tolist())) >= 5


def test_what_a_person_says_of_the_preprocessing_counts() -> None:
    mine = preprocessing_of("densenet121", Said(resize=64, crop=64, std="1"))
    assert mine == Preprocessing(64, 64, std=(1, 1, 1))
    assert np.array_equal(sample_batch(mine).shape, (18, 3, 64, 64))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"crop": 300}, "crop 300 is larger than resize 255"),
        ({"std": "0,1,1"}, "std must be above 0"),
        ({"mean": "0.5,0.5"}, "mean must be three numbers"),
        ({"mean": "grey"}, "MEAN must be numbers"),
        ({"interpolation": "lanczos"}, "interpolation must be nearest, bilinear, bicubic"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preprocessing_of("densenet121", Said(**said))
