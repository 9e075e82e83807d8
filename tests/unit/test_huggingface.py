"""Folders in Hugging Face's form: preprocessing, answers equal to transformers', rejected files."""

import json
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import is_offline_mode
from torch import nn
from transformers.utils import logging

from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.activation import softmax
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.build.sources.huggingface import CONFIG, PREPROCESSOR, WEIGHTS, open_source
from scripts.store import read_card
from scripts.terminal import UserError
from tests.images import encode, photographs

CLASSES = {0: "cat", 1: "dog", 2: "crane", 3: "tench, Tinca tinca", 4: "none"}
PHOTOGRAPHS = 20
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
# Small models; the files of preprocessing are those of the families' best-known models on the hub.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit": (TRANSFORMER, {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, **HALF}),
    "deit": (
        {**TRANSFORMER, "architectures": ["DeiTForImageClassification"]},
        {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3, **IMAGENET},
    ),
    "swin": (
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 3, **IMAGENET},
    ),
    "convnext": (
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        {"size": 224, "crop_pct": 0.875, "resample": 3, **IMAGENET},
    ),
    "resnet": (
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        {"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, **IMAGENET}
        | {"size": {"shortest_edge": 224}, "resample": 3},
    ),
    "efficientnet": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320, "image_size": 224},
        {"size": {"height": 224, "width": 224}, "resample": 0, "do_center_crop": False}
        | {"crop_size": {"height": 289, "width": 289}, "include_top": True, **IMAGENET}
        | {"image_std": [0.47853944, 0.4732864, 0.47434163]},
    ),
    "mobilenet_v2": (
        {"depth_multiplier": 0.35},
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, **HALF},
    ),
    "beit": (
        {**TRANSFORMER, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        {"size": 224, "crop_size": 224, "do_center_crop": False, "resample": 2, **HALF},
    ),
}


