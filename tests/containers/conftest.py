"""The image of the tests' archive, built once for all tests here."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from scripts.container.base import debian_base
from scripts.container.engine import Engine, find_engine, with_working_runtime
from scripts.container.image import build_image
from scripts.terminal import UserError
from tests.containers.running import Container, container

# Seconds; where no image can be pulled, some machines say so late.
_PULL = 60.0
_USUAL_BASE = "python:3.11.14-slim-bookworm"


@pytest.fixture(scope="session")
def found_engine() -> Engine:
    """What builds images: docker or podman, as it is."""
    engine = find_engine()
    if engine is None:
        pytest.skip("NOT RUN: no docker or podman (on Debian: apt install podman)")
    return engine


@pytest.fixture(scope="session")
def base(found_engine: Engine) -> str:
    """The usual base where it is here; else one of Debian's packages."""
    if found_engine.has_image(_USUAL_BASE):
        return _USUAL_BASE
    try:
        return debian_base(found_engine)
    except UserError as error:
        if (
            found_engine.run_unchecked("pull", "--quiet", _USUAL_BASE, timeout=_PULL).returncode
            == 0
        ):
            return _USUAL_BASE
        pytest.skip(f"NOT RUN: no base for the image: {error}")


@pytest.fixture(scope="session")
def engine(found_engine: Engine, base: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same, so that it runs containers here."""
    return with_working_runtime(found_engine, base, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def image(engine: Engine, base: str, archive: Path) -> Iterator[str]:
    """The name of the image of the tests' archive (random weights), built anew."""
    tag = f"localhost/densenet-test:{uuid4().hex[:12]}"
    build_image(engine, [archive], tag, base)
    yield tag
    engine.run_unchecked("image", "rm", "--force", tag)


@pytest.fixture(scope="session")
def served(engine: Engine, image: str) -> Iterator[Container]:
    """A container that all tests here may ask, and none may end."""
    with container(engine, image) as running:
        yield running
        assert running.runs(), f"the container ended during the tests:\n{running.logs()}"
