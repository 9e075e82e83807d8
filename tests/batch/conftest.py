"""Small archives, their server, a Ray cluster, and S3 storage."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from benchmarks.archives import repack
from handler.settings import MODEL_CARD, ModelCard
from scripts.build.model_file import from_options
from scripts.build.packing import MANIFEST
from scripts.build.pipeline import build
from scripts.samples import CAT
from scripts.serve.running import ServerState, free_ports, unused_ports
from scripts.serve.server import start, stop
from tests.batch.cluster import Cluster
from tests.batch.command import wait_for
from tests.environments import environment

_CROP = 64
_REGION = "us-east-1"


def _build(folder: Path, name: str, **choices: Any) -> Path:
    """Build an archive that takes milliseconds per image."""
    size = {"resize": _CROP, "crop": _CROP}
    spec = from_options(name=name, arch="resnet18", weights="random", preprocessing=size, **choices)
    return build(spec, folder)


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-label model."""
    return _build(tmp_path_factory.mktemp("model_store"), "small")


@pytest.fixture(scope="session")
def multilabel_archive(small_archive: Path) -> Path:
    """The same model as a multi-label one."""

    def change(name: str, content: bytes) -> bytes:
        if name != MODEL_CARD:
            return content.replace(b'"small"', b'"several"') if name == MANIFEST else content
        card = ModelCard.from_json(content)
        thresholds = (0.5,) * card.classes
        return replace(card, activation="sigmoid", thresholds=thresholds).to_json().encode()

    return repack(small_archive, small_archive.with_name("several.mar"), change)


@pytest.fixture(scope="session")
def torch_archive(small_archive: Path) -> Path:
    """The same model for PyTorch, which uses a GPU if there is one."""
    return _build(small_archive.parent, "torch", engine="torch")


@pytest.fixture(scope="session")
def server(
    small_archive: Path, multilabel_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerState]:
    """A server of the single-label and the multi-label archive."""
    folder = tmp_path_factory.mktemp("run")
    running = start(small_archive, free_ports(), 1, folder, extra_archives=[multilabel_archive])
    yield running
    stop(running, folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head and a node."""
    # Paths of Ray's sockets are limited to 107 bytes, too few for pytest's folders.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray = Cluster(Path(folder, "ray"))
        try:
            ray.add()
            yield ray
        finally:
            ray.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """480 different small images in one folder."""
    folder = tmp_path_factory.mktemp("images")
    photograph = Image.open(CAT).convert("RGB")
    files = [folder / f"{number:04}.jpg" for number in range(480)]
    for number, file in enumerate(files):
        left, upper = 3 * (number % 20), 2 * (number // 20)
        part = photograph.crop((left, upper, left + 200, upper + 200))
        part.resize((96, 96)).save(file)
    return files


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Return a function from a key to its address in the empty bucket `images` of Moto's S3."""
    python = environment(tmp_path / "moto", Path("requirements/moto.lock").absolute())
    (port,) = unused_ports(1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    # Otherwise clients query the metadata service of AWS for credentials.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def created() -> bool:
        with suppress(requests.ConnectionError):
            return requests.put(f"http://127.0.0.1:{port}/images", timeout=60).ok
        return False

    command = [str(python.with_name("moto_server")), "--host=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as moto:
        try:
            wait_for(created)
            query = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region={_REGION}"
            yield lambda key: f"s3://images/{key}{query}"
        finally:
            moto.terminate()
