"""Run one of torchvision's models with PyTorch: float32 on a CPU, half precision on a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handler.inference.engines import Extra, Outputs
from handler.inference.torch_models import empty_model, with_features
from handler.settings import ModelCard


class TorchEngine:
    """See `handler.inference.engines.Engine`.

    On a GPU, a batch is copied as uint8 and normalized there, and the whole forward pass is
    replayed as one CUDA graph, recorded for a few batch sizes; smaller batches are padded.
    """

    # Batch sizes with a recorded graph. Larger batches are split.
    _BUCKETS = (1, 2, 4, 8, 16, 32)

    def __init__(self, weights_file: Path, card: ModelCard, threads: int, gpu: int | None) -> None:
        torch.set_num_threads(threads)
        on_gpu = gpu is not None and torch.cuda.is_available()
        self._device = torch.device(f"cuda:{gpu}" if on_gpu else "cpu")
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        model = empty_model(card.architecture, card.classes)
        model.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True))
        self._model = model.to(self._device, self._dtype, memory_format=torch.channels_last)
        self._with_features = with_features(self._model, card.features) if card.features else None
        self._mean = self._channels(card.preprocessing.mean)
        self._std = self._channels(card.preprocessing.std)
        self._reversed = card.preprocessing.channels == "bgr"
        crop = card.preprocessing.crop
        self._graphs = (
            {size: _CudaGraph(self._forward, (size, 3, crop, crop)) for size in self._BUCKETS}
            if self._device.type == "cuda"
            else {}
        )
        self.precision = str(self._dtype).removeprefix("torch.")
        how = "half precision" if self._graphs else f"{threads} thread(s)"
        self.name = f"PyTorch {torch.__version__}, {self._device}, {how}"

    def _channels(self, values: tuple[float, float, float]) -> Any:
        return torch.tensor(values, device=self._device).view(1, 3, 1, 1)

    def _forward(self, images: Any) -> Any:
        """Map uint8 (N, 3, crop, crop) on the device to float32 (N, classes) on the device."""
        return self._model(self._normalized(images)).float()

    def _normalized(self, images: Any) -> Any:
        if self._reversed:
            images = images.flip(1)
        normalized = (images.float() / 255 - self._mean) / self._std
        return normalized.to(self._dtype, memory_format=torch.channels_last)

    def run(self, images: NDArray[np.uint8], extra: Extra | None = None) -> Outputs:
        """See `Engine.run`; an archive for PyTorch has no embeddings."""
        with torch.inference_mode():
            if extra is Extra.FEATURES:
                return self._run_with_features(torch.from_numpy(images).to(self._device))
            if not self._graphs:
                return Outputs(self._forward(torch.from_numpy(images)).numpy())
            step = max(self._BUCKETS)
            parts = [images[i : i + step] for i in range(0, len(images), step)]
            logits = [self._graphs[bucket(len(part), self._BUCKETS)](part) for part in parts]
            return Outputs(np.concatenate(logits))

    def _run_with_features(self, images: Any) -> Outputs:
        assert self._with_features is not None
        found = self._with_features(self._normalized(images))
        return Outputs(*(found[name].float().cpu().numpy() for name in ("logits", "features")))


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest of `sizes` that holds `count` images."""
    return min(size for size in sizes if size >= count)


class _CudaGraph:
    """A recorded forward pass of one batch size, with fixed input and output buffers.

    Source of the steps: "CUDA Graphs" in PyTorch's notes on CUDA semantics.
    """

    _WARM_UP_RUNS = 3

    def __init__(self, forward: Any, shape: tuple[int, ...]) -> None:
        # Page-locked memory, for an asynchronous copy to the device.
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self._input = self._host.cuda()
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(self._WARM_UP_RUNS):
                    forward(self._input)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._output = forward(self._input)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(images)
        self._host[:count].copy_(torch.from_numpy(images))
        self._input.copy_(self._host, non_blocking=True)
        self._graph.replay()
        logits: NDArray[np.float32] = self._output[:count].cpu().numpy()
        return logits
