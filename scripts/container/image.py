"""`make image`: an image of archives, or of a Ray cluster's nodes, built with docker or podman."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import typer

from scripts.container.base import debian_base, engine_options
from scripts.container.engine import Engine, require_engine, scratch
from scripts.serve.preflight import check_archives
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, WEIGHTS_NOTICE, read_card
from scripts.terminal import UserError, step

NAME = "densenet-torchserve"
VERSION = "1.0.0"
RAY_NAME = "densenet-batch"
# The packages of the image, and of others where an archive needs them.
_LOCK = "requirements/container.lock"
_LOCK_OF_RAY = "requirements/ray.lock"
_LOCK_OF_TORCH = "requirements/run.lock"
_LOCK_OF_PRECISION = "requirements/precision.lock"


@dataclass(frozen=True)
class Recipe:
    """What an image is built by.

    Attributes:
        dockerfile: the file.
        target: a stage of it; None for its last.
        lock: the packages that it needs whatever its archives are.
    """

    dockerfile: Path = Path("deploy/container/Dockerfile")
    target: str | None = None
    lock: str = _LOCK


SERVER = Recipe()
# A node of a Ray cluster.
RAY = Recipe(target="ray", lock=_LOCK_OF_RAY)


def build_image(
    engine: Engine,
    archives: Sequence[Path],
    tag: str,
    base: str | None = None,
    recipe: Recipe = SERVER,
) -> str:
    """Builds the image of these archives.

    Args:
        engine: docker or podman.
        archives: `.mar` files; each is served under its name.
        tag: the image's name and tag.
        base: another base than the Dockerfile's.
        recipe: another image's.

    Returns:
        The image's id.

    Raises:
        UserError: the build failed, with the last it said.
    """
    with scratch() as name:
        folder = Path(name)
        context = folder / "context"
        _copy_context(context, archives)
        locks = " ".join(_locks(archives, recipe.lock))
        options = [f"--build-arg=LOCKS={locks}", *_labels(base)]
        if base is not None:
            options.append(f"--build-arg=BASE={base}")
        if recipe.target is not None:
            options.append(f"--target={recipe.target}")
        with _pip_secrets(folder) as secrets:
            done = engine.tried(
                "build",
                *engine_options(engine),
                *secrets,
                *options,
                *("-f", str(recipe.dockerfile), "-t", tag, str(context)),
                stderr=subprocess.STDOUT,
            )
        if done.returncode != 0:
            raise UserError(f"The image could not be built. {done.stdout.strip()[-3000:]}")
    return str(engine.inspect("image", tag)["Id"])


def _copy_context(context: Path, archives: Sequence[Path]) -> None:
    """What `.dockerignore` lets into the image, with these archives."""
    for line in Path(".dockerignore").read_text().splitlines():
        if not line.startswith("!") or line.startswith("!model_store"):
            continue
        source = Path(line[1:])
        (context / source).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, context / source, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(source, context / source)
    (context / "model_store").mkdir()
    for archive in archives:
        shutil.copy(archive, context / "model_store")
        with zipfile.ZipFile(archive) as content:
            if WEIGHTS_NOTICE in content.namelist():
                # An image is a copy of the weights, where people look for licenses.
                notice = context / "model_store" / f"{archive.stem}-{WEIGHTS_NOTICE}"
                notice.write_bytes(content.read(WEIGHTS_NOTICE))


def ray_tag() -> str:
    """Name and tag of the nodes' image; all nodes of a cluster need the same version of Ray."""
    pinned = re.search(r"^ray==(\S+)", Path(_LOCK_OF_RAY).read_text(), re.MULTILINE)
    assert pinned is not None
    return f"{RAY_NAME}:{VERSION}-ray{pinned[1]}"


def _labels(base: str | None) -> list[str]:
    """Return the options for labels that the Dockerfile cannot know."""
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    labels = {
        "version": VERSION,
        "revision": revision or "unknown",
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"base.name": base} if base else {}),
    }
    return [f"--label=org.opencontainers.image.{key}={value}" for key, value in labels.items()]


def _locks(archives: Sequence[Path], first: str) -> list[str]:
    """The packages of an image, and what these archives' workers need beside them."""
    locks = [first]
    for archive in archives:
        card = read_card(archive)
        if card is not None and card.precision != "float32":
            locks.append(_LOCK_OF_PRECISION)
        with zipfile.ZipFile(archive) as content:
            if any(name.endswith(".pth") for name in content.namelist()):
                locks.insert(0, _LOCK_OF_TORCH)
    return list(dict.fromkeys(locks))


@contextmanager
def _pip_secrets(folder: Path) -> Iterator[list[str]]:
    """This machine's index and certificates for pip, for the time of the build only."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = configparser.ConfigParser(interpolation=None)
    found["global"] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        found["global"][key.rpartition(".")[2].lower()] = value.strip("'\"")
    certificates = found["global"].get("cert")
    options = []
    if certificates and os.access(certificates, os.R_OK):
        found["global"]["cert"] = "/run/ca.crt"
        options.append(f"--secret=id=ca,src={certificates}")
    # Folders of this machine.
    found.remove_option("global", "find-links")
    extra = found["global"].get("extra-index-url", "").split()
    found["global"]["extra-index-url"] = " ".join(e for e in extra if not e.startswith("file:"))
    config = folder / "pip.conf"
    config.touch(mode=0o600)
    with config.open("w") as file:
        found.write(file)
    yield [*options, f"--secret=id=pip,src={config}"]
    config.unlink()


def size_of(engine: Engine, tag: str) -> int:
    """Bytes of the image's layers together."""
    return int(engine.inspect("image", tag)["Size"])


def main(
    models: Annotated[str | None, typer.Option(help="Names of archives.")] = None,
    tag: Annotated[str | None, typer.Option(help="Name and tag of the image.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Another base; debian: of Debian's packages, made here.")
    ] = None,
    target: Annotated[
        Literal["ray"] | None,
        typer.Option(help="ray: an image for the nodes of a Ray cluster; it needs no archive."),
    ] = None,
) -> None:
    """Builds the image of archives, with trained weights only; prints its size and id."""
    if target is None:
        recipe, models, tag = SERVER, models or DEFAULT_ARCHITECTURE, tag or f"{NAME}:{VERSION}"
    else:
        recipe, models, tag = RAY, models or "", tag or ray_tag()
    archives = [MODEL_STORE / f"{name}.mar" for name in models.replace(",", " ").split()]
    check_archives(archives)
    for archive in archives:
        card = read_card(archive)
        if card is not None and not card.trained:
            raise UserError(
                f"{archive} holds untrained random weights. Build it with trained ones."
            )
    engine = require_engine()
    if base == "debian":
        base = debian_base(engine)
    step(f"Image: {engine.program} builds {tag}, which takes minutes ...")
    image = build_image(engine, archives, tag, base, recipe)
    step(f"Image: {tag}, {size_of(engine, tag) / 1e6:.0f} MB, {image}")
