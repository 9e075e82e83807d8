"""Builds archives of many architectures: what each takes, and how exact it is.

Weights are random: what is measured is whether an architecture builds, and how exactly. The worst
difference is the largest one between a logit of ONNX Runtime and of PyTorch, over photographs and
noise; of logits above 100 a part of a hundredth of the greatest. Some random networks' logits are
so large that PyTorch itself is no more exact: then its own rounding, found by computing in float64,
stands beside the difference. An export that an earlier build left in build/ is not made, nor
compared, again; the row says so.
"""

import re
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
import timm
import torch
import typer

from benchmarks.machine import RESULTS, write_report
from scripts.build import timm_models
from scripts.build.architectures import TIMM, architectures
from scripts.build.archive import build, recipe
from scripts.build.packing import BUILD, Said
from scripts.build.weights import untrained
from scripts.terminal import command, console

# One of each of a dozen families of timm's.
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

_PAGE = "kinds"

_NUMBER = r"[0-9.]+e[-+][0-9]+"
_DIFFERENCE = re.compile(
    rf"({_NUMBER})\s+in\s+logits(?:\s+\(PyTorch's\s+own\s+rounding:\s+({_NUMBER})\))?"
)


def _of_torchvision(name: str, folder: Path) -> Path:
    return build(recipe(untrained(name)), folder)


def _of_timm(name: str, folder: Path) -> Path:
    torch.manual_seed(1)
    file = folder / "weights.safetensors"
    model = timm.create_model(name, pretrained=False)
    safetensors.torch.save_model(model, str(file))
    preprocessing = timm_models.preprocessing_of(TIMM + name, Said())
    found = timm_models.obtain(TIMM + name, file, None)
    return timm_models.build(found, preprocessing, model_store=folder)


@dataclass(frozen=True)
class Row:
    """How one architecture's build ended.

    Attributes:
        name: of the architecture; timm's with timm/ before it.
        seconds: of processors' time for the whole build, which other work does not lengthen.
        megabytes: of the archive; 0 where none was built.
        worst: the worst difference, or why there is none.
    """

    name: str
    seconds: float
    megabytes: float
    worst: str

    def cells(self) -> tuple[str, str, str, str]:
        """As a person reads them."""
        return self.name, f"{self.seconds:.0f}", f"{self.megabytes:.0f}", self.worst


def measure(name: str) -> Row:
    """Builds one archive, and removes what that left."""
    make: Callable[[str, Path], Path] = _of_timm if name.startswith(TIMM) else _of_torchvision
    BUILD.mkdir(exist_ok=True)
    before = set(BUILD.iterdir())
    size, error = 0, ""
    started = _cpu_seconds()
    with tempfile.TemporaryDirectory() as folder, console.capture() as said:
        try:
            size = make(name.removeprefix(TIMM), Path(folder)).stat().st_size
        except Exception as failed:
            # Whatever an exporter raises is this row's result.
            error = f"{type(failed).__name__}: {failed}".splitlines()[0][:120]
    seconds = _cpu_seconds() - started
    for left in set(BUILD.iterdir()) - before:
        left.unlink()
    worst = "exported before"
    for difference, rounding in _DIFFERENCE.findall(said.get()):
        worst = f"{difference}; rounding {rounding}" if rounding else difference
    return Row(name, seconds, size / 1e6, error or worst)


def _cpu_seconds() -> float:
    """Of this process and of those it waited for, such as the archiver."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help="Architectures; timm's with timm/ before them.")
    ] = None,
) -> None:
    """Writes a row for each architecture into benchmarks/results/kinds.md.

    All of them take hours; of those that are named the rows are made anew, and others stay.
    """
    everything = [*architectures(), *(TIMM + name for name in TIMM_FAMILIES)]
    for name in only or everything:
        row = measure(name)
        console.print(*row.cells())
        _write({**_rows(), name: f"| {' | '.join(row.cells())} |"}, everything)


def _rows() -> dict[str, str]:
    """Those that the page has, by architecture."""
    page = RESULTS / f"{_PAGE}.md"
    lines = page.read_text().splitlines() if page.exists() else []
    return {line.split()[1]: line for line in lines if line.startswith("| ")}


def _write(rows: Mapping[str, str], everything: Sequence[str]) -> None:
    there = [rows[name] for name in everything if name in rows]
    built = sum(row.split(" | ")[2] != "0" for row in there)
    missing = [name for name in everything if name not in rows]
    lines = [
        (
            "An archive of each of torchvision's classifiers and of a dozen of timm's families, "
            "built with random weights: the build's processor time, the archive's size, and the "
            "worst difference between a logit of ONNX Runtime and of PyTorch; where that is large, "
            "beside it PyTorch's own rounding with these weights, found in float64. Made by "
            "`python -m benchmarks.kinds`, which takes hours; rows may be of different runs."
        ),
        "",
        f"{built} of {len(there)} were built."
        + (f" Not run yet: {', '.join(missing)}." if missing else ""),
        "",
        "| architecture | CPU s | MB | worst difference |",
        "|---|---|---|---|",
        *there,
    ]
    write_report(_PAGE, "Building archives of many architectures", lines)


if __name__ == "__main__":
    command(main)
