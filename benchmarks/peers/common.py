"""Shared by the peers: the same engine and batches, decoding with Pillow, the class index."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from benchmarks.report import CORES
from handler.inference.cores import Cores
from handler.inference.precision import MODEL_FILES

# One worker per core with one thread is the best setting for all of them.
WORKERS = CORES
BATCH = 8
# As in handler/model-config.yaml.
BATCH_DELAY_MS = 1

FILES = Path(os.environ.get("BENCHMARK_FILES", "."))
LABELS: dict[str, list[str]] = (
    json.loads((FILES / "index_to_name.json").read_text())
    if (FILES / "index_to_name.json").exists()
    else {}
)


class LowerPrecision:
    """This project's engine for reduced precision, with the interface of ONNX Runtime."""

    def __init__(self, precision: str, threads: int) -> None:
        from handler.inference.openvino_engine import OpenVinoEngine

        cores = Cores(threads, threads, FILES / f"busy-{os.getpid()}")
        self._engine = OpenVinoEngine(FILES / MODEL_FILES[precision], precision, cores)

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[NDArray[np.float32]]:
        """Return the logits of a batch."""
        assert outputs == ["logits"]
        return [self._engine.run(inputs["images"]).logits]


def session(threads: int) -> Any:
    """Return the exported model in the precision of BENCHMARK_PRECISION."""
    precision = os.environ.get("BENCHMARK_PRECISION", "float32")
    if precision != "float32":
        return LowerPrecision(precision, threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(FILES / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a file as the tutorial's transform, uint8 (3, 224, 224)."""
    return crop(Image.open(io.BytesIO(data)))


def crop(image: Image.Image) -> NDArray[np.uint8]:
    """Resize the shorter side to 255 and crop 224 from the center, uint8 (3, 224, 224)."""
    image = image.convert("RGB")
    scale = 255 / min(image.size)
    image = image.resize(
        (int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)


def answer(logits: NDArray[np.float32]) -> dict[str, str]:
    """Return the tutorial's response to an image."""
    class_id, class_name = LABELS[str(int(logits.argmax()))]
    return {"class_id": class_id, "class_name": class_name}
