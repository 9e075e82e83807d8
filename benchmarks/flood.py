"""A flood of the largest uploads, and a long run of ordinary ones: `make flood`, `make soak`."""

import random
import resource
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import requests
import typer
from PIL import Image

from benchmarks.machine import write_report
from scripts.serve.running import Running
from scripts.terminal import UserError, console, run, step
from tests.pictures import encode, photographs
from tests.stress.servers import frontend_memory, post, served, worker_memory

FLOOD_CLIENTS = 200
FLOOD_BYTES = 19_000_000
# The frontend's heap limit in config.properties, as much again outside it for buffers on their way
# in, and what the Java runtime needs itself.
MAX_FRONTEND_BYTES = 5_000_000_000

SOAK_SETTLED = 500
MAX_SOAK_GROWTH = 0.05


def flood(running: Running, clients: int, size: int) -> Counter[str]:
    """Uploads a picture of `size` bytes from so many clients at once.

    Returns:
        how often each status was seen.

    Raises:
        AssertionError: a status other than 200 and 503, or the frontend took too much memory or
            ended.
    """
    picture = encode(Image.effect_noise((2000, 1500), 80), "JPEG")
    data = picture + bytes(size - len(picture))  # decoders ignore what follows a picture
    with ThreadPoolExecutor(clients) as pool:
        statuses = Counter(pool.map(lambda _: _status(running, data), range(clients)))
    memory = frontend_memory(running, collected=False)
    write_report(
        "flood",
        "A flood",
        [
            f"{clients} uploads of {size / 1e6:.0f} MB at once. Made by `make flood`.",
            "",
            "| answer | uploads |",
            "|---|---|",
            *(f"| {status} | {count} |" for status, count in sorted(statuses.items())),
            "",
            f"The frontend held {memory / 1e6:.0f} MB right after.",
        ],
    )
    assert set(statuses) <= {"200", "503"}, f"other answers than 200 and 503: {dict(statuses)}"
    assert statuses["200"] > 0
    assert memory < MAX_FRONTEND_BYTES, f"the frontend holds {memory / 1e9:.1f} GB"
    assert post(running, picture).status_code == 200
    return statuses


def _status(running: Running, data: bytes) -> str:
    try:
        return str(post(running, data, timeout=300).status_code)
    except requests.RequestException as error:
        return type(error).__name__


def soak(running: Running, requests_count: int, seed: int) -> float:
    """Sends requests of mixed sizes from eight clients.

    Returns:
        the growth of a worker's memory after the first 500, as a fraction.

    Raises:
        AssertionError: a request failed, or memory grew.
    """
    pictures = [encode(image, "PNG", compress_level=1) for _, image in photographs()]
    pictures += [encode(Image.effect_noise((w, w * 3 // 4), 50), "JPEG") for w in (2000, 4000)]
    chance = random.Random(seed)
    order = [chance.choice(pictures) for _ in range(requests_count)]
    with ThreadPoolExecutor(8) as pool:
        settled = Counter(pool.map(lambda data: _status(running, data), order[:SOAK_SETTLED]))
        before = worker_memory(running)
        rest = Counter(pool.map(lambda data: _status(running, data), order[SOAK_SETTLED:]))
    growth = worker_memory(running) / before - 1
    console.print(
        f"soak: {requests_count} requests of {len(pictures)} pictures, a worker's memory "
        f"{before / 1e6:.0f} MB after {SOAK_SETTLED}, {growth:+.1%} at the end"
    )
    assert set(settled + rest) == {"200"}, f"failed: {dict(settled + rest)}"
    assert growth < MAX_SOAK_GROWTH, f"memory grew by {growth:.1%}"
    return growth


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("flood")
def flood_command(clients: Annotated[int, typer.Option(min=1)] = FLOOD_CLIENTS) -> None:
    """Many uploads of 19 MB at once."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    _checked(lambda running: flood(running, clients, FLOOD_BYTES))


@app.command("soak")
def soak_command(
    requests_count: Annotated[int, typer.Option("--requests", min=SOAK_SETTLED + 1)] = 5_000,
) -> None:
    """Thousands of ordinary requests of mixed sizes."""
    _checked(lambda running: soak(running, requests_count, seed=1))


def _checked(load: Callable[[Running], object]) -> None:
    try:
        with served() as running:
            load(running)
    except AssertionError as failure:
        raise UserError(str(failure)) from failure
    step("The server held")


if __name__ == "__main__":
    run(app)
