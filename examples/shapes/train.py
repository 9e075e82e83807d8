"""Trains a multi-label ResNet-18 for six shapes, and writes the files to serve it.

The folder gets `weights.pth`, `classes.txt`, `shapes.yaml`, and in `validation` and `test` held-out
images with their `labels.csv`. Thresholds are chosen on `validation` and measured on `test`.
"""

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.models import resnet18

from examples.shapes.drawing import NAMES, SIDE, Drawn, draw, write
from scripts.terminal import console, step

FOLDER = Path("build/shapes")
ARCHITECTURE = "resnet18"
IMAGES = 2400
EPOCHS = 5
SEED = 7

MEAN = STD = 0.5

# The server must preprocess images in the same way: see docs/models/your-model.md.
TRANSFORM = transforms.Compose(
    [
        transforms.Resize(SIDE),
        transforms.CenterCrop(SIDE),
        transforms.ToTensor(),
        transforms.Normalize([MEAN] * 3, [STD] * 3),
    ]
)

_BATCH = 16
_LEARNING_RATE = 2e-3
# Numbers of images, and seeds.
_TRAIN_SEED = 1
_HELD_OUT = {"validation": (300, 2), "test": (400, 3)}


def train(epochs: int = EPOCHS, images: int = IMAGES) -> nn.Module:
    """Train from random weights, with fixed seeds of weights and images."""
    began = time.monotonic()
    drawn = draw(images, _TRAIN_SEED)
    torch.manual_seed(SEED)
    model: nn.Module = resnet18(num_classes=len(NAMES))
    seen = TensorDataset(_inputs(drawn), torch.from_numpy(drawn.labels).float())
    batches = DataLoader(seen, _BATCH, shuffle=True, drop_last=True)
    # Fused: one pass over the weights per step, a sixth faster for batches this small.
    optimizer = torch.optim.Adam(model.parameters(), _LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=epochs * len(batches)
    )
    for epoch in range(1, epochs + 1):
        losses = []
        for inputs, labels in track(batches, f"Epoch {epoch} of {epochs}", console=console):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        step(f"Training: epoch {epoch}, loss {np.mean(losses):.3f}")
    step(f"Training: {time.monotonic() - began:.0f} s")
    return model.eval()


def _inputs(drawn: Drawn) -> Tensor:
    """Return the model's input, float32 (N, 3, SIDE, SIDE)."""
    return torch.stack([TRANSFORM(image) for image in drawn.images])


def held_out(part: str) -> Drawn:
    """Return the images of the part "validation" or "test"."""
    return draw(*_HELD_OUT[part])


@torch.inference_mode()
def probabilities(model: nn.Module, drawn: Drawn) -> NDArray[np.float32]:
    """Return probabilities, float32 (N, classes), computed with PyTorch alone."""
    parts = [model(inputs).sigmoid() for inputs in _inputs(drawn).split(_BATCH)]  # type: ignore[no-untyped-call]
    result: NDArray[np.float32] = torch.cat(parts).numpy()
    return result


def mean_average_precision(labels: NDArray[np.bool_], found: NDArray[np.float32]) -> float:
    """Return the mean of the average precision over the classes, 0 to 1."""
    return float(average_precision_score(labels, found))


MODEL_FILE = f"""\
name: shapes
arch: {ARCHITECTURE}
weights: weights.pth
classes: classes.txt
preprocessing: {{resize: {SIDE}, crop: {SIDE}, mean: {MEAN}, std: {STD}}}
activation: sigmoid
"""


def save(model: nn.Module, folder: Path = FOLDER) -> None:
    """Write weights, classes, the model file and held-out images."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "shapes.yaml").write_text(MODEL_FILE)
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    for part in _HELD_OUT:
        write(held_out(part), folder / part)
