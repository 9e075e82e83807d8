"""`make replicas`: two minutes of eight clients for each thing that can happen to a container.

Two pods of the Deployment, run by podman, behind the gateway's container: one is killed, stopped,
replaced by another image, cut off from the network, both are replaced; again and again, for as long
as the clients ask. No client may see anything but 200. Prints a table.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

from benchmarks.cluster import Tally, clients
from benchmarks.machine import write_report
from benchmarks.pods import FAULTS, Pods, replicas
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.container.base import debian_base
from scripts.container.engine import Engine, require_engine, runnable
from scripts.container.image import Recipe, build_image
from scripts.terminal import UserError, command, step

CLIENTS = 8
SECONDS = 120.0
GATEWAY = Recipe(Path("deploy/gateway/Dockerfile"))
_PAUSE = 2.0


@dataclass(frozen=True)
class Images:
    """Names and tags.

    Attributes:
        first: of TorchServe.
        second: another one with the same archive, in whose place the first one comes.
        gateway: of the gateway.
    """

    first: str
    second: str
    gateway: str


def build_images(engine: Engine, archive: Path, base: str, folder: Path) -> Images:
    """Builds what is run: TorchServe's image twice, the gateway's once."""
    images = Images(*(f"localhost/densenet-replicas-{part}:1" for part in ("a", "b", "gateway")))
    build_image(engine, [archive], images.first, base)
    another(engine, images.first, images.second, folder)
    build_image(engine, [], images.gateway, base, GATEWAY)
    return images


def another(engine: Engine, image: str, name: str, folder: Path) -> None:
    """Makes another image of the same content, as a new release would be."""
    (folder / "Dockerfile").write_text(f"FROM {image}\nLABEL release=second\n")
    engine.run("build", "--format", "docker", "-t", name, str(folder))


def run(
    pods: Pods, happen: Callable[[Pods, str], None], images: tuple[str, str], seconds: float
) -> tuple[Tally, int]:
    """Lets it happen over and over while clients ask; returns what they saw, and how often.

    Args:
        pods: behind a gateway.
        happen: given the image that runs next.
        images: two, which take turns.
        seconds: for so long, and until the last time is over.
    """
    times = 0
    deadline = time.monotonic() + seconds
    with clients(pods, CLIENTS) as tally:
        while time.monotonic() < deadline:
            time.sleep(_PAUSE)
            happen(pods, images[(times + 1) % 2])
            times += 1
    return tally, times


@contextmanager
def _engine() -> Iterator[tuple[Engine, str]]:
    engine = require_engine()
    if engine.program != "podman":
        raise UserError("The pods of a Deployment are run by podman (kube play). Install it.")
    base = debian_base(engine)
    with TemporaryDirectory() as folder:
        yield runnable(engine, base, Path(folder)), base


def main(
    seconds: Annotated[float, typer.Option(help="For each kind of fault.")] = SECONDS,
    only: Annotated[str | None, typer.Option(help="One kind of fault, by a part of it.")] = None,
) -> None:
    """Lets containers end and be replaced under load, and counts what clients see."""
    rows, failed = [], 0
    happenings = {"nothing": lambda *_: None, **FAULTS}
    with _engine() as (engine, base), TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = build_images(engine, build(recipe(untrained()), folder / "archive"), base, folder)
        step(json.dumps(asdict(images)))
        with replicas(engine, images.first, images.gateway, folder / "manifests") as pods:
            for name, happen in happenings.items():
                if only is not None and only not in name:
                    continue
                tally, times = run(pods, happen, (images.first, images.second), seconds)
                rows.append(
                    f"| {name} | {times} | {tally.outcomes.total()} | {tally.failed} "
                    f"| {np.median(tally.seconds):.2f} s | {max(tally.seconds):.2f} s |"
                )
                step(rows[-1])
                failed += tally.failed
                if tally.failed:
                    step(f"{name}: {dict(tally.outcomes)} {tally.examples}")
                    step(engine.tried("logs", "--tail", "60", pods.gateway).stdout)
    if only is None:
        write_report(
            "replicas",
            "Replicas",
            [
                _how(seconds),
                "",
                "| what happens | times | requests | failed | median | slowest |",
                "|---|---|---|---|---|---|",
                *rows,
            ],
        )
    if failed:
        raise UserError(f"{failed} requests failed.")


def _how(seconds: float) -> str:
    podman = subprocess.run(
        ["podman", "--version"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    return (
        f"{CLIENTS} clients, {seconds:.0f} s each and until the last fault is over, before the "
        f"gateway's container and two pods of deploy/kubernetes, run by podman {podman}: "
        "`make replicas`."
    )


if __name__ == "__main__":
    command(main)
