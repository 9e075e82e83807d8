"""Corrupted pictures, by the thousand: `make fuzz`.

First through the image stage in this process: no exception but our own, no picture over two
seconds, no memory kept. Then the same in search of costly pictures: the slowest are kept and
corrupted further. Last through a real server: no 5xx, and the same workers before and after.
"""

import gc
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import requests
import typer
from rich.progress import Progress, track

from benchmarks.served import served, worker_pids
from benchmarks.timing import cpu_seconds
from handler.errors import ClientError
from handler.images import PixelBudget, decode
from handler.settings import Preprocessing, Settings
from scripts.serve.running import Running
from scripts.terminal import UserError, command, console
from tests import corpus, costs

MAX_PIXELS = 64_000_000
MAX_SECONDS = 2.0
# Of the search for costly pictures: how many of the slowest are corrupted further, and how large
# those may be that it begins with.
_KEPT = 16
_LARGEST_SEED = 200_000
# Of the whole process, after the first tenth of the pictures.
MAX_GROWTH = 0.05

# Numbers that lengths, sizes and offsets do badly with.
_BAD_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def corrupted(
    pictures: list[bytes], chance: random.Random, others: list[bytes] | None = None
) -> bytes:
    """One picture with a few things wrong with it, such as a part of one of the others."""
    data = bytearray(chance.choice(pictures))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        position = chance.randrange(len(data))
        match chance.randrange(6):
            case 0:
                data[position] ^= 1 << chance.randrange(8)
            case 1:
                data[position] = chance.randrange(256)
            case 2:
                number = chance.choice(_BAD_NUMBERS)
                length = chance.choice((1, 2, 4))
                order = chance.choice(("big", "little"))
                field = (number & (256**length - 1)).to_bytes(length, order)
                data[position : position + length] = field
            case 3:
                del data[position : position + chance.randrange(1, 200)]
            case 4:
                data[position:position] = data[position : position + chance.randrange(1, 200)]
            case 5:
                other = chance.choice(others or pictures)
                data[position:] = other[chance.randrange(len(other)) :]
        if not data:
            return b"\0"
    return bytes(data)


def fuzz_images(count: int, seed: int) -> Counter[str]:
    """Puts `count` corrupted pictures through the image stage.

    Returns:
        how often each outcome was seen.

    Raises:
        AssertionError: a picture raised another exception than a `ClientError`, or took too long,
            or memory grew.
    """
    pictures = [picture.data for picture in corpus.valid() if len(picture.data) < 200_000]
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    settled = 0
    for number in track(range(count), "Image stage ...", console=console, transient=True):
        data = corrupted(pictures, chance)
        started = cpu_seconds()
        try:
            decode(data, Preprocessing(), PixelBudget(MAX_PIXELS))
            outcomes["decoded"] += 1
        except ClientError as refusal:
            outcomes[refusal.type] += 1
        except Exception as error:
            error.add_note(f"picture {number} of seed {seed}") if hasattr(
                error, "add_note"
            ) else None
            raise
        seconds = cpu_seconds() - started
        assert seconds < MAX_SECONDS, f"picture {number} of seed {seed} took {seconds:.1f} s"
        if number == count // 10:
            settled = _memory()
    growth = _memory() / settled - 1
    console.print(f"image stage: {count} corrupted pictures, memory {growth:+.1%}")
    assert growth < MAX_GROWTH, f"memory grew by {growth:.1%}"
    return outcomes


@dataclass(frozen=True, order=True)
class Found:
    """A picture and what deciding about it cost: seconds of CPU, in all and in this process."""

    seconds: float
    own_seconds: float
    data: bytes


