"""Run an untrusted ONNX file in a process of its own, with limits that the kernel enforces.

A file of a few bytes can demand any amount of memory or time, as soon as it is loaded.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

# Address space, of which ONNX Runtime reserves much more than it uses.
MAX_ADDRESS_SPACE_BYTES = 24_000_000_000
# Wall clock, and CPU time too.
MAX_SECONDS = 300

_INPUTS, _OUTPUTS = "batches.npz", "outputs.npz"
_CPU = ["CPUExecutionProvider"]

Outputs = dict[str, NDArray[Any]]


class TrialError(Exception):
    """A model cannot be run; the text is a sentence for a person."""


def run_in_subprocess(model: Path, batches: Sequence[NDArray[np.generic]]) -> list[Outputs]:
    """Return the outputs by name of an ONNX file with one input, per batch.

    Raises:
        TrialError: it cannot be loaded or run, or exceeds a limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, _INPUTS), *batches, allow_pickle=False)
        command = [sys.executable, "-m", __name__, str(model.resolve()), folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TrialError(f"{model.name} takes more than {MAX_SECONDS} s to run.") from error
        if done.returncode != 0:
            raise TrialError(f"{model.name} cannot be run: {_reason(done)}.")
        names = json.loads(done.stdout)
        with np.load(Path(folder, _OUTPUTS), allow_pickle=False) as arrays:
            return [
                {name: arrays[f"{number}-{position}"] for position, name in enumerate(names)}
                for number in range(len(batches))
            ]


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0 or "bad_alloc" in done.stderr or "llocat" in done.stderr:
        return "it ran out of memory or time, or ONNX Runtime crashed"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].split(" : ")[-1][:300].rstrip(".") if lines else "it stopped without a message"


@cache
def newest_opset() -> int:
    """Return the newest version of ONNX's operators that ONNX Runtime supports."""
    from onnx import defs, parser  # the subprocess does without

    graph = "g (float[1] x) => (float[1] y) { y = Identity(x) }"
    for opset in range(defs.onnx_opset_version(), 1, -1):
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}')
        with suppress(Exception):  # its own kinds
            onnxruntime.InferenceSession(model.SerializeToString(), providers=_CPU)
            return opset
    raise TrialError("ONNX Runtime loads no model at all.")


def _run(model: str, folder: Path) -> None:
    """Write the outputs and print their names; runs in the subprocess."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS,) * 2)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=_CPU)
    names = [output.name for output in session.get_outputs()]
    taken = session.get_inputs()[0].name
    found: Outputs = {}
    with np.load(folder / _INPUTS, allow_pickle=False) as batches:
        for number in range(len(batches.files)):
            values = session.run(names, {taken: batches[f"arr_{number}"]})
            found |= {f"{number}-{position}": value for position, value in enumerate(values)}
    np.savez(folder / _OUTPUTS, **found, allow_pickle=False)
    print(json.dumps(names))


if __name__ == "__main__":
    _run(sys.argv[1], Path(sys.argv[2]))
