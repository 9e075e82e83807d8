"""`make image`: build the container image of model archives, or of a Ray cluster's nodes."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import typer

from scripts.container.base import build_options, debian_base
from scripts.container.engine import Engine, require_engine
from scripts.serve.preflight import check_archives
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, WEIGHTS_NOTICE, read_card
from scripts.terminal import UserError, step

NAME = "densenet-torchserve"
VERSION = "2.0.0"
RAY_NAME = "densenet-batch"
# Lock files of the packages; the last two are for archives that need them.
_LOCK = "requirements/container.lock"
_RAY_LOCK = "requirements/ray.lock"
_TORCH_LOCK = "requirements/pytorch.lock"
_PRECISION_LOCK = "requirements/precision.lock"


@dataclass(frozen=True)
class Recipe:
    """The inputs of a build, other than model archives.

    Attributes:
        dockerfile: path of the Dockerfile.
        target: the stage to build; None for the last one.
        lock: lock file of the packages that every archive needs.
    """

    dockerfile: Path = Path("deploy/container/Dockerfile")
    target: str | None = None
    lock: str = _LOCK


SERVER = Recipe()
# A node of a Ray cluster.
RAY = Recipe(target="ray", lock=_RAY_LOCK)


def build_image(
    engine: Engine,
    archives: Sequence[Path],
    tag: str,
    base: str | None = None,
    recipe: Recipe = SERVER,
) -> str:
    """Build a container image of model archives.

    Args:
        engine: docker or podman.
        archives: `.mar` files; each is served under its name.
        tag: the image's name and tag.
        base: overrides the Dockerfile's base image.
        recipe: the image to build.

    Returns:
        The image's id.

    Raises:
        UserError: the build failed; the message contains the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="image-") as name:
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
            result = engine.run_unchecked(
                "build",
                *build_options(engine),
                *secrets,
                *options,
                *("-f", str(recipe.dockerfile), "-t", tag, str(context)),
                stderr=subprocess.STDOUT,
            )
        if result.returncode != 0:
            raise UserError(f"The image could not be built. {result.stdout.strip()[-3000:]}")
    return str(engine.inspect("image", tag)["Id"])


def _copy_context(context: Path, archives: Sequence[Path]) -> None:
    """Copy the files that `.dockerignore` allows, and these archives."""
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
                # The image contains the weights, so it must contain their license too.
                notice = context / "model_store" / f"{archive.stem}-{WEIGHTS_NOTICE}"
                notice.write_bytes(content.read(WEIGHTS_NOTICE))


def ray_tag() -> str:
    """Return name and tag of the nodes' image, with Ray's version, which all nodes must share."""
    pinned = re.search(r"^ray==(\S+)", Path(_RAY_LOCK).read_text(), re.MULTILINE)
    assert pinned is not None
    return f"{RAY_NAME}:{VERSION}-ray{pinned[1]}"


def _labels(base: str | None) -> list[str]:
    """Return the options for labels whose values the Dockerfile does not know."""
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"],
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
    """Return the lock files of an image: its own, and those that its archives' workers need."""
    locks = [first]
    for archive in archives:
        card = read_card(archive)
        if card is not None and card.precision != "float32":
            locks.append(_PRECISION_LOCK)
        with zipfile.ZipFile(archive) as content:
            if any(name.endswith(".pth") for name in content.namelist()):
                locks.append(_TORCH_LOCK)
    return list(dict.fromkeys(locks))


@contextmanager
def _pip_secrets(folder: Path) -> Iterator[list[str]]:
    """Yield the options that pass this machine's pip index and certificates to the build only."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        config["global"][key.rpartition(".")[2].lower()] = value.strip("'\"")
    certificates = config["global"].get("cert")
    options = []
    if certificates and os.access(certificates, os.R_OK):
        config["global"]["cert"] = "/run/ca.crt"
        options.append(f"--secret=id=ca,src={certificates}")
    # These are local folders, which the build cannot read.
    config.remove_option("global", "find-links")
    extra = config["global"].get("extra-index-url", "").split()
    config["global"]["extra-index-url"] = " ".join(e for e in extra if not e.startswith("file:"))
    path = folder / "pip.conf"
    path.touch(mode=0o600)
    with path.open("w") as file:
        config.write(file)
    yield [*options, f"--secret=id=pip,src={path}"]
    path.unlink()


def image_size(engine: Engine, tag: str) -> int:
    """Return the size of an image's layers, in bytes."""
    return int(engine.inspect("image", tag)["Size"])


def main(
    models: Annotated[str | None, typer.Option(help="Names of model archives.")] = None,
    tag: Annotated[str | None, typer.Option(help="Name and tag of the image.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base image; debian: one built here from Debian's packages.")
    ] = None,
    target: Annotated[
        Literal["ray"] | None,
        typer.Option(help="ray: an image for the nodes of a Ray cluster; it needs no archive."),
    ] = None,
) -> None:
    """Build the container image of model archives with trained weights; print its size and id."""
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
    step(f"Image: {tag}, {image_size(engine, tag) / 1e6:.0f} MB, {image}")
