"""Trains a multi-label ResNet-18 for six shapes, and writes the files to serve it.

The folder gets `weights.pth`, `classes.txt`, `shapes.yaml`, and in `validation` and `test` held-out
images with their `labels.csv`. Thresholds are chosen on `validation` and measured on `test`.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.models import resnet18

from examples.shapes.pictures import NAMES, SIDE, Drawn, draw, write
from scripts.terminal import command, console, step

FOLDER = Path("build/shapes")
ARCHITECTURE = "resnet18"
PICTURES = 2400
EPOCHS = 5
SEED = 7

MEAN = STD = 0.5

# What the server must do to a picture too: see docs/models/your-model.md.
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
# Pictures, and the seeds that they are drawn from.
_TRAIN_SEED = 1
_HELD_OUT = {"validation": (300, 2), "test": (400, 3)}


def train(epochs: int = EPOCHS, pictures: int = PICTURES) -> nn.Module:
    """Train from random weights; fixed seeds make them and the images the same each time."""
    began = time.monotonic()
    drawn = draw(pictures, _TRAIN_SEED)
    torch.manual_seed(SEED)
    model: nn.Module = resnet18(num_classes=len(NAMES))
    seen = TensorDataset(_inputs(drawn), torch.from_numpy(drawn.labels).float())
    batches = DataLoader(seen, _BATCH, shuffle=True, drop_last=True)
    # One pass over the weights for each step: of batches as small as these it saves a sixth.
    optimizer = torch.optim.Adam(model.parameters(), _LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=epochs * len(batches)
    )
    for epoch in range(1, epochs + 1):
        losses = []
        for inputs, labels in track(batches, f"Epoch {epoch} of {epochs}", console=console):
            optimizer.zero_grad()
            # Each class for itself: there or not.
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
    return torch.stack([TRANSFORM(picture) for picture in drawn.pictures])


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


def save(model: nn.Module, folder: Path = FOLDER) -> dict[str, list[Path]]:
    """Write weights, classes, the model file and held-out images; return these by part."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "shapes.yaml").write_text(MODEL_FILE)
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return {part: write(held_out(part), folder / part) for part in _HELD_OUT}


def main(
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    pictures: Annotated[int, typer.Option(min=_BATCH, help="To train on.")] = PICTURES,
    folder: Annotated[Path, typer.Option(help="Where to put the result.")] = FOLDER,
) -> None:
    """Train, and report the mean average precision on held-out images."""
    model = train(epochs, pictures)
    test = held_out("test")
    found = mean_average_precision(test.labels, probabilities(model, test))
    save(model, folder)
    step(f"Training: mean average precision {found:.4f} of held-out pictures, see {folder}")


if __name__ == "__main__":
    command(main)
