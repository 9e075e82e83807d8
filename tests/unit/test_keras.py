"""A Keras model, exported to ONNX by Keras itself, classifies as it does in Keras."""

import os
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.activation import softmax
from scripts.build import onnx_model
from scripts.build.differences import MAX_DIFFERENCE
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.store import read_card
from tests.images import encode, photographs

CLASSES = 5
PHOTOGRAPHS = 20

# Another process, since the backend is chosen before keras is imported. A new network gives each
# image nearly the same probabilities: the statistics of batch normalization are taken from the
# images, and the last layer is scaled to logits of mean 0 and spread 2.5.
PROGRAM = """
import sys
import keras
import numpy as np
import torch

images, classes = np.load("images.npy"), int(sys.argv[1])
keras.utils.set_random_seed(5)
inputs = keras.applications.resnet50.preprocess_input(images.astype("float32"))
model = keras.applications.ResNet50(weights=None, classes=classes)
norms = [one for one in model.layers if isinstance(one, keras.layers.BatchNormalization)]
for norm in norms:
    norm.momentum = 0.0
with torch.no_grad():
    model(inputs, training=True)
body, last = keras.Model(model.input, model.layers[-2].output), model.layers[-1]
kernel, bias = last.get_weights()
logits = body.predict(inputs, verbose=0) @ kernel
scale = 2.5 / (logits - logits.mean(0)).std()
last.set_weights([kernel * scale, -logits.mean(0) * scale])
np.save("inputs.npy", inputs)
np.save("expected.npy", model.predict(inputs, verbose=0))
model.export("model.onnx", format="onnx", verbose=False)
"""


@pytest.mark.slow
def test_an_exported_keras_model_answers_as_in_keras(tmp_path: Path, note: list[str]) -> None:
    start = time.monotonic()
    files = [encode(one.convert("RGB")) for _, one in islice(photographs(), PHOTOGRAPHS)]
    small = [
        np.asarray(Image.open(BytesIO(file)).resize((224, 224), Image.Resampling.BILINEAR))
        for file in files
    ]
    np.save(tmp_path / "images.npy", np.stack(small))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(CLASSES)],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = np.load(tmp_path / "expected.npy")
    assert len(set(expected.argmax(1))) > 1

    model = onnx_model.read(tmp_path / "model.onnx")
    assert (model.input.layouts, model.input.dtype, model.input.side) == (("NHWC",), "float32", 224)
    inputs = np.load(tmp_path / "inputs.npy")
    (theirs,) = _run((tmp_path / "model.onnx").read_bytes(), model.input.name, inputs)

    spec = from_options(
        model=tmp_path / "model.onnx",
        name="keras",
        classes=[f"class {i}" for i in range(CLASSES)],
        preprocessing={"preset": "caffe", "fit": "squash"},
    )
    archive = build(spec, tmp_path / "model_store")
    card = read_card(archive)
    assert card is not None
    pixels = np.stack(
        [decode(file, card.preprocessing, PixelBudget(10**8)).pixels for file in files]
    )
    with zipfile.ZipFile(archive) as packed:
        logits, *_ = _run(packed.read("model.onnx"), "images", pixels)

    found = {"exported": theirs, "in the archive": softmax(logits)}
    differences = {name: float(np.abs(got - expected).max()) for name, got in found.items()}
    shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    note.append(
        f"Keras, ResNet50: {shown} "
        f"from predict's probabilities on {PHOTOGRAPHS} photographs, in "
        f"{time.monotonic() - start:.1f} s"
    )
    assert max(differences.values()) < MAX_DIFFERENCE


def _run(model: bytes, name: str, values: NDArray[Any]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {name: values})
    return outputs
