"""Multi-label models: from the logits to the labels, and through the whole handler."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from handler import results
from handler.archive import Archive
from handler.errors import AnswerTooLarge, BadRequest
from handler.inference.activation import sigmoid
from handler.inference.explain import CLASSIFIER
from handler.inference.precision import count_mismatches, predict
from handler.labels import Label
from handler.page import PAGE, load_page
from handler.protocols.kserve_v2 import parse_outputs
from handler.request import Options, Request, RequestImage
from handler.settings import MODEL_CARD, ModelCard, Settings
from tests.unit.test_handler import (
    B64,
    CLASSES,
    EXPLAINED,
    RED,
    Sent,
    Serve,
    as_json,
    raw,
    served,
    started,
    write_model,
)
from tests.unit.test_page import settings_in

LABELS = [Label(f"n{i}", f"name_{i}") for i in range(4)]
PROBABILITIES = np.array([0.1, 0.6, 0.55, 0.25], np.float32)
# The most probable class does not pass, and two others do.
THRESHOLDS = np.array([0.1, 0.7, 0.5, 0.3], np.float32)
CARD = ModelCard(
    "tiny",
    classes=4,
    trained=True,
    weights_file="",
    weights_sha256="",
    inputs_sha256="",
    activation="sigmoid",
    thresholds=(0.1, 0.7, 0.5, 0.3),
)


def test_sigmoid_is_pytorchs_and_survives_large_logits() -> None:
    logits = np.array([[-1e4, -90, -3.5, -0.0], [0, 2.25, 90, 1e4]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch.from_numpy(logits).sigmoid(), rtol=1e-6, atol=1e-38)


def test_topk_does_not_limit_the_labels() -> None:
    def row(index: int, probability: float) -> dict[str, object]:
        named = {"label": f"name_{index}", "class_id": f"n{index}", "class_index": index}
        return {**named, "probability": probability}

    result = results.classification(
        PROBABILITIES, LABELS, Options(topk=1, threshold=THRESHOLDS), multilabel=True
    )
    assert result == {
        "success": True,
        "class_id": "n2",
        "class_name": "name_2",
        "probability": 0.55,
        "recognized": True,
        "labels": [row(2, 0.55), row(0, 0.1)],
        "predictions": [row(1, 0.6)],
    }
    none = results.classification(PROBABILITIES, LABELS, Options(2, threshold=0.9), multilabel=True)
    assert (none["recognized"], none["labels"]) == (False, [])
    assert (none["class_id"], none["class_name"], none["probability"]) == (None, None, 0.6)


def test_labels_that_cannot_fit_are_rejected_before_they_are_made() -> None:
    many = np.ones(100_000, np.float32)
    request = Request("id", {}, {}, Options(topk=1, threshold=0.5))
    request.images = [RequestImage("id", "a", probabilities=many)]
    results.check_result_count(request, 100_000, multilabel=True)
    request.images *= 2
    with pytest.raises(AnswerTooLarge, match="Ask with a higher threshold, for fewer images"):
        results.check_result_count(request, 100_000, multilabel=True)


def test_only_a_multilabel_model_has_a_tensor_of_labels() -> None:
    asked = {"outputs": [{"name": "labels"}]}
    (tensor,) = parse_outputs(asked, explained=False, multilabel=True)
    assert tensor.name == "labels"
    assert [output.name for output in parse_outputs({}, explained=False, multilabel=True)] == [
        *("class_id", "class_name", "probability", "recognized", "labels", "result")
    ]
    for explained, multilabel in ((False, False), (True, True)):
        with pytest.raises(BadRequest, match="asks for what is not there"):
            parse_outputs(asked, explained=explained, multilabel=multilabel)


def test_the_web_ui_has_the_threshold_if_all_classes_share_it() -> None:
    for least, shown in ((0.5, 0.5), (0.4, None)):
        card = dataclasses.replace(CARD, thresholds=(0.5, 0.5, 0.5, least))
        archive = Archive(Path("model.onnx"), card, LABELS, Settings(), "tiny", "1.0")
        page = settings_in(load_page(PAGE, archive).body)
        assert (page["multilabel"], page["threshold"]) == (True, shown)


def test_reduced_precision_must_keep_all_labels() -> None:
    exact = np.array([[0, 1, 0.1, 0], [3, 0, 0, 0]], np.float32)
    reduced = exact.copy()
    reduced[0, 2] = -0.1  # its first label stays
    assert count_mismatches(predict(exact, CARD), predict(reduced, CARD)) == 1
    softmax = dataclasses.replace(CARD, activation="softmax", thresholds=())
    assert count_mismatches(predict(exact, softmax), predict(reduced, softmax)) == 0


# --- The whole handler ---


PASSING = (7, 4000, 12)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Serve a tiny model; for the image RED 3 of 5,000 classes pass."""
    folder = tmp_path_factory.mktemp("models") / "several"
    folder.mkdir()
    write_model(folder)
    least = np.ones(CLASSES)
    least[[*PASSING]] = 1e-6
    card = ModelCard.load(folder / MODEL_CARD)
    card = dataclasses.replace(card, activation="sigmoid", thresholds=tuple(least.tolist()))
    (folder / MODEL_CARD).write_text(card.to_json())
    level = logging.getLogger().level
    yield partial(served, started(folder)[1])
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the probability of each class that passes, in their order, by the model's formula."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    logits = np.load(folder / CLASSIFIER).astype(np.float64) @ [250, 10, 10]
    found = {index: float(1 / (1 + np.exp(-logits[index]))) for index in PASSING}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def test_every_protocol_returns_the_labels_of_the_models_formula(
    serve: Serve, expected: dict[int, float]
) -> None:
    tensor = {"name": "t", "shape": [1], "datatype": "BYTES", "data": [B64]}
    plain, v1, v2 = serve(
        raw(RED),
        as_json({"instances": [{"b64": B64}]}),
        as_json({"inputs": [tensor], "outputs": [{"name": "labels"}, {"name": "class_id"}]}),
    )
    labels = plain.json["labels"]
    assert [row["class_index"] for row in labels] == list(expected)
    probabilities = [row["probability"] for row in labels]
    assert probabilities == pytest.approx(list(expected.values()), abs=1e-6)
    assert plain.json["class_id"] == f"n{next(iter(expected))}"
    assert plain.json["recognized"] is True
    assert len(plain.json["predictions"]) == 5
    assert plain.headers["x-model-activation"] == "sigmoid"
    assert v1.json["predictions"][0]["labels"] == labels
    assert json.loads(v2.json["outputs"][0]["data"][0]) == labels
    assert v2.json["outputs"][1]["data"] == [plain.json["class_id"]]


def test_a_threshold_of_the_request_overrides_each_classs_own(serve: Serve) -> None:
    none, all_, too_many, described = serve(
        as_json({"image": B64, "threshold": 1}),
        as_json({"image": B64, "threshold": 0}),
        as_json({"instances": [{"b64": B64}] * 16, "threshold": 0, "topk": 1}),
        Sent((), (("describe", "True"),)),
    )
    assert (none.json["recognized"], none.json["labels"]) == (False, [])
    assert len(all_.json["labels"]) == CLASSES
    assert (too_many.status, too_many.json["type"]) == (413, "AnswerTooLarge")
    assert described.json["activation"] == "sigmoid"
    assert described.json["thresholds"][7] == 1e-6


def test_the_top_label_is_explained_by_default(serve: Serve, expected: dict[int, float]) -> None:
    (explained,) = serve(EXPLAINED)
    first = next(iter(expected))
    assert explained.json["class_index"] == first
    assert explained.json["probability"] == pytest.approx(expected[first], abs=1e-6)
