"""Weights are fetched and verified, from an HTTP server on this machine; random ones are useful."""

import hashlib
import resource
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from handler.settings import Preprocessing
from scripts.build.export import Normalized
from scripts.build.model_file import from_options
from scripts.build.sources import download, open_source
from scripts.build.sources.download import fetch
from scripts.build.sources.graph import GRAPHS, GraphSource
from scripts.build.sources.source import HostUnreachableError
from scripts.build.sources.torchvision import (
    TorchvisionSource,
    official_weights,
    random_source,
)
from scripts.samples import sample_batch
from scripts.terminal import UserError
from tests.published import publish

CONTENT = bytes(range(256)) * 8192  # 2 MiB
NAME = f"some-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Host(ThreadingHTTPServer):
    """Serve files by name; below /cut/ the connection ends early."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HostHandler)
        self.files = {NAME: CONTENT}
        self.requests: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class HostHandler(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if "/cut/" in self.path else content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def files_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*")) if cache.exists() else []


def test_the_official_file_is_fetched_and_its_old_names_are_understood(
    host: Host, cache: Path, densenet: TorchvisionSource, tmp_path: Path
) -> None:
    file = publish(densenet, tmp_path)
    content = file.read_bytes()
    host.files[file.name] = content
    found = open_source(from_options(arch="densenet121", weights=host.url(file.name)))
    assert files_in(cache) == [file.name]
    assert (found.file, found.trained) == (file.name, True)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert isinstance(found, GraphSource)
    expected = densenet.module.state_dict()
    assert found.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        counts = name.endswith("num_batches_tracked")
        assert counts or np.array_equal(found.weights[name], tensor.numpy())


def test_a_file_is_fetched_once_and_again_only_if_it_is_damaged(host: Host, cache: Path) -> None:
    assert fetch(host.url(NAME)) == fetch(host.url(NAME)) == cache / NAME
    assert host.requests == [f"/{NAME}"]
    (cache / NAME).write_bytes(b"?" + CONTENT[1:])
    assert fetch(host.url(NAME)).read_bytes() == CONTENT


def test_an_interrupted_download_is_rejected_and_can_be_repeated(host: Host, cache: Path) -> None:
    with pytest.raises(UserError, match=r"cut off.*Run the same command again"):
        fetch(host.url(f"cut/{NAME}"))
    assert files_in(cache) == []
    assert fetch(host.url(NAME)).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flipped-00000000.pth", r"not the expected file.*thrown away"),
        ("missing-00000000.pth", "answered 404"),
        ("weights.pth", "does not carry its SHA-256"),
    ],
)
def test_a_wrong_file_leaves_nothing_and_is_not_reported_as_a_network_failure(
    name: str, message: str, host: Host, cache: Path
) -> None:
    host.files["flipped-00000000.pth"] = CONTENT
    with pytest.raises(UserError, match=message) as error:
        fetch(host.url(name))
    assert not isinstance(error.value, HostUnreachableError)
    assert files_in(cache) == []


def test_an_unreachable_host_is_distinguished(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        with pytest.raises(HostUnreachableError, match="WEIGHTS=path"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/{NAME}")
    assert files_in(cache) == []


def test_a_host_that_stops_sending_times_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "NETWORK_TIMEOUT", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UserError, match="timed out"),
    ):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}")
    assert files_in(cache) == []


def test_a_full_disk_leaves_nothing(host: Host, cache: Path) -> None:
    """Nearly full: this process may write files of one megabyte at most."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .* Free some space"):
            fetch(host.url(NAME))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(cache) == []


def test_the_official_address_is_torchvisions_and_carries_the_known_hash() -> None:
    assert official_weights("densenet121").url == GRAPHS["densenet121"].weights
    assert GRAPHS["densenet121"].weights.endswith("/densenet121-a639ec97.pth")


def test_random_weights_are_reproducible_and_give_different_answers_to_different_images(
    densenet: TorchvisionSource,
) -> None:
    first, again = (random_source("shufflenet_v2_x0_5") for _ in range(2))
    assert again.sha256 == first.sha256
    assert not again.trained
    for random in (densenet, again):
        preprocessing = Preprocessing(**random.preprocessing)
        images = torch.from_numpy(sample_batch(preprocessing, 2))
        with torch.inference_mode():
            logits = Normalized(random.module, preprocessing).eval()(images)
        assert len(set(logits.argmax(1).tolist())) >= 4
