"""Trains a DenseNet-121 on scikit-learn's handwritten digits, and writes the files to serve it.

The folder gets `weights.pth`, `classes.txt`, `digits.yaml`, and in `test` the held-out images as
PNG files, in a folder per class. Nothing is downloaded: scikit-learn has the digits (Alpaydin and
Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.models import densenet121

from scripts.terminal import command, console, step

FOLDER = Path("build/digits")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EPOCHS = 6
SEED = 7

SIDE = 32
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

_BATCH = 32
_LEARNING_RATE = 1e-3
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Grayscale images of digits, 8 x 8, and their labels, 0 to 9."""

    images: list[Image.Image]
    digits: list[int]

    def tensors(self) -> TensorDataset:
        """Return the model's input, float32 (N, 3, SIDE, SIDE), and the labels, int64 (N,)."""
        inputs = torch.stack([TRANSFORM(image.convert("RGB")) for image in self.images])
        return TensorDataset(inputs, torch.tensor(self.digits))


def load() -> tuple[Split, Split]:
    """Return the training split, and the test split of a fifth of all digits."""
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    seen, held_out = train_test_split(
        np.arange(len(pixels)), test_size=_TEST_SHARE, random_state=SEED, stratify=digits.target
    )
    return _split(pixels, digits.target, seen), _split(pixels, digits.target, held_out)


def _split(pixels: np.ndarray, target: np.ndarray, chosen: np.ndarray) -> Split:
    return Split([Image.fromarray(pixels[i]) for i in chosen], [int(target[i]) for i in chosen])


def train(data: Split, epochs: int = EPOCHS) -> nn.Module:
    """Train from random weights, with a fixed seed."""
    torch.manual_seed(SEED)
    model: nn.Module = densenet121(num_classes=len(NAMES))
    batches = DataLoader(data.tensors(), _BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3 * _LEARNING_RATE, total_steps=epochs * len(batches)
    )
    for epoch in range(1, epochs + 1):
        losses = []
        for inputs, digits in track(batches, f"Epoch {epoch} of {epochs}", console=console):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), digits)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        step(f"Training: epoch {epoch}, loss {np.mean(losses):.3f}")
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, data: Split) -> list[int]:
    """Return the top-1 prediction for each image, computed with PyTorch alone."""
    batches = DataLoader(data.tensors(), _BATCH)
    return [int(row.argmax()) for inputs, _ in batches for row in model(inputs)]


MODEL_FILE = f"""\
name: digits
arch: densenet121
weights: weights.pth
classes: classes.txt
preprocessing: {{resize: {SIDE}, crop: {SIDE}, mean: {MEAN}, std: {STD}}}
"""


def save(model: nn.Module, held_out: Split, folder: Path = FOLDER) -> list[Path]:
    """Write weights, classes, the model file and held-out images; return these, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "digits.yaml").write_text(MODEL_FILE)
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    files = []
    for number, (image, digit) in enumerate(zip(held_out.images, held_out.digits, strict=True)):
        files.append(folder / "test" / NAMES[digit] / f"{number:03}.png")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        image.save(files[-1])
    return files


def main(
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    folder: Annotated[Path, typer.Option(help="For the files.")] = FOLDER,
) -> None:
    """Train, and report the accuracy on held-out digits."""
    seen, held_out = load()
    model = train(seen, epochs)
    right = np.mean(np.array(predict(model, held_out)) == held_out.digits)
    save(model, held_out, folder)
    step(f"Training: {right:.2%} of {len(held_out.digits)} held-out digits right, see {folder}")


if __name__ == "__main__":
    command(main)
