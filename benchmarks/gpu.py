"""Compares the PyTorch engine with eager PyTorch on a GPU, or on the CPU if there is none.

Images per second of the engine for growing batches, the difference of its logits from float32, and
images per second from JPEG bytes to probabilities.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.report import table, write_section
from benchmarks.timing import images_per_second
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.inference.activation import softmax
from handler.inference.cores import Cores
from handler.inference.engines import load_engine
from handler.settings import ModelCard, Preprocessing
from scripts.build.export import Normalized
from scripts.build.sources.torchvision import random_source
from scripts.samples import CAT, sample_views
from scripts.terminal import step

GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CPU_BATCHES = (1, 4)


def main(seconds: Annotated[float, typer.Option(min=0.1)] = 2.0) -> None:
    """Write benchmarks/results/gpu.md, or cpu-torch.md if there is no GPU."""
    on_gpu = torch.cuda.is_available()
    device = "cuda:0" if on_gpu else "cpu"
    batches = GPU_BATCHES if on_gpu else CPU_BATCHES
    model = random_source("densenet121").module
    preprocessing = Preprocessing()
    card = ModelCard("densenet121", 1000, trained=False, weights_file="", weights_sha256="",
                     inputs_sha256="")  # fmt: skip
    with TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "model.pth")
        cores = Cores(torch.get_num_threads(), 1, Path(folder) / "busy")
        engine = load_engine(Path(folder) / "model.pth", card, cores, gpu=0 if on_gpu else None)
    eager = Normalized(model, preprocessing).eval().to(device)
    views = sample_views(preprocessing, max(batches))

    def run_eager(images: NDArray[np.uint8]) -> Any:
        with torch.inference_mode():
            return eager(torch.from_numpy(images).to(device)).cpu().numpy()

    step(f"{engine.name}")
    expected, mine = run_eager(views), engine.run(views).logits
    same = float((expected.argmax(1) == mine.argmax(1)).mean())
    probability = float(np.abs(softmax(expected) - softmax(mine)).max())
    jpeg = CAT.read_bytes()

    def decoded(_: int) -> NDArray[np.uint8]:
        return decode(jpeg, preprocessing, PixelBudget(10**9)).pixels

    def from_bytes(batch: int) -> Any:
        pixels = np.stack(list(pool.map(decoded, range(batch))))
        return softmax(engine.run(pixels).logits)

    rows = []
    with ThreadPoolExecutor(cores.share) as pool:
        for batch in batches:
            part = views[:batch]
            ways = (partial(engine.run, part), partial(run_eager, part), partial(from_bytes, batch))
            rows.append([batch, *(images_per_second(way, batch, seconds) for way in ways)])
            step(str(rows[-1]))
    headings = ("batch", "engine images/s", "eager float32 images/s", "files to probabilities")
    write_section(
        *("gpu" if on_gpu else "cpu-torch", "The PyTorch engine", engine.name),
        f"Over {len(views)} images compared with eager PyTorch in float32: same top-1 {same:.1%}, "
        f"largest difference of a probability {probability:.1e}. Repeat: `make bench-gpu`.",
        table(headings, rows),
    )
