"""Runs an ONNX file from elsewhere in a process of its own, which the kernel bounds.

A file of a few bytes can ask for any amount of memory or time, as soon as it is loaded.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

# Address space: of what ONNX Runtime reserves little is ever used.
_MOST_BYTES = 24_000_000_000
_MOST_SECONDS = 300
_OUTPUTS = "outputs.npz"


class TrialError(Exception):
    """A model cannot be run, with the reason as a sentence for a person."""


Outputs = dict[str, NDArray[Any]]


def outputs_of(model: Path, batches: Sequence[NDArray[np.generic]]) -> list[Outputs]:
    """What a model gives for each of some batches.

    Args:
        model: an ONNX file with one input.
        batches: what to give to that.

    Returns:
        for each batch the model's outputs by their names.

    Raises:
        TrialError: it cannot be loaded or run, or takes more memory or time than is allowed.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "batches.npz"), *batches, allow_pickle=False)
        command = [sys.executable, "-m", __name__, str(model.resolve()), folder]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_MOST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TrialError(f"{model.name} takes more than {_MOST_SECONDS} s to run.") from error
        if done.returncode != 0:
            raise TrialError(f"{model.name} cannot be run: {_reason(done)}.")
        found: list[Outputs] = [{} for _ in batches]
        names = json.loads(done.stdout)
        with np.load(Path(folder, _OUTPUTS), allow_pickle=False) as arrays:
            for number, outputs in enumerate(found):
                for position, name in enumerate(names):
                    outputs[name] = arrays[f"{number}-{position}"]
    return found


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0 or "bad_alloc" in done.stderr or "llocat" in done.stderr:
        return "it ended for want of memory or time, or by a fault in ONNX Runtime"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].split(" : ")[-1][:300].rstrip(".") if lines else "for no reason that it gave"


@cache
def newest_opset() -> int:
    """The newest version of ONNX's operators that ONNX Runtime knows."""
    from onnx import TensorProto, defs, helper  # noqa: PLC0415  # the bounded process does without

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    for opset in range(defs.onnx_opset_version(), 1, -1):
        imports = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        except Exception:  # noqa: S112  # its own kinds
            continue
        return opset
    raise TrialError("ONNX Runtime loads no model at all.")


def _run(model: str, folder: Path) -> None:
    """The process: writes the outputs, and prints their names."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_MOST_SECONDS, _MOST_SECONDS))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = session.get_inputs()[0].name
    found: Outputs = {}
    with np.load(folder / "batches.npz", allow_pickle=False) as batches:
        for number in range(len(batches.files)):
            values = session.run(names, {given: batches[f"arr_{number}"]})
            found |= {f"{number}-{position}": value for position, value in enumerate(values)}
    np.savez(folder / _OUTPUTS, **found, allow_pickle=False)
    print(json.dumps(names))


if __name__ == "__main__":
    _run(sys.argv[1], Path(sys.argv[2]))
