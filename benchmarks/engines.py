"""Compares inference engines and their options, each in its own process.

For each: images per second with one thread and with all, memory, loading time, and the difference
of its logits from PyTorch's in float32.
"""

import json
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import onnxruntime
import psutil
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.report import CORES, table, write_section
from benchmarks.timing import alternate, call_elsewhere, images_per_second
from handler.settings import Preprocessing
from scripts.build.export import Normalized
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.build.sources.torchvision import random_source
from scripts.samples import sample_views
from scripts.terminal import step

Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

_LEVEL = onnxruntime.GraphOptimizationLevel
# Attributes of SessionOptions, and entries of its configuration (with a dot).
ONNX_OPTIONS: dict[str, dict[str, Any]] = {
    "ONNX Runtime": {},
    "ONNX Runtime, no graph optimization": {"graph_optimization_level": _LEVEL.ORT_DISABLE_ALL},
    "ONNX Runtime, extended optimization": {"graph_optimization_level": _LEVEL.ORT_ENABLE_EXTENDED},
    "ONNX Runtime, no memory arena": {"enable_cpu_mem_arena": False},
    "ONNX Runtime, no memory pattern": {"enable_mem_pattern": False},
    "ONNX Runtime, no spinning": {"session.intra_op.allow_spinning": "0"},
    "ONNX Runtime, spinning stops after a run": {"session.force_spinning_stop": "1"},
}
OTHERS = (
    *("PyTorch eager", "PyTorch channels_last", "TorchScript frozen", "torch.compile"),
    *("OpenVINO", "OpenVINO bfloat16", "ONNX Runtime int8", "OpenVINO int8"),
)
CALIBRATION_IMAGES = 64
_SETUPS = ((1, 1), (1, 8), (CORES, 1), (CORES, 8))  # threads, batch size


def _onnx(model: Path, threads: int, options: dict[str, Any]) -> Logits:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    for name, value in options.items():
        if "." in name:
            settings.add_session_config_entry(name, value)
        else:
            setattr(settings, name, value)
    session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _torch(threads: int, how: str) -> Logits:
    torch.set_num_threads(threads)
    model = Normalized(random_source("densenet121").module, Preprocessing()).eval()
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

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(str(model), "CPU", options)
    request = compiled.create_infer_request()
    return lambda images: request.infer({0: images})[0].copy()


def _int8(model: Path, images: NDArray[np.uint8], target: Path) -> None:
    """Quantize statically, per channel, calibrated on images."""
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(images)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self.rows, None)
            return None if image is None else {"images": image[None]}

    prepared = target.with_suffix(".prepared")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        *(str(prepared), str(target), Reader()),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm"],
    )


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


def measure(name: str, folder: str, threads: str, batch: str, seconds: str) -> None:
    """Print one line of JSON in its own process; with batch 0 write the logits instead."""
    work, started = Path(folder), time.perf_counter()
    logits = _load(name, work / "model.onnx", work / "int8.onnx", int(threads))
    images = np.load(work / "images.npy")
    logits(images[:1])
    first = time.perf_counter() - started
    if not int(batch):
        np.save(work / "logits.npy", np.concatenate([logits(image[None]) for image in images]))
        return
    part = np.ascontiguousarray(images[: int(batch)])
    rate = images_per_second(lambda: logits(part), len(part), float(seconds))
    memory = psutil.Process().memory_full_info().pss / 1e6
    print(json.dumps({"rate": rate, "first": first, "memory": memory}))


def _child(*arguments: object) -> dict[str, float] | None:
    """Run `measure`; return what it printed, None if it failed."""
    try:
        lines = call_elsewhere("benchmarks.engines", "measure", *arguments).splitlines()
    except subprocess.CalledProcessError as error:
        step(f"{arguments[0]}: failed: {error.stderr.strip().splitlines()[-1:]}")
        return None
    values: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return values


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="For each setup in a round.")] = 2.0,
    only: Annotated[list[str] | None, typer.Option(help="These engines.")] = None,
) -> None:
    """Write benchmarks/results/engines.md."""
    samples: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _prepare(work)
        _child("PyTorch eager", work, 1, 0, 0)
        expected = np.load(work / "logits.npy")
        accuracy = {
            name: _accuracy(name, work, expected) for name in only or [*ONNX_OPTIONS, *OTHERS]
        }
        cases = [(name, *setup) for name in accuracy if accuracy[name] for setup in _SETUPS]
        for case in track(alternate(cases, rounds), "Measuring ...", total=len(cases) * rounds):
            name, threads, batch = case
            values = _child(name, work, threads, batch, seconds)
            if values:
                samples.setdefault(case, []).append(values)
    rows = [_row(name, found, samples) for name, found in accuracy.items()]
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


def _prepare(work: Path) -> None:
    images = sample_views(Preprocessing(), 240)
    np.save(work / "images.npy", images)
    archive = build(from_options(arch="densenet121", weights="random"), work / "store")
    with zipfile.ZipFile(archive) as content:
        (work / "model.onnx").write_bytes(content.read("model.onnx"))
    _int8(work / "model.onnx", images[:CALIBRATION_IMAGES], work / "int8.onnx")


def _accuracy(name: str, work: Path, expected: NDArray[np.float32]) -> tuple[str, str] | None:
    """Return the largest difference of a logit, and the share of images with the same top-1."""
    (work / "logits.npy").unlink(missing_ok=True)
    if _child(name, work, 1, 0, 0) is None:
        return None
    # Without the calibration images, which int8 was fitted to.
    mine, theirs = (
        found[CALIBRATION_IMAGES:] for found in (np.load(work / "logits.npy"), expected)
    )
    same = float((mine.argmax(1) == theirs.argmax(1)).mean())
    return f"{np.abs(mine - theirs).max():.1e}", f"{same:.1%}"


def _row(
    name: str,
    accuracy: tuple[str, str] | None,
    samples: dict[tuple[str, int, int], list[dict[str, float]]],
) -> list[object]:
    if accuracy is None or any((name, *setup) not in samples for setup in _SETUPS):
        return [name, "failed", *[""] * (len(_SETUPS) + 3)]

    def middle(setup: tuple[int, int], key: str) -> float:
        return median(sample[key] for sample in samples[(name, *setup)])

    rates = (middle(setup, "rate") for setup in _SETUPS)
    return [name, *rates, middle((1, 8), "memory"), middle((1, 8), "first"), *accuracy]
