"""From a batch of images to logits: ONNX Runtime on CPUs, PyTorch on GPUs.

Which engine serves is decided by the model file in the archive: `.onnx` or `.pth`. Both take the
same uint8 batch and normalise it themselves.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from handler.cores import Cores
from handler.errors import ArchiveError
from handler.settings import ModelCard

INCEPTIONS = ("googlenet", "inception_v3")


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
            the logits, and float32 (N, channels, height, width), the last features, of DenseNet 7
            high and 7 wide for a crop of 224: the logits are a linear function of their means.
            Only of an architecture that has such, see `ModelCard.features`.
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
                return OnnxEngine(model_file, cores)
            case ".pth":
                return TorchEngine(model_file, card, cores.share, gpu)
    except Exception as error:
        # The libraries raise kinds of their own for a corrupt file; the operator needs its name.
        raise ArchiveError(f"{model_file.name}: cannot be loaded: {error}") from error
    raise ArchiveError(f"{model_file.name}: no engine for files that end in {model_file.suffix!r}")


class OnnxEngine:
    """ONNX Runtime on the CPU; normalisation is part of the graph.

    A session's number of threads is fixed, so there is one for a worker's share of the cores and
    one for all of them, chosen anew for each image.

    Images of a batch run one by one. Larger runs leave the caches: with a process a core 8 at once
    took 18 % longer an image, and 180 MB more memory (benchmarks/results/engines.md).
    """

    def __init__(self, model_file: Path, cores: Cores) -> None:
        import onnxruntime

        self._cores = cores
        self._sessions = {
            threads: _onnx_session(model_file, threads) for threads in {cores.share, cores.all}
        }
        self._input = self._sessions[cores.share].get_inputs()[0].name
        self.name = (
            f"ONNX Runtime {onnxruntime.__version__}, CPU, {cores.share} to {cores.all} thread(s)"
        )

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.logits`."""
        return self._run(["logits"], images)[0]

    def logits_and_features(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Engine.logits_and_features`."""
        logits, features = self._run(["logits", "features"], images)
        return logits, features

    def _run(self, outputs: list[str], images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """One image a run: see above."""
        runs = [
            self._sessions[self._cores.available()].run(outputs, {self._input: images[i : i + 1]})
            for i in range(len(images))
        ]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def _onnx_session(model_file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for the next layer spin, which shortens a lone client's wait by a tenth;
    # between runs they must not, since other workers need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(model_file), options, providers=["CPUExecutionProvider"]
    )


class TorchEngine:
    """PyTorch with one of torchvision's architectures: float32 on a CPU, half precision on a GPU.

    On a GPU a batch is sent as uint8 and normalised there, and the whole forward pass is replayed
    as one CUDA graph, recorded for each of a few batch sizes; smaller batches are filled up.
    torchvision costs a worker 160 MB, so it is imported here and nowhere else in the handler.
    """

    # Batch sizes with a graph of their own. Larger batches are cut.
    _BUCKETS = (1, 2, 4, 8, 16, 32)

    def __init__(self, weights_file: Path, card: ModelCard, threads: int, gpu: int | None) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        on_gpu = gpu is not None and torch.cuda.is_available()
        self._device = torch.device(f"cuda:{gpu}" if on_gpu else "cpu")
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        model = empty_model(card.architecture, card.classes)
        model.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True))
        self._model = model.to(self._device, self._dtype, memory_format=torch.channels_last)
        self._with_features = with_features(self._model, card.features) if card.features else None
        self._mean = self._channels(card.preprocessing.mean)
        self._std = self._channels(card.preprocessing.std)
        crop = card.preprocessing.crop
        self._graphs = (
            {size: _CudaGraph(self._forward, (size, 3, crop, crop)) for size in self._BUCKETS}
            if self._device.type == "cuda"
            else {}
        )
        precision = "half precision" if self._graphs else f"{threads} thread(s)"
        self.name = f"PyTorch {torch.__version__}, {self._device}, {precision}"

    def _channels(self, values: tuple[float, float, float]) -> Any:
        return self._torch.tensor(values, device=self._device).view(1, 3, 1, 1)

    def _forward(self, images: Any) -> Any:
        """uint8 (N, 3, crop, crop) on the device -> float32 (N, classes) on the device."""
        return self._model(self._normalized(images)).float()

    def _normalized(self, images: Any) -> Any:
        normalized = (images.float() / 255 - self._mean) / self._std
        return normalized.to(self._dtype, memory_format=self._torch.channels_last)

    def logits_and_features(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Engine.logits_and_features`."""
        with self._torch.inference_mode():
            on_device = self._torch.from_numpy(images).to(self._device)
            assert self._with_features is not None
            found = self._with_features(self._normalized(on_device))
            logits, features = found["logits"], found["features"]
            return logits.float().cpu().numpy(), features.float().cpu().numpy()

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Engine.logits`."""
        with self._torch.inference_mode():
            if not self._graphs:
                on_cpu: NDArray[np.float32] = self._forward(self._torch.from_numpy(images)).numpy()
                return on_cpu
            most = max(self._BUCKETS)
            return np.concatenate(
                [
                    self._graphs[bucket(len(part), self._BUCKETS)](part)
                    for part in (images[i : i + most] for i in range(0, len(images), most))
                ]
            )


def empty_model(architecture: str, classes: int) -> Any:
    """One of torchvision's classifiers, its parameters yet to be loaded, in evaluation mode.

    The two Inceptions come without the auxiliary classifiers that only training uses, and scale
    their input as torchvision's weights expect. Vision transformers are made for the size of
    picture that their best weights were trained with.
    """
    import torchvision

    options: dict[str, Any] = {"num_classes": classes}
    if architecture.startswith("vit_"):
        # A vision transformer is made for pictures of one size.
        preset = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
        options["image_size"] = preset.crop_size[0]
    if architecture in INCEPTIONS:
        options |= {"aux_logits": False, "transform_input": True, "init_weights": False}
    return torchvision.models.get_model(architecture, weights=None, **options).eval()


def with_features(model: Any, node: str) -> Any:
    """A model that gives a dict of "logits" and "features", the latter from a node of its graph."""
    from torchvision.models import feature_extraction

    last = feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)[1][-1]
    return feature_extraction.create_feature_extractor(
        model, {last: "logits", node: "features"}, suppress_diff_warning=True
    ).eval()


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` that holds `count` images, which is at most the largest of them."""
    return min(size for size in sizes if size >= count)


class _CudaGraph:
    """A forward pass of one batch size, recorded once; what it reads and writes stays in place.

    Source of the steps: "CUDA Graphs" in PyTorch's notes on CUDA semantics.
    """

    _WARM_UP_RUNS = 3

    def __init__(self, forward: Any, shape: tuple[int, ...]) -> None:
        import torch

        self._torch = torch
        # Page-locked, so that the copy to the device need not wait for the CPU.
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
        self._host[:count].copy_(self._torch.from_numpy(images))
        self._input.copy_(self._host, non_blocking=True)
        self._graph.replay()
        logits: NDArray[np.float32] = self._output[:count].cpu().numpy()
        return logits
