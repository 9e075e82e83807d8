"""What the tests of batch classification share: a small archive, a cluster of three nodes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from handler.settings import Preprocessing
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.samples import CAT
from tests.batch.cluster import Cluster


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that takes milliseconds a picture."""
    size = Preprocessing(resize=64, crop=64)
    small = recipe(untrained("resnet18"), "small", preprocessing=size)
    return build(small, tmp_path_factory.mktemp("model_store"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head and two nodes."""
    # The names of Ray's sockets may have 107 bytes, which pytest's folders leave too few of.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray = Cluster(Path(folder, "ray"), nodes=2)
        try:
            yield ray
        finally:
            ray.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 small pictures, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    photograph = Image.open(CAT).convert("RGB")
    for number in range(800):
        left, upper = 3 * (number % 20), 2 * (number // 20)
        part = photograph.crop((left, upper, left + 200, upper + 200))
        part.resize((96, 96)).save(folder / f"{number:04}.jpg")
    return folder
