"""Run the model with ONNX Runtime on the CPU; normalization is part of the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from handler.inference.cores import Cores
from handler.inference.engines import Extra, Outputs, run_one_by_one


class OnnxEngine:
    """See `handler.inference.engines.Engine`.

    A session's number of threads is fixed, so there is one session for a worker's share of the
    cores and one for all of them, chosen per image.
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

    def run(self, images: NDArray[np.uint8], extra: Extra | None = None) -> Outputs:
        """See `Engine.run`."""
        names = ["logits", *([extra.value] if extra else [])]
        return run_one_by_one(
            images,
            self._cores,
            lambda threads, image: self._sessions[threads].run(names, {self._input: image}),
        )


def _onnx_session(model_file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads spin while they wait for the next layer, which cuts a single client's latency by a
    # tenth. Between runs they must not spin, since other workers need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(model_file), options, providers=["CPUExecutionProvider"]
    )
