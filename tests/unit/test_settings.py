"""Mistakes in the archive's own files stop the worker, and say which key of which file; and the
largest request, which what cannot import `handler.settings` repeats.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from classification_client.client import MAX_IMAGE_BYTES
from handler.errors import ArchiveError
from handler.labels import load_class_index
from handler.page import PAGE
from handler.settings import (
    MAX_REQUEST_BYTES,
    ModelCard,
    Settings,
    _max_request_bytes,
)

CARD = ModelCard("densenet121", 1000, True, "w.pth", "a" * 64, "b" * 64)


def settings(**section: Any) -> Settings:
    return Settings.from_model_config({"batchSize": 8, "handler": section})


def test_the_packed_settings_are_the_documented_defaults() -> None:
    packed = yaml.safe_load(Path("handler/model-config.yaml").read_text())
    assert Settings.from_model_config(packed) == Settings() == settings()
    for config in (None, {}, {"handler": None}):
        assert Settings.from_model_config(config) == Settings()
    assert settings(threshold=1).threshold == 1, "a whole number in place of a fraction"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("treshold", 0.2, "'treshold'; allowed are: max_batch, max_images, "),
        ("topk", 0, "topk must be"),
        ("topk", "5", "topk must be"),
        ("topk", True, "topk must be"),
        ("threshold", 1.5, "threshold must be"),
        ("threshold", float("nan"), "threshold must be"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        settings(**{key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "many"}, "classes must be int"),
        ({"classes": None}, "missing key classes"),
        ({"clases": 3}, "unknown key 'clases'"),
        ({"preprocessing": {"crop": 0}}, "'preprocessing': crop must be 1 to 4096, got 0"),
        ({"preprocessing": {"mean": [0, 0, float("nan")]}}, "mean must be three numbers"),
        ({"preprocessing": {"resize": 200}}, "crop 224 is larger than resize 200"),
        ({"preprocessing": {"resize": 100, "fit": "squash"}}, "crop 224 is larger than resize 100"),
        ({"preprocessing": {"fit": "stretch"}}, "fit must be crop, squash, pad, got 'stretch'"),
        ({"thresholds": [0.5]}, "activation softmax thresholds must be 0 numbers"),
        *(
            ({"activation": "sigmoid", "classes": 4, "thresholds": given}, "must be 4 numbers")
            for given in ([0.5], [0.5, 0.5, 0.5, 1.5], [0.5, 0.5, 0.5, "1"])
        ),
        ({"embedding": -1}, "model-card.json: embedding must be 0 to 1000000, got -1"),
        ({"activation": "tanh"}, "card.json: activation must be softmax, sigmoid, got 'tanh'"),
        ({"preprocessing": 5}, "expected keys and values"),
    ],
)
def test_a_wrong_model_card_is_rejected(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = json.loads(CARD.to_json()) | change
    file = tmp_path / "model-card.json"
    with pytest.raises(ArchiveError, match=r"model-card\.json: cannot be read"):
        ModelCard.load(file)
    file.write_text(json.dumps({k: value for k, value in values.items() if value is not None}))
    with pytest.raises(ArchiveError, match=message):
        ModelCard.load(file)


def test_a_wrong_class_index_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "index_to_name.json"
    for text, message in (
        ("", "cannot be read"),
        ("[]", "found no keys"),
        ('{"0": ["a", "b"]}', "found 1 keys"),
        ('{"0": ["a", "b"], "1": "c"}', r'row "1" must be'),
        ('{"0": ["a", "b"], "1": ["c", 4]}', r'row "1" must be'),
    ):
        path.write_text(text)
        with pytest.raises(ArchiveError, match=message):
            load_class_index(path, classes=2)


def test_random_weights_warn_and_name_a_trained_model_if_one_is_served_too() -> None:
    card = ModelCard("densenet121", 1000, False, "seeded random numbers", "0", "0")
    assert "untrained random weights" in (card.warning or "")
    assert "/predictions/" not in (card.warning or "")
    other = dataclasses.replace(card, trained_model="efficientnet_lite0")
    assert "/predictions/efficientnet_lite0 has a trained model" in (other.warning or "")
    assert dataclasses.replace(other, trained=True).warning is None
    assert ModelCard.from_json(other.to_json()) == other


def test_the_largest_request_is_the_configured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAX_REQUEST_BYTES", raising=False)
    config = tmp_path / "config.properties"
    monkeypatch.setattr("handler.settings._CONFIG", config)
    assert _max_request_bytes() == 20 << 20  # in an archive, without a server
    config.write_text("max_request_size=1\n# max_request_size=2\nmax_request_size=3\nx=4\n")
    assert _max_request_bytes() == 3
    monkeypatch.setenv("MAX_REQUEST_BYTES", "5")
    assert _max_request_bytes() == 5


def test_the_largest_request_is_the_same_everywhere() -> None:
    config = Path("config.properties").read_text()
    assert re.findall(r"^max_request_size=(\d+)$", config, re.MULTILINE) == [str(MAX_REQUEST_BYTES)]
    page = PAGE.read_text("utf-8")
    # The page has no size of its own: page.py fills in the server's.
    assert "settings.max_bytes - FORM_BYTES" in page
    assert not re.findall(r"\b\d+ MB\b", page)
    # The lines and headers of a form around one image take 4096 bytes at most.
    assert "const FORM_BYTES = 4096;" in page
    assert MAX_IMAGE_BYTES == MAX_REQUEST_BYTES - 4096
