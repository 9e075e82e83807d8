"""The container image with a model archive, built once."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from scripts.container.base import debian_base
from scripts.container.engine import Engine, find_engine, with_working_runtime
from scripts.container.image import build_image
from scripts.terminal import UserError
from tests.containers.running import Container, container

# Seconds; without a registry some machines fail late.
_PULL = 60.0
_USUAL_BASE = "python:3.11.14-slim-bookworm"


@pytest.fixture(scope="session")
def base() -> str:
    """The usual base image, or one made of Debian's packages."""
    engine = find_engine()
    if engine is None:
        pytest.skip("NOT RUN: no docker or podman (on Debian: apt install podman)")
    if engine.has_image(_USUAL_BASE):
        return _USUAL_BASE
    try:
        return debian_base(engine)
    except UserError as error:
        pulled = engine.run_unchecked("pull", "--quiet", _USUAL_BASE, timeout=_PULL)
        if pulled.returncode == 0:
            return _USUAL_BASE
        pytest.skip(f"NOT RUN: no base for the image: {error}")


@pytest.fixture(scope="session")
def engine(base: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Docker or podman with a runtime that can run containers here."""
    found = find_engine()
    assert found is not None
    return with_working_runtime(found, base, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def image(engine: Engine, base: str, lite0_archive: Path) -> Iterator[str]:
    """The name of a new image with the archive of EfficientNet-Lite0."""
    tag = f"localhost/densenet-test:{uuid4().hex[:12]}"
    build_image(engine, [lite0_archive], tag, base)
    yield tag
    engine.run_unchecked("image", "rm", "--force", tag)


@pytest.fixture(scope="session")
def served(engine: Engine, image: str) -> Iterator[Container]:
    """A container that the tests share."""
    with container(engine, image) as running:
        yield running
        assert running.runs(), f"the container exited during the tests:\n{running.logs()}"
