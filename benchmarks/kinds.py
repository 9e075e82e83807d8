"""Builds archives of many architectures, and prints what each takes: seconds, MB, worst difference.

Weights are random: what is measured is whether an architecture builds, and how exactly. The worst
difference is the largest one between a logit of ONNX Runtime and of PyTorch, over photographs and
noise; of logits above 100 a part of a hundredth of the greatest.
"""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import safetensors.torch
import timm
import torch
import typer
from rich.table import Table

from scripts.build import timm_models
from scripts.build.architectures import TIMM, architectures
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.terminal import UserError, command, console

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

_DIFFERENCE = re.compile(r"([0-9.]+e[-+][0-9]+) in logits")


def _of_torchvision(name: str, folder: Path) -> Path:
    return build(recipe(untrained(name)), folder)


def _of_timm(name: str, folder: Path) -> Path:
    torch.manual_seed(1)
    file = folder / "weights.safetensors"
    model = timm.create_model(name, pretrained=False)
    safetensors.torch.save_model(model, str(file))
    return timm_models.build(timm_models.obtain(TIMM + name, file, None), model_store=folder)


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help="Architectures; timm's with timm/ before them.")
    ] = None,
) -> None:
    """Prints a row for each architecture: torchvision's all, and a dozen of timm's families."""
    wanted = only or [*architectures(), *(TIMM + name for name in TIMM_FAMILIES)]
    table = Table("architecture", "s", "MB", "worst difference")
    for name in wanted:
        make: Callable[[str, Path], Path]
        make = _of_timm if name.startswith(TIMM) else _of_torchvision
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, console.capture() as said:
            try:
                size = make(name.removeprefix(TIMM), Path(folder)).stat().st_size / 1e6
                error = ""
            except UserError as failed:
                size, error = 0.0, str(failed)
        seconds = time.monotonic() - started
        text = said.get()
        found = _DIFFERENCE.findall(text)
        # A model that is used again was compared when it was exported.
        worst = found[-1] if found else "compared before"
        row = (f"{seconds:.0f}", f"{size:.0f}", worst) if not error else ("", "", error[:90])
        table.add_row(name, *row)
        console.print(name, *row)
    console.print(table)


if __name__ == "__main__":
    command(main)
