"""From a batch of images to logits: ONNX Runtime on CPUs, PyTorch on GPUs.

Which engine serves is decided by the model file in the archive: `.onnx` or `.pth`; lower precision
is OpenVINO's, see `handler.precision`. Each has a module of its own, imported only where it serves.
All take the same uint8 batch and normalise it themselves.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from handler.cores import Cores
from handler.errors import ArchiveError
from handler.settings import ModelCard


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: what runs the model, with version and device, for people to read.
        precision: what it computes in: float32, float16, bf16 or int8.
    """

    name: str
    precision: str

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Runs the model once.

        Args:
            images: uint8 (N, 3, crop, crop), 0 to 255.

        Returns:
            float32 (N, classes), before softmax or sigmoid.
        """
        ...

    def logits_and_features(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Runs the model once, for the logits and what they are computed from.

        Args:
            images: as in `logits`.

        Returns:
            the logits, and float32 (N, channels, height, width), the last features, of DenseNet 7
            high and 7 wide for a crop of 224: the logits are a linear function of their means.
            Only of an architecture that has such, see `ModelCard.features`.
        """
        ...

    def logits_and_embedding(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Runs the model once, for the logits and what the last layer makes them of.

        Args:
            images: as in `logits`.

        Returns:
            the logits, and float32 (N, channels), the pooled last features. Only of an archive that
            has such, see `ModelCard.embedding`.
        """
        ...


def load_engine(model_file: Path, card: ModelCard, cores: Cores, gpu: int | None = None) -> Engine:
    """Loads the archive's model file with the engine for its kind.

    Args:
        model_file: `model.onnx` or `model.pth`, as packed.
        card: the archive's model card.
        cores: how many CPU threads a forward pass may use.
        gpu: the number of the GPU that TorchServe gave this worker, if any; only PyTorch uses one.

    Raises:
        ArchiveError: the file is missing or corrupt, or of a kind that no engine takes.
    """
    if not model_file.is_file():
        raise ArchiveError(f"{model_file.name}: the archive does not hold this model file")
    try:
        match model_file.suffix:
            case ".onnx":
                from handler.onnx_engine import OnnxEngine

                return OnnxEngine(model_file, cores)
            case ".pth":
                from handler.torch_engine import TorchEngine

                return TorchEngine(model_file, card, cores.share, gpu)
    except Exception as error:
        # The libraries raise kinds of their own for a corrupt file; the operator needs its name.
        raise ArchiveError(f"{model_file.name}: cannot be loaded: {error}") from error
    raise ArchiveError(f"{model_file.name}: no engine for files that end in {model_file.suffix!r}")
