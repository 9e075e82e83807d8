"""Photographs with known content, sent to a model with trained weights."""

import base64
from importlib.metadata import distribution
from typing import Any

import numpy as np
import pytest
import requests
import timm
import torch
from PIL import Image

from benchmarks.known import CAT_LABELS, KNOWN, Photograph
from scripts.build.sources import efficientnet_lite0
from scripts.serve.running import ServerState
from tests.timm_transforms import timm_transform

TIMEOUT = 60
_TIMM_NAME = efficientnet_lite0.TIMM_NAME


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.path.stem)
def test_the_content_is_recognized_in_a_body_a_form_and_json(
    known: Photograph, lite0_server: ServerState
) -> None:
    content = known.path.read_bytes()
    ways: tuple[dict[str, Any], ...] = (
        {"data": content},
        {"files": {"file": content}},
        {"json": {"image": base64.b64encode(content).decode()}},
    )
    answers = [requests.post(lite0_server.predictions_url, **way, timeout=TIMEOUT) for way in ways]
    bodies = [answer.json() for answer in answers]
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0]["class_name"] in known.labels
    assert "warning" not in bodies[0]
    assert answers[0].headers["x-model-weights"] == "trained"
    assert answers[0].headers["x-model-version"].startswith("1.0+")


@torch.inference_mode()
def test_probabilities_equal_timms(lite0_server: ServerState, note: list[str]) -> None:
    model = timm.create_model(_TIMM_NAME, pretrained=False).eval()
    file = distribution(efficientnet_lite0.PACKAGE).locate_file(efficientnet_lite0.FILE)
    found = torch.load(str(file), weights_only=True)
    model.load_state_dict({efficientnet_lite0.timm_key(key): found[key] for key in found})
    transform = timm_transform(_TIMM_NAME)
    worst = 0.0
    for known in KNOWN:
        image = Image.open(known.path).convert("RGB")
        expected = model(transform(image)[None]).softmax(1)[0].numpy()
        answer = requests.post(
            lite0_server.predictions_url,
            files={"file": known.path.read_bytes()},
            data={"topk": "1000"},
            timeout=TIMEOUT,
        ).json()
        served = np.zeros(1000)
        for row in answer["predictions"]:
            served[row["class_index"]] = row["probability"]
        worst = max(worst, float(np.abs(served - expected).max()))
    note.append(f"EfficientNet-Lite0 against timm over {len(KNOWN)} photographs: {worst:.1e}")
    assert worst < 1e-4


def test_the_heat_map_of_the_cat_lies_on_the_cat(lite0_server: ServerState) -> None:
    """Its face fills the middle of the photograph; the corners are background."""
    url = lite0_server.predictions_url.replace("predictions", "explanations")
    content, headers = KNOWN[0].path.read_bytes(), {"Accept": "application/json"}
    body = requests.post(url, data=content, headers=headers, timeout=TIMEOUT).json()
    assert body["class_name"] in CAT_LABELS
    values = np.array(body["map"])
    rows, columns = values.shape
    middle = values[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]
    corners = values[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert middle.mean() > corners.max()
