"""Class activation maps, as clients ask for them."""

import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from benchmarks.known import PHOTOGRAPHS
from scripts.build.weights import Weights
from scripts.samples import CAT
from scripts.serve.running import Running
from tests import kinds
from tests.pictures import encode

TIMEOUT = 60
CAT_BYTES = CAT.read_bytes()
JSON = {"Accept": "application/json"}


@pytest.fixture
def url(running: Running) -> str:
    return running.predictions_url.replace("/predictions/", "/explanations/")


@pytest.fixture
def best(running: Running) -> dict[str, Any]:
    """What the model takes the cat for."""
    answer = requests.post(running.predictions_url, files={"file": CAT_BYTES}, timeout=TIMEOUT)
    row: dict[str, Any] = answer.json()["predictions"][0]
    return row


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def explain(url: str, **fields: str) -> dict[str, Any]:
    answer = requests.post(
        url, files={"file": CAT_BYTES}, data=fields, headers=JSON, timeout=TIMEOUT
    )
    body: dict[str, Any] = answer.json()
    return body


def test_curl_gets_a_picture_of_the_best_class(
    url: str, best: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "why.png"
    command = ["curl", "--silent", "--fail", "-T", str(CAT), "-o", str(target), url]
    subprocess.run(command, check=True)
    with Image.open(target) as picture, Image.open(CAT) as cat:
        assert picture.format == "PNG"
        assert picture.size == cat.size
        grey = cat.convert("RGB").convert("L").convert("RGB")
        pixels, original = np.asarray(picture.convert("RGB")), np.asarray(grey)
    # Left of what the model saw there is the photo, grey and dimmed.
    assert np.abs(pixels[:, :80] - original[:, :80] * 0.4).max() <= 1

    answer = requests.post(url, data=CAT_BYTES, timeout=TIMEOUT)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-class-index"] == str(best["class_index"])
    assert answer.headers["x-class-id"] == best["class_id"]
    assert answer.headers["x-class-name"] == best["label"]
    assert float(answer.headers["x-probability"]) == pytest.approx(best["probability"], abs=1e-5)
    assert answer.headers["x-model-weights"] == "untrained"


def test_numbers_for_the_best_class(url: str, best: dict[str, Any]) -> None:
    body = explain(url)
    assert body["success"] is True
    assert (body["class_id"], body["class_name"]) == (best["class_id"], best["label"])
    assert body["class_index"] == best["class_index"]
    assert body["probability"] == pytest.approx(best["probability"], abs=1e-5)
    assert np.array(body["map"]).shape == (7, 7)
    assert body["image"] == {"width": 451, "height": 300}
    side = 224 * 300 / 255
    assert body["crop"]["right"] - body["crop"]["left"] == pytest.approx(side, abs=0.5)
    assert body["crop"]["bottom"] - body["crop"]["top"] == pytest.approx(side, abs=0.5)
    assert "untrained" in body["warning"]


def test_maps_and_biases_make_up_the_probabilities(
    url: str, running: Running, weights: Weights
) -> None:
    """The sum of a class's map and its bias is its logit; of two logits the ratio of the
    probabilities follows.
    """
    answer = requests.post(running.predictions_url, files={"file": CAT_BYTES}, timeout=TIMEOUT)
    rows = answer.json()["predictions"]
    bias = weights.state_dict["classifier.bias"].numpy()
    logits = [
        np.sum(explain(url, class_index=str(row["class_index"]))["map"]) + bias[row["class_index"]]
        for row in rows
    ]
    for row, logit in zip(rows, logits, strict=True):
        expected = np.log(row["probability"] / rows[0]["probability"])
        assert logit - logits[0] == pytest.approx(expected, abs=1e-3)


def test_any_class_can_be_asked_for(url: str) -> None:
    by_index, by_id = explain(url, class_index="285"), explain(url, class_id="n02124075")
    assert by_index == by_id
    assert by_index["class_name"] == "Egyptian_cat"
    assert by_index["map"] != explain(url)["map"]
    picture = requests.post(
        url, files={"file": CAT_BYTES}, data={"class_id": "n02124075"}, timeout=TIMEOUT
    )
    assert picture.headers["x-class-name"] == "Egyptian_cat"
    document = {"image": in_base64(CAT_BYTES), "class_index": 285}
    answer = requests.post(url, json=document, headers=JSON, timeout=TIMEOUT)
    assert answer.json() == by_index


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"class_index": "1000"}, "0 to 999, got '1000'"), ({"class_id": "cat"}, "is no class")],
)
def test_a_class_that_is_not_there_is_refused(
    url: str, fields: dict[str, str], message: str
) -> None:
    for headers in ({}, JSON):
        answer = requests.post(
            url, files={"file": CAT_BYTES}, data=fields, headers=headers, timeout=TIMEOUT
        )
        assert answer.status_code == 422
        assert answer.json()["type"] == "InvalidOption"
        assert message in answer.json()["message"]


