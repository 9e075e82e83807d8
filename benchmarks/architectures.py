"""Builds archives of many architectures with random weights, and measures their exactness.

The worst difference is the largest one between a logit of ONNX Runtime and of PyTorch, over
photographs and noise; of logits above 100, relative to a hundredth of the largest. If a random
network's logits are so large that PyTorch itself is inexact, the row has PyTorch's own rounding
too, measured in float64. An export of an earlier build in build/ is neither repeated nor compared;
the row says so.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import safetensors.torch
import timm
import torch
import typer

from benchmarks.report import RESULTS, write_section
from benchmarks.timing import cpu_seconds
from scripts.build.model_file import TIMM, from_options
from scripts.build.packing import BUILD
from scripts.build.pipeline import build
from scripts.build.sources.torchvision import architectures
from scripts.terminal import console, step

# One architecture per family.
TIMM_FAMILIES = (
    "convnext_atto.d2_in1k",
    "densenet121.ra_in1k",
    "efficientnet_b0.ra_in1k",
    "ghostnet_100.in1k",
    "mixnet_s.ft_in1k",
    "mobilenetv3_small_100.lamb_in1k",
    "regnety_002.pycls_in1k",
    "repvgg_a0.rvgg_in1k",
    "resnet18.a1_in1k",
    "resnetv2_50.a1h_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "xcit_nano_12_p16_224.fb_in1k",
)

_PAGE = "architectures"
_HOW = (
    "An archive of each of torchvision's classifiers and of a dozen of timm's families, with "
    "random weights: CPU time of the build, size, and the worst difference between a logit of ONNX "
    "Runtime and of PyTorch; if that is large, PyTorch's own rounding with these weights. Repeat: "
    "`make bench-architectures`, which takes hours; rows may be of different runs."
)

_NUMBER = r"[0-9.]+e[-+][0-9]+"
_DIFFERENCE = re.compile(
    rf"({_NUMBER})\s+in\s+logits(?:\s+\(PyTorch's\s+own\s+rounding:\s+({_NUMBER})\))?"
)


def measure(name: str) -> str:
    """Build one archive; return the table's row."""
    BUILD.mkdir(exist_ok=True)
    before = set(BUILD.glob("converted-*"))
    size, worst = 0.0, "exported before"
    started = cpu_seconds()
    with tempfile.TemporaryDirectory() as folder, console.capture() as printed:
        try:
            size = _build(name, Path(folder)).stat().st_size / 1e6
        except Exception as error:
            # Any error of an exporter is a result.
            worst = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    seconds = cpu_seconds() - started
    for left in set(BUILD.glob("converted-*")) - before:
        shutil.rmtree(left)
    for difference, rounding in _DIFFERENCE.findall(printed.get()) if size else ():
        worst = f"{difference}; rounding {rounding}" if rounding else difference
    return f"| {name} | {seconds:.0f} | {size:.0f} | {worst} |"


def _build(name: str, folder: Path) -> Path:
    if not name.startswith(TIMM):
        return build(from_options(arch=name, weights="random"), folder)
    torch.manual_seed(1)
    file = folder / "weights.safetensors"
    model = timm.create_model(name.removeprefix(TIMM), pretrained=False)
    safetensors.torch.save_model(model, str(file))
    return build(from_options(arch=name, weights=str(file)), folder)


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help="Architectures; those of timm begin with timm/.")
    ] = None,
) -> None:
    """Write benchmarks/results/architectures.md; keep the rows of other architectures."""
    everything = [*architectures(), *(TIMM + name for name in TIMM_FAMILIES)]
    page = RESULTS / f"{_PAGE}.md"
    for name in only or everything:
        lines = [*(page.read_text().splitlines() if page.exists() else ()), measure(name)]
        step(lines[-1])
        rows = {line.split()[1]: line for line in lines if line.startswith("| ")}
        kept = [rows[name] for name in everything if name in rows]
        built = sum(line.split(" | ")[2] != "0" for line in kept)
        text = f"{_HOW} {built} of {len(kept)} were built."
        head = ["| architecture | CPU s | MB | worst difference |", "|---|---|---|---|"]
        write_section(_PAGE, "Archives of many architectures", "All", text, [*head, *kept])
