"""`make fuzz`: thousands of corrupted images.

The image stage may raise only `ClientError`, must keep its time limit, and must not leak memory. A
real server must return no 5xx and keep its workers.
"""

import gc
import random
from collections import Counter
from typing import Annotated

import psutil
import requests
import typer
from rich.progress import track

from benchmarks.timing import cpu_seconds
from handler.decoding.budget import PixelBudget
from handler.decoding.decode import decode
from handler.errors import ClientError
from handler.settings import Preprocessing
from scripts.serve.running import ServerState
from scripts.terminal import UserError, command, console
from tests import corpus
from tests.served import post, served_densenet, worker_pids

MAX_PIXELS = 64_000_000
# CPU seconds; decoding may take 1.3, and measuring is inexact on a busy machine.
MAX_SECONDS = 10.0
# Of the process's memory after the first tenth of the images.
MAX_GROWTH = 0.05

# Bad lengths, sizes and offsets.
_BAD_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def corrupted(images: list[bytes], chance: random.Random) -> bytes:
    """Return an image with a few faults, such as a part of another image."""
    data = bytearray(chance.choice(images))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        position, length = chance.randrange(len(data)), chance.randrange(1, 200)
        other = chance.choice(images)
        size, order = chance.choice((1, 2, 4)), chance.choice(("big", "little"))
        number = chance.choice(_BAD_NUMBERS) & (256**size - 1)
        start, end, wrong = chance.choice(
            (
                (position, position + 1, bytes([data[position] ^ 1 << chance.randrange(8)])),
                (position, position + 1, chance.randbytes(1)),
                (position, position + size, number.to_bytes(size, order)),
                (position, position + length, b""),
                (position, position, data[position : position + length]),
                (position, len(data), other[chance.randrange(len(other)) :]),
            )
        )
        data[start:end] = wrong
        if not data:
            return b"\0"
    return bytes(data)


def fuzz_images(count: int, seed: int) -> Counter[str]:
    """Decode corrupted images; return the number of each outcome, `decoded` or an error's type.

    Raises:
        AssertionError: another error than `ClientError`, too much time, or memory grew.
    """
    images, chance = _seeds(), random.Random(seed)
    outcomes: Counter[str] = Counter()
    settled = 0
    for number in track(range(count), "Image stage ...", console=console, transient=True):
        data = corrupted(images, chance)
        started = cpu_seconds()
        try:
            decode(data, Preprocessing(), PixelBudget(MAX_PIXELS))
            outcomes["decoded"] += 1
        except ClientError as error:
            outcomes[error.type] += 1
        except Exception as error:
            raise AssertionError(f"image {number} of seed {seed}") from error
        seconds = cpu_seconds() - started
        assert seconds < MAX_SECONDS, f"image {number} of seed {seed} took {seconds:.1f} s"
        if number == count // 10:
            settled = _memory()
    growth = _memory() / settled - 1
    console.print(f"image stage: {count} corrupted images, memory {growth:+.1%}")
    assert growth < MAX_GROWTH, f"memory grew by {growth:.1%}"
    return outcomes


def _seeds() -> list[bytes]:
    return [image.data for image in corpus.valid() if len(image.data) < 200_000]


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def fuzz_server(running: ServerState, count: int, seed: int) -> Counter[str]:
    """Send corrupted images to a server, as bodies and as forms in turn.

    Raises:
        AssertionError: a response was a 5xx, or a worker was replaced.
    """
    images, chance = _seeds(), random.Random(seed)
    workers = worker_pids(running)
    outcomes: Counter[str] = Counter()
    for number in track(range(count), "Real server ...", console=console, transient=True):
        data = corrupted(images, chance)
        if number % 2:
            answer = requests.post(running.predictions_url, files={"file": data}, timeout=60)
        else:
            answer = post(running, data)
        outcomes[str(answer.status_code)] += 1
        assert answer.status_code < 500, f"image {number} of seed {seed}: {answer.text}"
    assert worker_pids(running) == workers, "a worker was replaced"
    console.print(f"real server: {count} corrupted images, the same workers serve: {workers}")
    return outcomes


def main(
    images: Annotated[int, typer.Option(help="Images through the image stage.")] = 20_000,
    to_server: Annotated[
        int, typer.Option("--served", help="Images through a real server.")
    ] = 1_000,
    seed: Annotated[int, typer.Option(help="Which images.")] = 1,
) -> None:
    """Send corrupted images to the image stage and to a real server."""
    try:
        console.print(dict(fuzz_images(images, seed)))
        with served_densenet() as running:
            console.print(dict(fuzz_server(running, to_server, seed)))
    except AssertionError as failure:
        raise UserError(str(failure)) from failure


if __name__ == "__main__":
    command(main)