def test_several_images_are_explained_in_numbers_each_for_itself(url: str) -> None:
    files = {"cat": CAT_BYTES, "notes": b"text", "flower": PHOTOGRAPHS[-1].read_bytes()}
    named = {name: (name, content) for name, content in files.items()}
    answer = requests.post(url, files=named, headers=JSON, timeout=TIMEOUT)
    results = answer.json()["results"]
    assert answer.status_code == 200
    outcome = [(r["name"], r["success"]) for r in results]
    assert outcome == [("cat", True), ("notes", False), ("flower", True)]
    alone = explain(url)
    assert results[0]["class_index"] == alone["class_index"]
    assert np.array(results[0]["map"]) == pytest.approx(np.array(alone["map"]), abs=1e-4)
    refusal = requests.post(url, files=named, timeout=TIMEOUT)
    assert refusal.status_code == 400
    assert "Accept: application/json" in refusal.json()["message"]


def test_what_is_no_picture_is_refused_as_for_a_prediction(url: str) -> None:
    for headers in ({}, JSON):
        answer = requests.post(url, data=b"no picture", headers=headers, timeout=TIMEOUT)
        assert answer.status_code == 400
        assert answer.json()["type"] == "NotAnImage"


def test_kserve_v1_explains(url: str) -> None:
    host = url.split("/explanations/", maxsplit=1)[0]
    document = {"instances": [{"b64": in_base64(CAT_BYTES)}, {"b64": "%"}]}
    answer = requests.post(f"{host}/v1/models/densenet121:explain", json=document, timeout=TIMEOUT)
    cat, bad = answer.json()["explanations"]
    assert cat["class_index"] == explain(url)["class_index"]
    assert np.array(cat["map"]).shape == (7, 7)
    assert bad["type"] == "BadRequest"
    predicted = requests.post(
        f"{host}/v1/models/densenet121:predict", json=document, timeout=TIMEOUT
    )
    assert predicted.json()["predictions"][0]["predictions"][0]["class_index"] == cat["class_index"]


def test_kserve_v2_explains(url: str) -> None:
    host = url.split("/explanations/", maxsplit=1)[0]
    data = [in_base64(CAT_BYTES)]
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES", "data": data}
    document = {"inputs": [tensor], "parameters": {"class_id": "n02124075"}}
    answer = requests.post(f"{host}/v2/models/densenet121/explain", json=document, timeout=TIMEOUT)
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert outputs["class_name"] == ["Egyptian_cat"]
    assert json.loads(outputs["result"][0])["map"] == explain(url, class_index="285")["map"]
    assert "recognized" not in outputs


def test_the_largest_picture_comes_back_and_the_worker_lives(url: str) -> None:
    """An answer over TorchServe's max_response_size would end the worker."""
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "PNG", compress_level=1)
    answer = requests.post(url, data=encoded.getvalue(), timeout=TIMEOUT)
    assert answer.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (1024, 1024)
    assert requests.post(url, data=CAT_BYTES, timeout=TIMEOUT).status_code == 200


def test_a_pictures_profile_is_not_in_the_answer(url: str, running: Running) -> None:
    """One of 8 MB made an answer over max_response_size, which ended the worker."""
    with Image.open(CAT) as cat:
        rgb = cat.convert("RGB")
    large = encode(rgb, "TIFF", icc_profile=bytes(8_000_000))
    cmyk = encode(rgb.convert("CMYK"), "JPEG", icc_profile=b"of CMYK" * 1000)
    odd = kinds.tiff(np.asarray(rgb), 8, kinds.RGB, tags={34675: kinds.shorts(7)})
    clear = encode(rgb, transparency=rgb.getpixel((5, 5)), dpi=(300, 300))
    plain = {}
    for name, data in (("large", large), ("cmyk", cmyk), ("odd", odd), ("clear", clear)):
        answer = requests.post(url, data=data, timeout=TIMEOUT)
        assert answer.status_code == 200, name
        assert chunks(answer.content) == {b"IHDR", b"IDAT", b"IEND"}, name
        plain[name] = answer.content
    assert plain["large"] == plain["odd"]
    assert requests.post(running.predictions_url, data=CAT_BYTES, timeout=TIMEOUT).ok


def chunks(png: bytes) -> set[bytes]:
    """The kinds of a PNG's chunks."""
    kinds_found, position = set(), 8
    while position < len(png):
        length = int.from_bytes(png[position : position + 4], "big")
        kinds_found.add(png[position + 4 : position + 8])
        position += 12 + length
    return kinds_found