def search_costs(seconds: float, seed: int) -> list[Found]:
    """Looks for costly pictures: what is slowest is kept, and corrupted further.

    Args:
        seconds: of CPU to search for.
        seed: which pictures.

    Returns:
        the slowest that were found, the slowest first, and last the one that was slowest in this
        process, where no limit of the kernel holds.

    Raises:
        AssertionError: a picture took too long.
    """
    chance = random.Random(seed)
    seeds = [picture.data for picture in corpus.valid()]
    seeds += [make() for name, make in costs.kinds() if "megapixels" in name]
    seeds = [data for data in seeds if len(data) < _LARGEST_SEED]
    slowest = sorted(map(_found, seeds), reverse=True)
    in_here = max(slowest, key=lambda found: found.own_seconds)
    tried, started = len(slowest), cpu_seconds()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Search for costly pictures ...", total=seconds)
        while (spent := cpu_seconds() - started) < seconds:
            progress.update(task, completed=spent)
            # Those near the limit of time cannot become much slower.
            kept = [one.data for one in slowest if one.seconds < Settings.max_seconds / 2]
            kept = [*kept[:_KEPT], in_here.data]
            found = _found(corrupted(kept, chance, others=seeds))
            assert found.seconds < MAX_SECONDS, f"{found.seconds:.1f} s; {_keep(found, 'too-slow')}"
            slowest = sorted([found, *slowest], reverse=True)[: 4 * _KEPT]
            in_here = max(found, in_here, key=lambda one: one.own_seconds)
            tried += 1
    console.print(f"search for costly pictures: {tried} tried in {seconds:.0f} s of CPU")
    for found, where in ((slowest[0], "in all"), (in_here, "in the worker itself")):
        console.print(
            f"  slowest {where}: {found.seconds:.2f} s of CPU, {found.own_seconds:.2f} s in the "
            f"worker itself, {len(found.data)} bytes in {_keep(found, where.replace(' ', '-'))}"
        )
    return [*slowest, in_here]


def _found(data: bytes) -> Found:
    before, own = cpu_seconds(), time.process_time()
    with suppress(ClientError):
        decode(data, Preprocessing(), PixelBudget(MAX_PIXELS))
    return Found(cpu_seconds() - before, time.process_time() - own, data)


def _keep(found: Found, name: str) -> Path:
    folder = Path("build") / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"slowest-{name}"
    path.write_bytes(found.data)
    return path


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def fuzz_server(running: Running, count: int, seed: int) -> Counter[str]:
    """Sends `count` corrupted pictures to a server, as bodies and as forms in turn.

    Raises:
        AssertionError: an answer was a 5xx, or another process serves afterwards.
    """
    pictures = [picture.data for picture in corpus.valid() if len(picture.data) < 200_000]
    chance = random.Random(seed)
    workers = worker_pids(running)
    outcomes: Counter[str] = Counter()
    session = requests.Session()
    for number in track(range(count), "Real server ...", console=console, transient=True):
        data = corrupted(pictures, chance)
        if number % 2:
            answer = session.post(running.predictions_url, files={"file": data}, timeout=60)
        else:
            headers = {"Content-Type": "application/octet-stream"}
            answer = session.post(running.predictions_url, data=data, headers=headers, timeout=60)
        outcomes[str(answer.status_code)] += 1
        assert answer.status_code < 500, f"picture {number} of seed {seed}: {answer.text}"
    assert worker_pids(running) == workers, "a worker was replaced"
    console.print(f"real server: {count} corrupted pictures, the same workers serve: {workers}")
    return outcomes


def main(
    images: Annotated[int, typer.Option(help="Pictures through the image stage.")] = 20_000,
    search: Annotated[float, typer.Option(help="Seconds of CPU to search for costly ones.")] = 120,
    to_server: Annotated[
        int, typer.Option("--served", help="Pictures through a real server.")
    ] = 1_000,
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 1,
) -> None:
    """Fuzzes the image stage and a real server with corrupted pictures."""
    try:
        console.print(dict(fuzz_images(images, seed)))
        search_costs(search, seed)
        with served() as running:
            console.print(dict(fuzz_server(running, to_server, seed)))
    except AssertionError as failure:
        raise UserError(str(failure)) from failure


if __name__ == "__main__":
    command(main)
