"""Several labels a picture, from training to serving: the example of the shapes in a short form."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from classification_client import Client, RequestOptions
from examples.shapes.pictures import LABELS_FILE, NAMES, SIDE
from examples.shapes.train import ARCHITECTURE, MEAN, STD, TRANSFORM
from handler.cores import Cores
from handler.precision import CHECK_IMAGES, CHECK_LABELS, MODEL_FILES, load_precise
from handler.settings import MODEL_CARD, Preprocessing
from scripts.build.activation import Activation
from scripts.build.archive import build, recipe
from scripts.build.lower_precision import chosen
from scripts.build.weights import load as load_weights
from scripts.evaluation.multilabel import evaluate_labels
from scripts.gateway import upgrade as upgrades
from scripts.gateway.gateway import Node
from scripts.samples import CAT
from scripts.serve.running import HOST, Running, free_ports
from scripts.serve.server import start, stop
from scripts.store import read_card
from scripts.terminal import UserError
from tests.conftest import Shapes

TIMEOUT = 60
PICTURES = 50


@pytest.fixture(scope="module")
def pictures(shapes: Shapes) -> list[Path]:
    return sorted((shapes.folder / "test").glob("*.png"))[:PICTURES]


@pytest.fixture(scope="module")
def model(shapes: Shapes) -> nn.Module:
    """The network in plain PyTorch."""
    found: nn.Module = resnet18(num_classes=len(NAMES))
    found.load_state_dict(torch.load(shapes.folder / "weights.pth", weights_only=True))
    return found.eval()


@pytest.fixture(scope="module")
def expected(model: nn.Module, pictures: list[Path]) -> NDArray[np.float32]:
    """float32 (PICTURES, classes)."""
    inputs = torch.stack([TRANSFORM(Image.open(path).convert("RGB")) for path in pictures])
    with torch.inference_mode():
        found: NDArray[np.float32] = model(inputs).sigmoid().numpy()
    return found


@pytest.fixture(scope="module")
def thresholds(shapes: Shapes) -> NDArray[np.float32]:
    """float32 (classes,), as the evaluation chose them."""
    said = json.loads((shapes.folder / "validation-report" / "thresholds.json").read_text())
    return np.array([said[name] for name in NAMES], np.float32)


def ask(running: Running, content: bytes, **fields: str) -> dict[str, Any]:
    answer = requests.post(
        running.predictions_url, files={"file": content}, data=fields, timeout=TIMEOUT
    )
    body: dict[str, Any] = answer.json()
    return body


def test_the_served_model_is_as_precise_as_the_trained_one(
    shapes: Shapes, thresholds: NDArray[np.float32], note: list[str]
) -> None:
    found = dict(re.findall(r"Mean average precision (in PyTorch|served) +(0\.\d{4})", shapes.said))
    assert found["in PyTorch"] == found["served"]
    assert len(set(thresholds)) > 1
    card = read_card(shapes.archive)
    assert card is not None
    assert card.activation == "sigmoid"
    assert np.array(card.thresholds, np.float32).tolist() == thresholds.tolist()
    note.append(f"shapes, two epochs: mean average precision {found['served']}, as in PyTorch")


def test_each_answer_equals_plain_pytorchs(
    shapes_server: Running,
    pictures: list[Path],
    expected: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    note: list[str],
) -> None:
    worst, counts = 0.0, set()
    for path, probabilities in zip(pictures, expected, strict=True):
        body = ask(shapes_server, path.read_bytes(), topk="6")
        found = {row["class_index"]: row["probability"] for row in body["predictions"]}
        got = np.array([found[index] for index in range(len(NAMES))])
        worst = max(worst, float(np.abs(got - probabilities).max()))
        labels = {row["class_index"] for row in body["labels"]}
        # Nothing is said of a tie.
        sure = np.flatnonzero(np.abs(probabilities - thresholds) > 1e-4)
        assert labels & set(sure) == set(np.flatnonzero(probabilities >= thresholds)) & set(sure)
        assert body["recognized"] is bool(labels)
        assert [row["probability"] for row in body["labels"]] == sorted(
            (found[index] for index in labels), reverse=True
        )
        counts.add(len(labels))
    note.append(
        f"shapes against plain PyTorch over {len(pictures)} pictures with {sorted(counts)} labels: "
        f"worst difference of a probability {worst:.1e}"
    )
    assert len(counts) > 2
    assert worst <= 1e-4


def test_kserve_and_grpc_say_the_same(
    shapes_server: Running, pictures: list[Path], stubs: tuple[Any, Any]
) -> None:
    content = pictures[0].read_bytes()
    expected = ask(shapes_server, content)
    in_base64 = base64.b64encode(content).decode()
    server = f"http://{HOST}:{shapes_server.ports.inference}"
    v1 = requests.post(
        f"{server}/v1/models/shapes:predict",
        json={"instances": [{"b64": in_base64}]},
        timeout=TIMEOUT,
    ).json()
    assert v1 == {"predictions": [expected]}
    tensor = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [in_base64]}
    v2 = requests.post(
        f"{server}/v2/models/shapes/infer", json={"inputs": [tensor]}, timeout=TIMEOUT
    ).json()
    outputs = {output["name"]: output["data"][0] for output in v2["outputs"]}
    assert json.loads(outputs["labels"]) == expected["labels"]
    assert json.loads(outputs["result"]) == expected
    messages, services = stubs
    with grpc.insecure_channel(f"{HOST}:{shapes_server.ports.grpc_inference}") as channel:
        request = messages.PredictionsRequest(model_name="shapes", input={"data": content})
        client = services.InferenceAPIsServiceStub(channel)
        assert json.loads(client.Predictions(request, timeout=TIMEOUT).prediction) == expected


def test_maps_and_biases_make_up_each_labels_probability(
    shapes_server: Running, model: nn.Module, pictures: list[Path]
) -> None:
    content = pictures[0].read_bytes()
    url = shapes_server.predictions_url.replace("/predictions/", "/explanations/")
    headers = {"Accept": "application/json"}
    body = ask(shapes_server, content, threshold="0")
    assert len(body["labels"]) == len(NAMES)
    bias = model.fc.bias.detach().numpy()  # type: ignore[union-attr, operator]
    for row in body["labels"]:
        fields = {"class_id": row["class_id"]}
        answer = requests.post(
            url, files={"file": content}, data=fields, headers=headers, timeout=TIMEOUT
        ).json()
        assert np.shape(answer["map"]) == (2, 2)
        logit = np.sum(answer["map"]) + bias[row["class_index"]]
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(row["probability"], abs=1e-4)
    # Unless a class is asked for, it is the first label.
    first = requests.post(url, files={"file": content}, headers=headers, timeout=TIMEOUT).json()
    labels = ask(shapes_server, content)
    best = (labels["labels"] or labels["predictions"])[0]
    assert first["class_id"] == best["class_id"]


def test_the_model_says_that_it_gives_several_labels(shapes_server: Running) -> None:
    (described,) = requests.get(
        shapes_server.model_url, params={"customized": "true"}, timeout=TIMEOUT
    ).json()
    assert described["customizedMetadata"]["activation"] == "sigmoid"
    assert len(described["customizedMetadata"]["thresholds"]) == len(NAMES)
    with Client(shapes_server.predictions_url) as client:
        model = client.model()
    assert model is not None
    assert model.multilabel


@pytest.mark.parametrize("place", ["standard output", "a file"])
def test_a_csv_has_every_label_of_each_picture(
    place: str, shapes_server: Running, pictures: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "results.csv"
    how = ("--format", "csv") if place == "standard output" else ("--output", str(file))
    broken = tmp_path / "broken.png"  # what is done first has no labels to learn from
    broken.write_bytes(b"no picture")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "classification_client", str(broken), *map(str, pictures[:8])),
            *("--url", shapes_server.predictions_url, "--at-once", "1", *how),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert result.returncode == 4, result.stderr
    text = result.stdout if place == "standard output" else file.read_text()
    rows = {row["picture"]: row for row in csv.DictReader(io.StringIO(text))}
    assert len(rows) == 9
    assert rows[str(broken)]["labels"] == ""
    with Client(shapes_server.predictions_url) as client:
        for path in pictures[:8]:
            labels = [label.label for label in client.classify(path).labels or ()]
            assert json.loads(rows[str(path)]["labels"]) == labels


# --- Evaluation ---


def evaluate(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.evaluate", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_make_evaluate_finds_the_list_and_writes_thresholds_by_precision(
    shapes: Shapes, shapes_server: Running, tmp_path: Path
) -> None:
    url = ("--url", shapes_server.predictions_url)
    where = ("--output", str(tmp_path / "report"), "--min-precision", "0.8")
    result = evaluate(str(shapes.folder / "test"), *url, *where)
    assert result.returncode == 0, result.stderr
    served = re.findall(r"precision served +(0\.\d{4})", shapes.said)[-1]
    assert f"Mean average precision  {served} of 6 classes, 400 pictures" in result.stdout
    written = tmp_path / "report" / "thresholds.json"
    assert json.loads(written.read_text()).keys() == set(NAMES)
    assert f"THRESHOLDS={written}" in result.stdout
    with (tmp_path / "report" / "classes.csv").open() as file:
        for row in csv.DictReader(file):
            reached = float(row["precision_at_threshold"]) >= 0.8
            assert reached or f"{row['class']} reaches a precision of" in result.stdout


def test_pictures_without_a_list_are_told_so(
    shapes: Shapes, shapes_server: Running, tmp_path: Path
) -> None:
    (tmp_path / "star").mkdir()
    picture = next((shapes.folder / "test").glob("*.png"))
    (tmp_path / "star" / "1.png").write_bytes(picture.read_bytes())
    result = evaluate(str(tmp_path), "--url", shapes_server.predictions_url)
    assert result.returncode == 1
    assert (
        "gives several labels a picture (ACTIVATION=sigmoid), and folders cannot" in result.stderr
    )
    assert f"{tmp_path}/labels.csv, or name it: LABELS=file" in result.stderr


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0000.png,sqare\n", r"no class 'sqare', as .*labels.csv has it. Similar are: square\."),
        ("0000.png\n0001.png\n", "gives no picture a label, so that nothing can be measured"),
    ],
)
def test_a_list_that_does_not_fit_the_model_is_refused(
    lines: str, message: str, shapes: Shapes, shapes_server: Running, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(lines)
    with pytest.raises(UserError, match=message):
        evaluate_labels(
            shapes.folder / "test", labels, shapes_server.predictions_url, RequestOptions(), 2
        )


def test_a_list_is_nothing_for_a_model_that_gives_one_label(
    running: Running, tmp_path: Path
) -> None:
    (tmp_path / "1.png").write_bytes(CAT.read_bytes())
    (tmp_path / LABELS_FILE).write_text("1.png,tabby\n")
    with pytest.raises(UserError, match=r"one label a picture \(softmax\), and .* is for models"):
        evaluate_labels(
            tmp_path, tmp_path / LABELS_FILE, running.predictions_url, RequestOptions(), 2
        )


# --- Packing ---


def test_a_choice_that_makes_no_sense_stops_before_anything_is_packed(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.build.commands", "--activation", "tanh"),
            *("--model-store", str(tmp_path / "store")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert result.returncode == 1
    assert "ACTIVATION must be softmax or sigmoid, got 'tanh'." in result.stderr
    assert not (tmp_path / "store").exists()


def test_in_8_bits_all_labels_are_checked_where_it_serves(
    shapes: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shapes.folder
    packed = recipe(
        load_weights(folder / "weights.pth", ARCHITECTURE),
        "shapes8",
        folder / "classes.txt",
        Preprocessing(SIDE, SIDE, (MEAN,) * 3, (STD,) * 3),
        # So little was learnt that the cost says nothing.
        lower=chosen("int8", folder / "validation", folder / "test", max_loss=100),
        activation=Activation("sigmoid", folder / "validation-report" / "thresholds.json"),
    )
    archive = build(packed, tmp_path / "store")
    said = " ".join(capsys.readouterr().out.split())
    in_float32 = re.findall(r"mean average precision: (\S+)% \(\S+ to \S+ in float32", said)
    served = re.findall(r"precision served +(0\.\d{4})", shapes.said)[-1]
    assert float(in_float32[0]) == pytest.approx(100 * float(served), abs=0.1)
    card, files = read_card(archive), tmp_path / "files"
    with zipfile.ZipFile(archive) as content:
        content.extractall(files)
    assert card is not None
    labels = np.load(files / CHECK_LABELS)
    assert (labels.dtype, labels.shape[1]) == (np.bool_, len(NAMES))
    assert len(np.load(files / CHECK_IMAGES)) == len(labels) > 1
    assert (files / MODEL_FILES["int8"]).exists()

    def load() -> tuple[str, str]:
        cores = Cores(1, 2, tmp_path / "busy")
        engine, reason = load_precise(files / "model.onnx", card, cores, gpu=None, required=False)
        return engine.precision, reason

    assert load() == ("int8", "")
    labels[:2, 3] ^= True  # of two pictures a label that need not be the first
    np.save(files / CHECK_LABELS, labels)
    precision, reason = load()
    assert precision == "float32"
    assert reason.endswith("pictures get other labels than in float32; at most 1 may")


# --- Upgrades ---


def _with_thresholds(archive: Path, target: Path, threshold: float) -> Path:
    """The same model, of which all classes pass from another probability on."""
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(target, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            if entry.filename == MODEL_CARD:
                content = json.dumps(
                    json.loads(content) | {"thresholds": [threshold] * len(NAMES)}
                ).encode()
            after.writestr(entry, content)
    return target


def test_an_upgrade_compares_all_labels(
    shapes: Shapes,
    shapes_server: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Thresholds alone are changed, so that each picture's most probable class stays."""
    strict = _with_thresholds(shapes.archive, tmp_path / shapes.archive.name, 1.0)
    nodes = {name: Node(str(tmp_path / name), str(strict), 1) for name in ("old", "strict")}
    server = start(strict, free_ports(), 1, tmp_path / "run")
    try:
        servers = {"old": shapes_server, "strict": server}
        monkeypatch.setattr(upgrades, "_running", lambda node: servers[node.name])

        def check(fresh: str, old: str, agreement: float = upgrades.AGREEMENT) -> str:
            upgrades._check_answers([nodes[fresh]], [nodes[old]], agreement)
            return " ".join("".join(capsys.readouterr()).split())

        assert "old gives the same labels to 100% of the samples" in check("old", "old")
        with pytest.raises(UserError, match=r"of the sample photographs keep their labels, 90% we"):
            check("strict", "old")
        assert "strict gives no sample photograph a label" in check("strict", "old", agreement=0)
        # All photographs get the same labels, which of a model that gives several is no fault.
        assert "strict gives the same labels to 100% of the samples" in check("strict", "strict")
    finally:
        stop(server, tmp_path / "run")
