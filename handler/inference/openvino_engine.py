"""Run the model in reduced precision with OpenVINO on the CPU; the graph normalizes its input."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from handler.errors import ArchiveError
from handler.inference.cores import Cores
from handler.inference.engines import Extra, Outputs, run_one_by_one

# OpenVINO's precision for layers whose precision the model does not set. Layers of an int8 model
# that are not quantized run in float32, so that their results do not depend on the processor.
_PRECISION_HINT = {"bf16": "bf16", "int8": "f32"}
# Required capability of the processor. Without it OpenVINO would emulate the precision, slower than
# float32.
_CAPABILITY = {"bf16": "BF16", "int8": "INT8"}


class OpenVinoEngine:
    """See `handler.inference.engines.Engine`.

    A compiled model's number of threads is fixed, so there is one compiled model for a worker's
    share of the cores and one for all of them, chosen per image.
    """

    def __init__(self, model_file: Path, precision: str, cores: Cores) -> None:
        """Compile an ONNX file, or OpenVINO's `.xml` with its `.bin` in the same folder.

        Raises:
            ArchiveError: this processor does not support the precision, "bf16" or "int8".
        """
        core = openvino.Core()
        if _CAPABILITY[precision] not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ArchiveError(f"this processor does not compute in {precision}")
        model = core.read_model(model_file)
        # OpenVINO optimizes a graph of fixed shape better.
        model.reshape([1, *list(model.input().partial_shape)[1:]])
        self._cores = cores
        self._requests = {
            threads: _request(core, model, precision, threads)
            for threads in {cores.share, cores.all}
        }
        self.precision = precision
        version = openvino.__version__.split("-")[0]
        self.name = f"OpenVINO {version}, CPU, {precision}, {cores.share} to {cores.all} thread(s)"

    def run(self, images: NDArray[np.uint8], extra: Extra | None = None) -> Outputs:
        """See `Engine.run`; all outputs are computed in this engine's precision."""
        names = ["logits", *([extra.value] if extra else [])]

        def run(threads: int, image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            request = self._requests[threads]
            request.infer([image])
            # The next run of a request overwrites its tensors.
            return [request.get_tensor(name).data.copy() for name in names]

        return run_one_by_one(images, self._cores, run)


def _request(core: Any, model: Any, precision: str, threads: int) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Pinning would place all workers on the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    return core.compile_model(model, "CPU", options).create_infer_request()
