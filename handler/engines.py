"""From a batch of images to logits: ONNX Runtime on CPUs, PyTorch on GPUs.

Which engine serves is decided by the model file in the archive: `.onnx` or `.pth`. Both take the
same uint8 batch and normalise it themselves.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from handler.errors import ArchiveError
from handler.settings import ModelCard


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: what runs the model, with version and device, for people to read.
    """

    name: str

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Runs the model once.

        Args:
            images: uint8 (N, 3, crop, crop), 0 to 255.

        Returns:
            float32 (N, classes), before softmax.
        """
        ...

    def logits_and_features(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Runs the model once, for the logits and what they are computed from.

        Args:
            images: as in `logits`.

        Returns:
            the logits, and float32 (N, channels, height, width) after the last ReLU, 7 high and 7
            wide for a crop of 224: the logits are a linear function of their means.
        """
        ...


def load_engine(model_file: Path, card: ModelCard, threads: int, device: str) -> Engine:
    """Loads the archive's model file with the engine for its kind.

    Args:
        model_file: `model.onnx` or `model.pth`, as packed.
        card: the archive's model card.
        threads: CPU threads for one forward pass.
        device: "cpu", or "cuda:0" and so on; only PyTorch uses a GPU.

    Raises:
        ArchiveError: the file is missing or corrupt, or of a kind that no engine takes.
    """
    if not model_file.is_file():
        raise ArchiveError(f"{model_file.name}: the archive does not hold this model file")
    try:
        match model_file.suffix:
            case ".onnx":
                return OnnxEngine(model_file, threads)
            case ".pth":
                return TorchEngine(model_file, card, threads, device)
    except Exception as error:
        # The libraries raise kinds of their own for a corrupt file; the operator needs its name.
        raise ArchiveError(f"{model_file.name}: cannot be loaded: {error}") from error
    raise ArchiveError(f"{model_file.name}: no engine for files that end in {model_file.suffix!r}")


class OnnxEngine:
    """ONNX Runtime on the CPU; normalisation is part of the graph."""

    def __init__(self, model_file: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(model_file), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self.name = f"ONNX Runtime {onnxruntime.__version__}, CPU, {threads} thread(s)"

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.logits`."""
        (logits,) = self._session.run(["logits"], {self._input: images})
        result: NDArray[np.float32] = logits
        return result

    def logits_and_features(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Engine.logits_and_features`."""
        logits, features = self._session.run(["logits", "features"], {self._input: images})
        return logits, features


class TorchEngine:
    """PyTorch eager with torchvision's architecture.

    torchvision costs a worker 160 MB, so it is imported here and nowhere else in the handler.
    """

    def __init__(self, weights_file: Path, card: ModelCard, threads: int, device: str) -> None:
        import torch
        import torchvision

        torch.set_num_threads(threads)
        self._torch = torch
        self._device = torch.device(device)
        model = torchvision.models.get_model(
            card.architecture, weights=None, num_classes=card.classes
        )
        weights = torch.load(weights_file, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        self._model = model.eval().to(self._device, memory_format=torch.channels_last)
        self._mean = self._channels(card.preprocessing.mean)
        self._std = self._channels(card.preprocessing.std)
        self.name = f"PyTorch {torch.__version__}, {self._device}, {threads} thread(s)"

    def _channels(self, values: tuple[float, float, float]) -> Any:
        return self._torch.tensor(values, device=self._device).view(1, 3, 1, 1)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.logits`."""
        with self._torch.inference_mode():
            logits: NDArray[np.float32] = self._model(self._batch(images)).float().cpu().numpy()
            return logits

    def logits_and_features(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Engine.logits_and_features`."""
        with self._torch.inference_mode():
            features = self._model.features(self._batch(images)).relu()
            logits = self._model.classifier(features.mean((2, 3)))
            return logits.float().cpu().numpy(), features.float().cpu().numpy()

    def _batch(self, images: NDArray[np.uint8]) -> Any:
        batch = self._torch.from_numpy(images).to(self._device)
        batch = (batch.float() / 255 - self._mean) / self._std
        return batch.contiguous(memory_format=self._torch.channels_last)
