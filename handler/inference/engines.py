"""Run the model on a batch: ONNX Runtime on CPUs, PyTorch on GPUs, OpenVINO in reduced precision.

The suffix of the archive's model file selects the engine: `.onnx` or `.pth`. For reduced precision
see `handler.inference.precision`. Each engine is a module that is imported only if it is used. All
take the same uint8 batch and normalize it themselves.
"""

import enum
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from handler.errors import ArchiveError
from handler.inference.cores import Cores
from handler.settings import ModelCard


class Extra(str, enum.Enum):
    """An output of the model in addition to the logits; its value is the output's name.

    Attributes:
        FEATURES: float32 (N, channels, height, width), the last feature maps, 7x7 in DenseNet for a
            crop of 224. The logits are a linear function of their means. Not available in all
            architectures, see `ModelCard.features`.
        EMBEDDING: float32 (N, channels), the pooled last features, which are the last layer's
            input. Not available in all archives, see `ModelCard.embedding`.
    """

    FEATURES = "features"
    EMBEDDING = "embedding"


class Outputs(NamedTuple):
    """Logits, float32 (N, classes), and the output `extra`, empty if none was requested."""

    logits: NDArray[np.float32]
    extra: NDArray[np.float32] = np.empty(0, np.float32)


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: the runtime with its version and device, for display.
        precision: float32, float16, bf16 or int8.
    """

    name: str
    precision: str

    def run(self, images: NDArray[np.uint8], extra: Extra | None = None) -> Outputs:
        """Run the model on uint8 (N, 3, crop, crop), 0 to 255."""
        ...


def run_one_by_one(
    images: NDArray[np.uint8],
    cores: Cores,
    run: Callable[[int, NDArray[np.uint8]], Sequence[NDArray[np.float32]]],
) -> Outputs:
    """Run the images of a batch one by one; `run` takes the number of threads and one image.

    Larger runs exceed the CPU caches: with one process per core, 8 at once took 18 % longer per
    image, and 180 MB more memory (benchmarks/results/engines.md).
    """
    runs = []
    for i in range(len(images)):
        with cores.threads() as threads:
            runs.append(run(threads, images[i : i + 1]))
    return Outputs(*(np.concatenate(parts) for parts in zip(*runs, strict=True)))


def load_engine(model_file: Path, card: ModelCard, cores: Cores, gpu: int | None = None) -> Engine:
    """Load `model.onnx` or `model.pth`; only PyTorch uses the GPU, if TorchServe assigned one.

    Raises:
        ArchiveError: the file is missing or corrupt, or no engine reads its suffix.
    """
    if not model_file.is_file():
        raise ArchiveError(f"{model_file.name}: the archive does not hold this model file")
    try:
        match model_file.suffix:
            case ".onnx":
                from handler.inference.onnx_engine import OnnxEngine

                return OnnxEngine(model_file, cores)
            case ".pth":
                from handler.inference.torch_engine import TorchEngine

                return TorchEngine(model_file, card, cores.share, gpu)
    except Exception as error:
        # The libraries' errors for a corrupt file lack its name.
        raise ArchiveError(f"{model_file.name}: cannot be loaded: {error}") from error
    raise ArchiveError(f"{model_file.name}: no engine for files that end in {model_file.suffix!r}")
