"""Fetching, verifying and loading weights, from a real HTTP server on this machine."""

import hashlib
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from handler.settings import Preprocessing
from scripts.build import weights as weights_module
from scripts.build.export import Normalized
from scripts.build.weights import (
    HostUnreachableError,
    Weights,
    build_model,
    fetch,
    load,
    obtain,
    official_url,
    untrained,
)
from scripts.samples import sample_batch
from scripts.terminal import UserError
from tests.published import publish


class WeightsHost(BaseHTTPRequestHandler):
    """Serves files by name; some names misbehave as hosts and networks do."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.requests.append(self.path)
        if name not in self.files:
            self.send_error(404)
            return
        content = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if "/cut/" in self.path else content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output clean."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), WeightsHost) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def official_file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision publishes it: old key names, its SHA-256 in its own name."""
    published = publish(weights, tmp_path_factory.mktemp("published"))
    WeightsHost.files[published.name] = published.read_bytes()
    return published


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def sample_logits(weights: Weights) -> torch.Tensor:
    model = Normalized(build_model(weights), Preprocessing()).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.from_numpy(sample_batch(Preprocessing())))
    return logits


def files_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*")) if cache.exists() else []


def test_fetched_weights_predict_what_the_model_they_came_from_predicts(
    host: str, cache: Path, official_file: Path, weights: Weights
) -> None:
    found = obtain(url=f"{host}/{official_file.name}")
    assert files_in(cache) == [official_file.name]
    assert (found.file, found.trained) == (official_file.name, True)
    assert found.sha256 == hashlib.sha256(official_file.read_bytes()).hexdigest()
    expected = sample_logits(weights)
    assert torch.equal(sample_logits(found), expected)
    assert len(set(expected.argmax(1).tolist())) >= 5


def test_a_second_fetch_uses_the_cache(host: str, cache: Path, official_file: Path) -> None:
    url = f"{host}/twice/{official_file.name}"
    assert fetch(url) == fetch(url) == cache / official_file.name
    assert WeightsHost.requests.count(f"/twice/{official_file.name}") == 1


def test_a_damaged_file_in_the_cache_is_replaced(
    host: str, cache: Path, official_file: Path
) -> None:
    damaged = bytearray(official_file.read_bytes())
    damaged[1000] ^= 1
    cache.mkdir(parents=True)
    (cache / official_file.name).write_bytes(damaged)
    fetched = fetch(f"{host}/{official_file.name}")
    assert fetched.read_bytes() == official_file.read_bytes()


def test_a_flipped_byte_is_refused_and_nothing_is_left(
    host: str, cache: Path, official_file: Path
) -> None:
    content = bytearray(official_file.read_bytes())
    content[len(content) // 2] ^= 1
    name = official_file.name.replace("densenet121", "flipped")
    WeightsHost.files[name] = bytes(content)
    with pytest.raises(UserError, match=r"not the expected file.*thrown away"):
        fetch(f"{host}/{name}")
    assert files_in(cache) == []


def test_a_cut_connection_is_refused_and_nothing_is_left(
    host: str, cache: Path, official_file: Path
) -> None:
    with pytest.raises(UserError, match=r"cut off.*Run the same command again"):
        fetch(f"{host}/cut/{official_file.name}")
    assert files_in(cache) == []
    assert fetch(f"{host}/{official_file.name}").exists()


def test_a_missing_file_is_not_taken_for_a_missing_network(host: str, cache: Path) -> None:
    with pytest.raises(UserError, match="answered 404") as error:
        fetch(f"{host}/densenet121-00000000.pth")
    assert not isinstance(error.value, HostUnreachableError)
    assert files_in(cache) == []


def test_an_unreachable_host_is_told_apart(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/densenet121-a639ec97.pth"
        with pytest.raises(HostUnreachableError, match="WEIGHTS=path"):
            fetch(url)
    assert files_in(cache) == []


def test_a_host_that_stops_sending_is_given_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "NETWORK_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/densenet121-a639ec97.pth"
        with pytest.raises(UserError, match="timed out"):
            fetch(url)
    assert files_in(cache) == []


def test_a_disk_that_takes_no_more_leaves_nothing(
    host: str, cache: Path, official_file: Path
) -> None:
    """In a process of its own that may write one megabyte, which a full disk is like."""
    program = f"from scripts.build.weights import obtain; obtain(url='{host}/{official_file.name}')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCH_HOME": str(cache.parent.parent)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert "cannot be written" in result.stderr
    assert "Free some space" in result.stderr
    assert files_in(cache) == []


def test_the_official_address_carries_the_known_hash() -> None:
    assert official_url().endswith("/densenet121-a639ec97.pth")


def test_a_name_without_a_hash_is_refused(host: str) -> None:
    with pytest.raises(UserError, match="does not carry its SHA-256"):
        fetch(f"{host}/weights.pth")


class Bomb:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match="holds more than weights"):
        load(Path("bomb.pth"))
    assert not Path("bomb-went-off").exists()


def test_weights_of_another_model_are_refused_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(
        UserError, match=r"other.pth does not fit densenet121: it has no classifier.weight"
    ):
        load(path)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a file of PyTorch weights"):
        load(path)


def test_a_missing_file_of_the_users_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere.pth cannot be read: No such file"):
        load(Path("nowhere.pth"))


def test_untrained_weights_are_the_same_every_time(weights: Weights) -> None:
    again = untrained()
    assert again.sha256 == weights.sha256
    assert not again.trained


def test_untrained_answers_differ_from_picture_to_picture(weights: Weights) -> None:
    assert len(set(sample_logits(weights).argmax(1).tolist())) >= 5
