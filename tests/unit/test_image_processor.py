"""The image processors of transformers as preprocessing of this service."""

from typing import Any

import pytest
import transformers

from scripts.build.sources.image_processor import preprocessing_of
from scripts.terminal import UserError

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
EFFICIENTNET = {"kind": "EfficientNet", **HALF}
CONVNEXT = {"kind": "ConvNext"}
CENTER = {"do_center_crop": True, "crop_size": 224}


def processor(kind: str = "ViT", **values: Any) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil")(**values)


# Each is compared with the processor on photographs, too.
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": 224}, {"resize": 224, "crop": 224, "fit": "squash"}),
        ({"size": {"height": 96, "width": 96}}, {"resize": 96, "crop": 96, "fit": "squash"}),
        ({"size": 256, **CENTER}, {"resize": 256, "crop": 224, "fit": "squash"}),
        (
            {"size": {"shortest_edge": 248}, "do_center_crop": True}
            | {"crop_size": {"height": 224, "width": 224}},
            {"resize": 248, "crop": 224, "fit": "crop"},
        ),
        (
            {**CONVNEXT, "size": {"shortest_edge": 224}, "crop_pct": 0.9},
            {"resize": 248, "crop": 224, "fit": "crop"},
        ),
        ({**CONVNEXT, "size": 224, "crop_pct": 0.95}, {"resize": 235, "crop": 224, "fit": "crop"}),
        ({**CONVNEXT, "size": 384}, {"resize": 384, "crop": 384, "fit": "squash"}),
        ({"resample": 0}, {"interpolation": "nearest"}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"image_mean": 0.25, "image_std": 2}, {"mean": (0.25,) * 3, "std": (2.0,) * 3}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"do_rescale": False}, {"mean": (0.5 / 255,) * 3, "std": (0.5 / 255,) * 3}),
        ({"rescale_factor": 2 / 255}, {"mean": (0.25,) * 3, "std": (0.25,) * 3}),
        (
            {**EFFICIENTNET, "rescale_factor": 2 / 255, "rescale_offset": True}
            | {"do_normalize": False, "include_top": False},
            {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        ),
        ({**EFFICIENTNET, "include_top": True}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
        (
            {**EFFICIENTNET, "include_top": True, "do_normalize": False},
            {"mean": (0.0,) * 3, "std": (0.5,) * 3},
        ),
        (
            {"kind": "MobileViT", "size": {"shortest_edge": 256}} | {"crop_size": 224},
            {"resize": 256, "crop": 224, "channels": "bgr", "std": (1.0,) * 3},
        ),
    ],
)
def test_one_preprocessing_does_what_the_processor_does(
    values: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = preprocessing_of(processor(**values), "file.json")
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_pad": True}, "do_pad cannot be represented"),
        ({"size": {"height": 224, "width": 192}}, "size .* is not square"),
        ({**CENTER, "crop_size": {"height": 9, "width": 8}}, "crop_size .*not squ"),
        ({**CENTER, "crop_size": 225}, "crop 225 is larger than resize 224"),
        ({"size": {"shortest_edge": 224}}, "Set do_center_crop to true"),
        ({"size": {"shortest_edge": 9, "longest_edge": 20}}, "longest_edge.*cannot"),
        ({"resample": 1}, r"resample 1 .* must be 0 \(nearest\), 2"),
        ({"rescale_factor": 0}, "rescale_factor must be above 0"),
        ({"image_std": [0, 1, 1]}, "std must be above 0"),
        ({"kind": "Levit"}, "Levit.* does more to"),
    ],
)
def test_what_cannot_be_represented_is_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"file.json.*{message}"):
        preprocessing_of(processor(**values), "file.json")
