"""ONNX Runtime on the CPU; normalisation is part of the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from handler.cores import Cores


class OnnxEngine:
    """See `handler.engines.Engine`.

    A session's number of threads is fixed, so there is one for a worker's share of the cores and
    one for all of them, chosen anew for each image.

    Images of a batch run one by one. Larger runs leave the caches: with one process per core,
    8 at once took 18 % longer per image, and 180 MB more memory (benchmarks/results/engines.md).
    """

    precision = "float32"

    def __init__(self, model_file: Path, cores: Cores) -> None:
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

    def logits_and_embedding(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Engine.logits_and_embedding`."""
        logits, embedding = self._run(["logits", "embedding"], images)
        return logits, embedding

    def _run(self, outputs: list[str], images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """One image a run: see above."""
        runs = [
            self._sessions[self._cores.available()].run(outputs, {self._input: images[i : i + 1]})
            for i in range(len(images))
        ]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def _onnx_session(model_file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for the next layer spin, which shortens a lone client's wait by a tenth;
    # between runs they must not, since other workers need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(model_file), options, providers=["CPUExecutionProvider"]
    )
