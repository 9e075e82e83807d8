"""What runs the model fastest: each candidate alone in a process of its own.

For each one: images a second with one thread and with all, memory, loading time, and how far its
answers are from PyTorch's in float32. Rounds alternate between the candidates, so that a noisy
minute does not hit only one; the table has medians.
"""

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import psutil
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.machine import CORES, write_report
from benchmarks.timing import images_a_second, in_turn
from handler.settings import Preprocessing
from scripts.build.archive import build, recipe
from scripts.build.export import Normalized
from scripts.build.weights import build_model, untrained
from scripts.samples import sample_views
from scripts.terminal import command, step

Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

# Each candidate: what is set apart from the first line, which is ONNX Runtime as it comes.
ONNX_OPTIONS: dict[str, dict[str, Any]] = {
    "ONNX Runtime": {},
    "ONNX Runtime, no graph optimisation": {"graph_optimization_level": "ORT_DISABLE_ALL"},
    "ONNX Runtime, basic optimisation": {"graph_optimization_level": "ORT_ENABLE_BASIC"},
    "ONNX Runtime, extended optimisation": {"graph_optimization_level": "ORT_ENABLE_EXTENDED"},
    "ONNX Runtime, no memory arena": {"enable_cpu_mem_arena": False},
    "ONNX Runtime, no memory pattern": {"enable_mem_pattern": False},
    "ONNX Runtime, parallel execution": {"execution_mode": "ORT_PARALLEL"},
    "ONNX Runtime, no spinning": {"session.intra_op.allow_spinning": "0"},
    "ONNX Runtime, spinning stops after a run": {"session.force_spinning_stop": "1"},
}
OTHERS = (
    "PyTorch eager",
    "PyTorch channels_last",
    "TorchScript frozen",
    "torch.compile",
    "OpenVINO",
    "OpenVINO bfloat16",
    "ONNX Runtime int8",
    "OpenVINO int8",
)
INT8_CALIBRATION_IMAGES = 64


def _onnx(model: Path, threads: int, options: dict[str, Any]) -> Logits:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    for name, value in options.items():
        if "." in name:
            settings.add_session_config_entry(name, value)
        elif name == "execution_mode":
            settings.execution_mode = getattr(onnxruntime.ExecutionMode, value)
        elif name == "graph_optimization_level":
            level = getattr(onnxruntime.GraphOptimizationLevel, value)
            settings.graph_optimization_level = level
        else:
            setattr(settings, name, value)
    session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _torch(threads: int, how: str) -> Logits:
    torch.set_num_threads(threads)
    model = Normalized(build_model(untrained()), Preprocessing()).eval()
    if how != "PyTorch eager":
        model = model.to(memory_format=torch.channels_last)
    run: Any = model
    if how == "TorchScript frozen":
        example = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
        run = torch.jit.freeze(torch.jit.trace(model, example))  # type: ignore[no-untyped-call]
    elif how == "torch.compile":
        from torch._inductor import config

        config.freezing = True
        run = torch.compile(model)

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            result: NDArray[np.float32] = run(torch.from_numpy(images)).numpy()
            return result

    return logits


