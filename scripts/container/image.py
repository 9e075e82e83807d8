"""`make image`: build the container image of model archives, or of a Ray cluster's nodes."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import typer

from scripts.container.base import debian_base
from scripts.container.engine import Engine, require_engine
from scripts.serve.preflight import check_archives
from scripts.store import DEFAULT_ARCHITECTURE, MODEL_STORE, WEIGHTS_NOTICE, read_card
from scripts.terminal import UserError, step

NAME = "densenet-torchserve"
VERSION = "2.0.0"
RAY_NAME = "densenet-batch"
_RAY_LOCK = "requirements/ray.lock"


# A chroot, because podman's default runtime may not work here; Docker's format, because OCI's has
# no HEALTHCHECK; no intermediate layers.
_PODMAN = ("--isolation=chroot", "--format=docker", "--layers=false")


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
    lock: str = "requirements/container.lock"


def build_image(
    engine: Engine,
    archives: Sequence[Path],
    tag: str,
    base: str | None = None,
    recipe: Recipe = Recipe(),
) -> str:
    """Build a container image of model archives.

    The build uses this machine's network, for package indexes that only this machine can reach.

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
        context = Path(name, "context")
        _copy_context(context, archives)
        locks = " ".join(_locks(archives, recipe.lock))
        options = [f"--build-arg=LOCKS={locks}", *_labels(base), *_pip_secrets(Path(name))]
        if base is not None:
            options.append(f"--build-arg=BASE={base}")
        if recipe.target is not None:
            options.append(f"--target={recipe.target}")
        if engine.program == "podman":
            options += _PODMAN
        result = engine.run_unchecked(
            *("build", "--network=host", *options),
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
            locks.append("requirements/precision.lock")
        with zipfile.ZipFile(archive) as content:
            if any(name.endswith(".pth") for name in content.namelist()):
                locks.append("requirements/pytorch.lock")
    return list(dict.fromkeys(locks))


def _pip_secrets(folder: Path) -> list[str]:
    """Return the options that pass this machine's pip index and certificates to the build only."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    settings = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2].lower()] = value.strip("'\"")
    path = folder / "pip.conf"
    options = [f"--secret=id=pip,src={path}"]
    certificates = settings.get("cert")
    if certificates and os.access(certificates, os.R_OK):
        settings["cert"] = "/run/ca.crt"
        options.append(f"--secret=id=ca,src={certificates}")
    # The build cannot read local folders.
    settings.pop("find-links", None)
    extra = settings.get("extra-index-url", "").split()
    settings["extra-index-url"] = " ".join(e for e in extra if not e.startswith("file:"))
    path.touch(mode=0o600)
    path.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in settings.items()))
    return options


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
        recipe, models, tag = Recipe(), models or DEFAULT_ARCHITECTURE, tag or f"{NAME}:{VERSION}"
    else:
        # A node of a Ray cluster.
        recipe, models, tag = Recipe(target="ray", lock=_RAY_LOCK), models or "", tag or ray_tag()
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
