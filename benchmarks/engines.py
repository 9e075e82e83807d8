"""Compares inference engines and their options, each in its own process.

For each: images per second with one thread and with all, memory, loading time, and the difference
of its logits from PyTorch's in float32.
"""

import json
import subprocess
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import psutil
import torch
import typer
from numpy.typing import NDArray

from benchmarks.archives import workspace
from benchmarks.report import CORES, table, write_section
from benchmarks.timing import call_elsewhere, images_per_second, medians
from handler.settings import Preprocessing
from scripts.build.export import Normalized
from scripts.build.sources.torchvision import random_source
from scripts.samples import sample_views
from scripts.terminal import step

Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Case = tuple[str, int, int]  # engine, threads, batch size

CALIBRATION_IMAGES = 64
_SETUPS = ((1, 1), (1, 8), (CORES, 1), (CORES, 8))  # threads, batch size
_MODEL, _INT8 = "model.onnx", "int8.onnx"


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="For each setup in a round.")] = 2.0,
    only: Annotated[list[str] | None, typer.Option(help="These engines.")] = None,
) -> None:
    """Write benchmarks/results/engines.md."""
    with workspace() as (work, archive):
        images = sample_views(Preprocessing(), 240)
        np.save(work / "images.npy", images)
        with zipfile.ZipFile(archive) as content:
            content.extract(_MODEL, work)
        _quantize(work, images[:CALIBRATION_IMAGES])
        logits = {name: _logits(name, work) for name in {"PyTorch eager", *(only or ENGINES)}}

        def measure(case: Case) -> dict[str, float]:
            printed = call_elsewhere("benchmarks.engines", "print_speed", work, *case, seconds)
            values: dict[str, float] = json.loads(printed.splitlines()[-1])
            return values

        names = [name for name in only or ENGINES if logits[name] is not None]
        found = medians([(name, *setup) for name in names for setup in _SETUPS], rounds, measure)
    rows: list[list[object]] = []
    for name in only or ENGINES:
        exact, mine = logits["PyTorch eager"], logits[name]
        if exact is None or mine is None:
            rows.append([name, "failed", *[""] * (len(_SETUPS) + 3)])
            continue
        same = float((mine.argmax(1) == exact.argmax(1)).mean())
        batches = found[(name, 1, 8)]
        rates = (found[(name, *setup)]["rate"] for setup in _SETUPS)
        accuracy = (f"{np.abs(mine - exact).max():.1e}", f"{same:.1%}")
        rows.append([name, *rates, batches["memory"], batches["first"], *accuracy])
    heads = [f"{t} thread{'s' * (t > 1)}, batch {b}" for t, b in _SETUPS]
    headings = ("engine", *heads, "memory MB", "first answer s", "logits", "same top-1")
    text = (
        "Images per second, medians of alternating rounds; PSS after batches of 8 with one thread, "
        "of a process that has imported PyTorch; time to the first answer; largest difference of a "
        "logit from PyTorch in float32, and share of images with the same top-1. Random weights "
        "give near ties: that share says nothing about a trained model. Repeat: "
        "`make bench-engines`."
    )
    write_section("engines", "Engines", "DenseNet-121", text, table(headings, rows))


def _logits(name: str, work: Path) -> NDArray[np.float32] | None:
    """Return an engine's logits without the calibration images, float32 (N, 1000), or None."""
    try:
        call_elsewhere("benchmarks.engines", "save_logits", work, name)
    except subprocess.CalledProcessError as error:
        step(f"{name}: failed: {error.stderr.strip().splitlines()[-1:]}")
        return None
    found: NDArray[np.float32] = np.load(work / "logits.npy")
    return found[CALIBRATION_IMAGES:]


def save_logits(folder: str, name: str) -> None:
    """Write an engine's logits, in its own process."""
    work = Path(folder)
    run = ENGINES[name](work, 1)
    images = np.load(work / "images.npy")
    np.save(work / "logits.npy", np.concatenate([run(image[None]) for image in images]))


def print_speed(folder: str, name: str, threads: str, batch: str, seconds: str) -> None:
    """Print an engine's speed and memory as JSON, in its own process."""
    work, started = Path(folder), time.perf_counter()
    run = ENGINES[name](work, int(threads))
    images = np.load(work / "images.npy")
    run(images[:1])
    first = time.perf_counter() - started
    part = np.ascontiguousarray(images[: int(batch)])
    rate = images_per_second(lambda: run(part), len(part), float(seconds))
    memory = psutil.Process().memory_full_info().pss / 1e6
    print(json.dumps({"rate": rate, "first": first, "memory": memory}))


def _quantize(work: Path, images: NDArray[np.uint8]) -> None:
    """Write an int8 model, quantized statically and per channel, calibrated on images."""
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(images)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self.rows, None)
            return None if image is None else {"images": image[None]}

    prepared = work / "prepared.onnx"
    quant_pre_process(str(work / _MODEL), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        *(str(prepared), str(work / _INT8), Reader()),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm"],
    )


# --- The engines ---


def _onnx(work: Path, threads: int, model: str = _MODEL, **options: Any) -> Logits:
    """Load a model with attributes of SessionOptions or, with a dot, entries of its config."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    for name, value in options.items():
        if "." in name:
            settings.add_session_config_entry(name, value)
        else:
            setattr(settings, name, value)
    session = onnxruntime.InferenceSession(
        str(work / model), settings, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(["logits"], {"images": images})[0]


def _openvino(work: Path, threads: int, model: str = _MODEL, precision: str = "f32") -> Logits:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(str(work / model), "CPU", options)
    request = compiled.create_infer_request()
    return lambda images: request.infer({0: images})[0].copy()


def _torch(_: Path, threads: int, how: str) -> Logits:
    torch.set_num_threads(threads)
    model = Normalized(random_source("densenet121").module, Preprocessing()).eval()
    if how != "eager":
        model = model.to(memory_format=torch.channels_last)
    run: Any = model
    if how == "TorchScript":
        example = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
        run = torch.jit.freeze(torch.jit.trace(model, example))  # type: ignore[no-untyped-call]
    elif how == "compile":
        from torch._inductor import config

        config.freezing = True
        run = torch.compile(model)

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            result: NDArray[np.float32] = run(torch.from_numpy(images)).numpy()
            return result

    return logits


_LEVEL = onnxruntime.GraphOptimizationLevel
_ONNX_OPTIONS: dict[str, dict[str, Any]] = {
    "no graph optimization": {"graph_optimization_level": _LEVEL.ORT_DISABLE_ALL},
    "extended optimization": {"graph_optimization_level": _LEVEL.ORT_ENABLE_EXTENDED},
    "no memory arena": {"enable_cpu_mem_arena": False},
    "no memory pattern": {"enable_mem_pattern": False},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spinning stops after a run": {"session.force_spinning_stop": "1"},
}
ENGINES: dict[str, Callable[[Path, int], Logits]] = {
    "ONNX Runtime": _onnx,
    **{f"ONNX Runtime, {k}": partial(_onnx, **options) for k, options in _ONNX_OPTIONS.items()},
    "PyTorch eager": partial(_torch, how="eager"),
    "PyTorch channels_last": partial(_torch, how="channels_last"),
    "TorchScript frozen": partial(_torch, how="TorchScript"),
    "torch.compile": partial(_torch, how="compile"),
    "OpenVINO": _openvino,
    "OpenVINO bfloat16": partial(_openvino, precision="bf16"),
    "ONNX Runtime int8": partial(_onnx, model=_INT8),
    "OpenVINO int8": partial(_openvino, model=_INT8),
}