def _openvino(model: Path, threads: int, precision: str) -> Logits:
    import openvino

    compiled = openvino.Core().compile_model(
        str(model),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    return lambda images: request.infer({0: images})[0].copy()


def _int8(model: Path, images: NDArray[np.uint8], target: Path) -> None:
    """Static quantisation, calibrated on photographs; convolutions to 8 bits per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images[:INT8_CALIBRATION_IMAGES])

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self._left, None)
            return None if image is None else {"images": image[None]}

    prepared = target.with_suffix(".prepared")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm"],
    )
    onnx.checker.check_model(str(target))


def _load(name: str, model: Path, int8: Path, threads: int) -> Logits:
    if name in ONNX_OPTIONS:
        return _onnx(model, threads, ONNX_OPTIONS[name])
    match name:
        case "ONNX Runtime int8":
            return _onnx(int8, threads, {})
        case "OpenVINO":
            return _openvino(model, threads, "f32")
        case "OpenVINO bfloat16":
            return _openvino(model, threads, "bf16")
        case "OpenVINO int8":
            return _openvino(int8, threads, "f32")
    return _torch(threads, name)


def measure(name: str, work: Path, threads: int, batch: int, seconds: float) -> None:
    """In a process of its own: prints one line of JSON; with batch 0 it writes the logits."""
    started = time.perf_counter()
    logits = _load(name, work / "model.onnx", work / "int8.onnx", threads)
    images = np.load(work / "images.npy")
    logits(images[:1])
    first = time.perf_counter() - started
    if batch == 0:
        np.save(work / "logits.npy", np.concatenate([logits(i[None]) for i in images]))
        return
    part = np.ascontiguousarray(images[:batch])
    rate = images_a_second(lambda: logits(part), batch, seconds)
    memory = psutil.Process().memory_full_info().pss
    print(json.dumps({"rate": rate, "first": first, "memory": memory}))


def _child(*arguments: str) -> dict[str, float] | None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.engines", "--child", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        step(f"{arguments[0]}: failed: {result.stderr.strip().splitlines()[-1:]}")
        return None
    lines = result.stdout.strip().splitlines()
    values: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return values


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="For each of five settings a round.")] = 2.0,
    only: Annotated[list[str] | None, typer.Option(help="These candidates.")] = None,
    child: Annotated[tuple[str, Path, int, int, float] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every candidate and writes benchmarks/results/engines.md."""
    if child is not None:
        measure(*child)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _prepare(work)
        names = only or [*ONNX_OPTIONS, *OTHERS]
        expected = _reference(work)
        accuracy = {name: _accuracy(name, work, expected) for name in names}
        setups = [(1, 1), (1, 2), (1, 8), (CORES, 1), (CORES, 8)]
        ways = [(name, *setup) for name in names if accuracy[name] for setup in setups]
        samples: dict[tuple[str, int, int], list[dict[str, float]]] = {}
        for way in track(in_turn(ways, rounds), "Measuring ...", total=len(ways) * rounds):
            name, threads, batch = way
            values = _child(name, str(work), str(threads), str(batch), str(seconds))
            if values:
                samples.setdefault(way, []).append(values)
    _write(names, setups, samples, accuracy)


def _prepare(work: Path) -> None:
    images = sample_views(Preprocessing(), 240)
    np.save(work / "images.npy", images)
    archive = build(recipe(untrained()), work / "store")
    with zipfile.ZipFile(archive) as content:
        (work / "model.onnx").write_bytes(content.read("model.onnx"))
    _int8(work / "model.onnx", images[:INT8_CALIBRATION_IMAGES], work / "int8.onnx")


def _reference(work: Path) -> NDArray[np.float32]:
    _child("PyTorch eager", str(work), "1", "0", "0")
    logits: NDArray[np.float32] = np.load(work / "logits.npy")
    return logits


def _accuracy(name: str, work: Path, expected: NDArray[np.float32]) -> tuple[float, float] | None:
    """Largest difference of a logit, and the share of images with the same first label."""
    (work / "logits.npy").unlink(missing_ok=True)
    if _child(name, str(work), "1", "0", "0") is None:
        return None
    logits = np.load(work / "logits.npy")
    # Not the calibration images: int8 would look better on what it was fitted to.
    mine, theirs = logits[INT8_CALIBRATION_IMAGES:], expected[INT8_CALIBRATION_IMAGES:]
    same = float((mine.argmax(1) == theirs.argmax(1)).mean())
    return float(np.abs(mine - theirs).max()), same


def _write(
    names: list[str],
    setups: list[tuple[int, int]],
    samples: dict[tuple[str, int, int], list[dict[str, float]]],
    accuracy: dict[str, tuple[float, float] | None],
) -> None:
    def middle(name: str, setup: tuple[int, int], key: str) -> float:
        return median(s[key] for s in samples[(name, *setup)])

    heads = [f"{t} thread{'s' * (t > 1)}, batch {b}" for t, b in setups]
    lines = [
        (
            "Images a second, medians of alternating rounds; memory (PSS) after batches of 8 with "
            "one thread, of a process that has imported PyTorch; time to the first answer; "
            "largest difference of a logit to PyTorch in float32, and share of the same first "
            "label. The weights are random, so that logits are nearly equal: that share tells "
            "nothing of a trained model. Made by `make bench-engines`."
        ),
        "",
        "| engine | " + " | ".join(heads) + " | memory MB | first answer s | logits | same label |",
        "|---" * (len(heads) + 5) + "|",
    ]
    for name in names:
        found = accuracy[name]
        if found is None or any((name, *setup) not in samples for setup in setups):
            lines.append(f"| {name} | failed here |" + " |" * (len(heads) + 3))
            continue
        rates = [f"{middle(name, setup, 'rate'):.1f}" for setup in setups]
        memory = middle(name, (1, 8), "memory") / 1e6
        first = middle(name, (1, 8), "first")
        lines.append(
            f"| {name} | {' | '.join(rates)} | {memory:.0f} | {first:.1f} "
            f"| {found[0]:.1e} | {found[1]:.1%} |"
        )
    write_report("engines", "Engines", lines)


if __name__ == "__main__":
    command(main)
