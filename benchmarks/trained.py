"""A DenseNet-121 trained on real photographs, to measure on what lower precision costs.

ImageNet's weights cannot be had everywhere, and random ones answer with near ties. Here a class is
a photograph of scikit-image's or scikit-learn's, cut into cells: pictures are crops of the cells,
of many scales and turns, and those of a third of the cells are held out. The folder gets
`weights.pth`, `classes.txt`, and a folder a class in `train`, to calibrate on, and in `test`.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import skimage
import sklearn
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import nn
from torchvision.models import densenet121

import examples.digits.train as train_digits
from handler.images import PixelBudget, decode
from handler.settings import Preprocessing
from scripts.build.weights import untrained
from scripts.terminal import UserError, command, console, step

FOLDER, RANDOM = Path("build/trained"), Path("build/random")
LEAST_ACCURACY = 0.95
SEED = 3

# Those whose parts show what the whole is, as no background of a portrait does.
_PHOTOGRAPHS = {
    Path(skimage.__file__).parent / "data": (
        *("brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
        *("hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg"),
    ),
    Path(sklearn.__file__).parent / "datasets/images": ("china.jpg", "flower.jpg"),
}

# Cells a side; each third one of a row is held out.
_CELLS = 8
# Of a cell's side, and degrees; what is turned loses its corners.
_SCALES = (0.75, 1.0)
_MOST_TURNED = 15
_LEFT_BY_TURN = 0.8
# A crop with less contrast, such as of a clear sky, shows no class.
_LEAST_CONTRAST = 12
_SIDE = 255

_TRAIN, _TEST = 240, 60  # pictures a class
_BATCH = 32
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.05
# Sides to train at, and how often with all pictures: small ones take a part of the time.
_STAGES = ((64, 4), (112, 4), (224, 1))


def photographs() -> dict[str, Image.Image]:
    """A class's name to its photograph."""
    return {
        Path(name).stem: Image.open(folder / name).convert("RGB")
        for folder, names in _PHOTOGRAPHS.items()
        for name in names
    }


def crops(
    photograph: Image.Image, random: np.random.Generator, *, held_out: bool
) -> Iterator[Image.Image]:
    """Endless crops, 255 x 255, all of the cells that are held out or all of the others."""
    width, height = photograph.width // _CELLS, photograph.height // _CELLS
    cells = [
        (column, row)
        for row in range(_CELLS)
        for column in range(_CELLS)
        if ((column + row) % 3 == 0) == held_out
    ]
    while True:
        column, row = cells[random.integers(len(cells))]
        side = int(min(width, height) * random.uniform(*_SCALES))
        left = column * width + int(random.integers(0, width - side + 1))
        top = row * height + int(random.integers(0, height - side + 1))
        crop = photograph.crop((left, top, left + side, top + side))
        if random.random() < 0.5:  # noqa: PLR2004  # half of them
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle = random.uniform(-_MOST_TURNED, _MOST_TURNED)
        turned = crop.rotate(angle, Image.Resampling.BICUBIC)
        edge = side * (1 - _LEFT_BY_TURN) / 2
        result = turned.resize(
            (_SIDE, _SIDE), Image.Resampling.BILINEAR, (edge, edge, side - edge, side - edge)
        )
        if np.asarray(result).std() >= _LEAST_CONTRAST:
            yield result


def write_pictures(folder: Path) -> None:
    """Writes `classes.txt`, and PNG files in a folder a class in `train` and `test`."""
    names = sorted(photographs())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    for number, name in enumerate(names):
        photograph = photographs()[name]
        for part, count in (("train", _TRAIN), ("test", _TEST)):
            made = crops(photograph, np.random.default_rng([SEED, number]), held_out=part == "test")
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                next(made).save(folder / part / name / f"{index:03}.png", compress_level=1)