def write_folder(folder: Path, family: str) -> Path:
    """Write a model of random weights that answers differently from image to image."""
    sizes, processor = FAMILIES[family]
    torch.manual_seed(6)
    config = transformers.AutoConfig.for_model(family, **sizes, num_labels=len(CLASSES))
    config.id2label = CLASSES
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    (folder / PREPROCESSOR).write_text(json.dumps(processor))
    model.save_pretrained(folder)
    images = [image.convert("RGB") for _, image in islice(photographs(), PHOTOGRAPHS)]
    own = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    spread(model, own(images, return_tensors="pt")["pixel_values"])
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def spread(model: nn.Module, inputs: torch.Tensor) -> None:
    """Take the statistics of batch normalization and the scale of logits from images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(inputs)
    model.eval()
    logits = model(inputs).logits
    scale = 2.5 / float((logits - logits.mean(0)).std())
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.copy_((last.bias - logits.mean(0)) * scale)
    last.weight.mul_(scale)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("vit"), "vit")


@pytest.fixture
def folder(vit: Path, tmp_path: Path) -> Path:
    for path in vit.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family: str, tmp_path: Path, note: list[str]) -> None:
    start = time.monotonic()
    source = open_source(write_folder(tmp_path, family))
    spec = from_options(model=tmp_path, name=family.replace("_", "-"))
    archive = build(spec, tmp_path / "model_store", source)
    card = read_card(archive)
    assert card is not None
    preprocessing = card.preprocessing
    with zipfile.ZipFile(archive) as packed:
        session = onnxruntime.InferenceSession(
            packed.read("model.onnx"), providers=["CPUExecutionProvider"]
        )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = transformers.pipeline("image-classification", str(tmp_path), image_processor=processor)
    images = [image.convert("RGB") for _, image in islice(photographs(), PHOTOGRAPHS)]
    assert len(images) == PHOTOGRAPHS
    pixels = [decode(encode(image), preprocessing, PixelBudget(10**8)).pixels for image in images]
    (logits,) = session.run(["logits"], {"images": np.stack(pixels)})
    assert len(set(logits.argmax(1))) > 1
    assert source.labels is not None
    differences = []
    for image, probabilities in zip(images, softmax(logits), strict=True):
        expected = {answer["label"]: answer["score"] for answer in theirs(image, top_k=5)}
        differences += [
            abs(probability - expected[label.class_name])
            for label, probability in zip(source.labels, probabilities, strict=True)
        ]
    note.append(
        f"Hugging Face, {family}: {max(differences):.1e} from transformers' probabilities on "
        f"{PHOTOGRAPHS} photographs, in {time.monotonic() - start:.1f} s"
    )
    assert max(differences) < 1e-4


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (PREPROCESSOR, {"do_resize": False}, "do_resize is false.* Set do_resize to true"),
        (PREPROCESSOR, {"size": {"wide": 9}}, "preprocessor_config.json cannot be used"),
        (PREPROCESSOR, {"auto_map": {"AutoImageProcessor": "a.B"}}, "code of its own"),
        (CONFIG, {"auto_map": {"AutoModelForImageClassification": "a.B"}}, "code of its own"),
        (CONFIG, {"quantization_config": {"bits": 4}}, "weights are quantized"),
        (CONFIG, {"model_type": "bert"}, "bert is no image classifier"),
        (CONFIG, {"model_type": "mine"}, "'mine' is unknown to transformers 5"),
        (CONFIG, {"hidden_size": "wide"}, "config.json cannot be used"),
        (CONFIG, {"num_channels": 1}, "takes images of 1 channels"),
        (CONFIG, {"problem_type": "regression"}, "no classifier"),
        (CONFIG, {"num_hidden_layers": 3}, "does not fit.*missing: vit.*and 13 more"),
        (CONFIG, {"num_hidden_layers": 1}, "does not fit.*not expected: vit.*and 13 more"),
        (CONFIG, {"id2label": {"0": "cat", "1": "dog"}}, "of another shape: classifier.bias, clas"),
        (CONFIG, {"id2label": {"0": "a", "1": "b", "2": "c", "4": "d", "5": "e"}}, "position 3"),
    ],
)
def test_what_cannot_be_served_is_rejected(
    file: str, values: dict[str, Any], message: str, folder: Path
) -> None:
    change(folder / file, values)
    with pytest.raises(UserError, match=message):
        open_source(folder)


def _with_nan(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors["classifier.bias"][1] = torch.nan
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "has no config.json.* model.save_pretrained"),
        (lambda folder: (folder / PREPROCESSOR).unlink(), "image_processor.save_pretrained"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "can hold code"),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.index.json"),
            "in several files.*max_shard_size",
        ),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"no"), "no safetensors file, or is cut"),
        (_with_nan, "not finite: classifier.bias"),
    ],
)
def test_damaged_folders_are_rejected(
    damage: Callable[[Path], object], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_source(folder)


def test_the_network_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def connect(*address: object) -> None:
        attempts.append(address)
        raise OSError

    load, offline = safetensors.torch.load, []

    def loaded(content: bytes) -> dict[str, torch.Tensor]:
        offline.append(is_offline_mode())
        return load(content)

    monkeypatch.setattr(safetensors.torch, "load", loaded)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    # Each of these makes transformers' own loading look for a repository on the hub.
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    change(folder / CONFIG, {"_attn_implementation": "someone/kernel", "_name_or_path": "some/one"})
    assert open_source(folder).outputs == len(CLASSES)
    assert (attempts, offline, is_offline_mode()) == ([], [True], False)


def test_classes_are_named_by_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = open_source(folder).labels
    assert labels is not None
    assert [label.class_name for label in labels] == list(CLASSES.values())
    assert "WARNING" not in capsys.readouterr().out
    change(folder / CONFIG, {"id2label": {str(i): f"LABEL_{i}" for i in CLASSES}})
    assert open_source(folder).labels is not None
    assert "names no classes" in capsys.readouterr().out
    change(folder / CONFIG, {"problem_type": "multi_label_classification"})
    open_source(folder)
    assert "ACTIVATION=sigmoid" in capsys.readouterr().out


def test_classes_of_a_single_output_are_left_to_the_user(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    first = {key: value[:1] for key, value in tensors.items() if key.startswith("classifier.")}
    safetensors.torch.save_file({**tensors, **first}, folder / WEIGHTS)
    change(folder / CONFIG, {"id2label": {"0": "cat"}})
    source = open_source(folder)
    assert (source.outputs, source.labels) == (1, None)


def test_the_digest_covers_each_file(folder: Path) -> None:
    digests = {open_source(folder).sha256}
    change(folder / CONFIG, {"comment": "mine"})
    digests.add(open_source(folder).sha256)
    change(folder / PREPROCESSOR, {"comment": "mine"})
    digests.add(open_source(folder).sha256)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file({k: 2 * v for k, v in tensors.items()}, folder / WEIGHTS)
    digests.add(open_source(folder).sha256)
    assert len(digests) == 4


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "scripts.build.sources.huggingface")
    with pytest.raises(UserError, match="make setup-huggingface"):
        __import__("scripts.build.sources.huggingface")