def pixels(
    folder: Path, preprocessing: Preprocessing | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A folder's pictures as a server decodes them, uint8 (N, 3, crop, crop), and classes (N,).

    The classes are in the order of `classes.txt` beside the folder, as the model's are.
    """
    paths = sorted(folder.glob("*/*.png"))
    names = (folder.parent / "classes.txt").read_text().split()
    how = preprocessing or Preprocessing()
    found = [decode(path.read_bytes(), how, PixelBudget(10**8)) for path in paths]
    return np.stack(found), np.array([names.index(path.parent.name) for path in paths])


def train(folder: Path) -> nn.Module:
    """Trains from random weights, the same ones every time; bfloat16 where the processor has it."""
    torch.manual_seed(SEED)
    images, classes = (torch.from_numpy(part) for part in pixels(folder / "train"))
    model: nn.Module = densenet121(num_classes=int(classes.max()) + 1).to(
        memory_format=torch.channels_last
    )
    batches = len(images) // _BATCH
    optimizer = torch.optim.AdamW(
        model.parameters(), _LEARNING_RATE / 3, weight_decay=_WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=batches * sum(times for _, times in _STAGES)
    )
    for side, times in _STAGES:
        for epoch in range(1, times + 1):
            order = torch.randperm(len(images))[: batches * _BATCH].reshape(batches, _BATCH)
            losses = []
            for chosen in track(order, f"{side} pixels, epoch {epoch}", console=console):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(_turned(_normalized(images[chosen], side)))
                loss = nn.functional.cross_entropy(logits.float(), classes[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            step(f"Training: {side} pixels, epoch {epoch} of {times}, loss {np.mean(losses):.3f}")
    return model.eval()


def _normalized(images: torch.Tensor, side: int) -> torch.Tensor:
    preprocessing = Preprocessing()
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    result = (images.float() / 255 - mean) / std
    if side != preprocessing.crop:
        result = nn.functional.interpolate(result, (side, side), mode="bilinear", antialias=True)
    return result.contiguous(memory_format=torch.channels_last)


def _turned(inputs: torch.Tensor) -> torch.Tensor:
    """A batch, mirrored and on its head as it happens."""
    dimensions = [dimension for dimension in (2, 3) if torch.rand(()) < 0.5]  # noqa: PLR2004
    return inputs.flip(dimensions)


@torch.inference_mode()
def accuracy(model: nn.Module, folder: Path) -> float:
    """Share of the held-out pictures that float32 gets right."""
    images, classes = (torch.from_numpy(part) for part in pixels(folder / "test"))
    side = Preprocessing().crop
    parts = torch.tensor_split(images, math.ceil(len(images) / _BATCH))
    guesses = [model(_normalized(part, side)).argmax(dim=1) for part in parts]
    return float((torch.cat(guesses) == classes).float().mean())


def photographs_model(folder: Path = FOLDER) -> Path:
    """The folder with all that there is to pack and to measure; made where it is not there yet."""
    weights = folder / "weights.pth"
    if weights.exists():
        return folder
    write_pictures(folder)
    model = train(folder)
    unchecked = weights.with_suffix(".unchecked")
    torch.save(model.state_dict(), unchecked)
    right = accuracy(model, folder)
    step(f"Training: {right:.2%} of the held-out pictures right")
    if right < LEAST_ACCURACY:
        raise UserError(f"Only {right:.2%} of the held-out pictures are right, see {unchecked}.")
    unchecked.rename(weights)
    return folder


def random_model(folder: Path = RANDOM) -> Path:
    """The same with random weights: good for measuring speed, and for nothing else."""
    weights = folder / "weights.pth"
    if not weights.exists():
        write_pictures(folder)
        torch.save(untrained(classes=len(photographs())).state_dict, weights)
    return folder


def digits(folder: Path = Path("build/trained-digits")) -> tuple[Path, Preprocessing]:
    """The same for scikit-learn's digits, trained as `make digits` does."""
    if not (folder / "weights.pth").exists():
        seen, held_out = train_digits.load()
        for index, (picture, digit) in enumerate(zip(seen.pictures, seen.digits, strict=True)):
            file = folder / "train" / train_digits.NAMES[digit] / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        train_digits.save(train_digits.train(seen), held_out, folder)
    side, mean, std = train_digits.SIDE, train_digits.MEAN, train_digits.STD
    return folder, Preprocessing(side, side, (mean,) * 3, (std,) * 3)


def main(
    folder: Annotated[Path, typer.Option(help="Where to put the result.")] = FOLDER,
) -> None:
    """Trains the model of photographs, unless it is there."""
    step(f"Trained model: in {photographs_model(folder)}")


if __name__ == "__main__":
    command(main)
