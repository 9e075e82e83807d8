"""No request fails while workers crash, keys change and archives are upgraded."""

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts.build.model_file import from_options
from scripts.build.pipeline import build
from scripts.build.sources.torchvision import TorchvisionSource
from scripts.gateway import nginx
from scripts.gateway.upgrade import PREVIOUS, upgrade
from scripts.serve.management import model_status, ready_workers
from scripts.serve.running import ServerState, find_running, free_ports
from scripts.serve.server import start, stop
from scripts.store import sha256
from scripts.terminal import UserError
from tests.gateway.cluster import Gateway, clients, free_options, gateway, wait_for, write_keys
from tests.gateway.conftest import KEYS

CLIENTS = 8
SECONDS = 20
KILL_INTERVAL = 5.0
KEY = {"X-API-Key": KEYS["alice"]}


@pytest.fixture(scope="module")
def served(
    archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Gateway, Path]]:
    """A server with two workers behind a gateway with API keys, and the model store."""
    place = tmp_path_factory.mktemp("outages")
    run_dir, model_store = place / ".run", place / "model_store"
    model_store.mkdir()
    copied = model_store / archive.name
    copied.write_bytes(archive.read_bytes())
    start(copied, free_ports(), workers=2, run_dir=run_dir)
    try:
        options = free_options(keys=write_keys(place, KEYS))
        with gateway(options, run_dir / "gateway") as started:
            yield started, model_store
    finally:
        running = find_running(run_dir)
        assert running is not None
        stop(running, run_dir)


@contextmanager
def _no_request_fails(started: Gateway, note: list[str], what: str) -> Iterator[None]:
    began = time.monotonic()
    with clients(started, CLIENTS, KEY) as tally:
        wait_for(lambda: tally.outcomes["200"] >= CLIENTS)
        yield
        while time.monotonic() < began + SECONDS:
            time.sleep(0.1)
        before = tally.outcomes.total()
        wait_for(lambda: tally.outcomes.total() > before + CLIENTS)
    note.append(f"{what}: {tally.outcomes.total()} requests, {tally.failed} failed")
    assert tally.failed == 0, (tally.outcomes, tally.examples)


def _server(started: Gateway) -> ServerState:
    running = find_running(started.folder.parent)
    assert running is not None
    return running


def test_no_request_fails_while_a_worker_is_killed_every_5_seconds(
    served: tuple[Gateway, Path], note: list[str]
) -> None:
    started, _ = served
    began = time.monotonic()
    with _no_request_fails(started, note, "a worker killed every 5 s"):
        number = 0
        while time.monotonic() < began + SECONDS:
            workers = model_status(_server(started))["workers"]
            psutil.Process(workers[number % len(workers)]["pid"]).kill()
            number += 1
            time.sleep(KILL_INTERVAL)
    wait_for(lambda: ready_workers(_server(started)) == 2)


def test_no_request_fails_during_reloads_with_other_keys(
    served: tuple[Gateway, Path], note: list[str]
) -> None:
    started, _ = served
    with _no_request_fails(started, note, "a reload with other keys"):
        for number in range(5):
            write_keys(Path(started.options.keys).parent, {**KEYS, "zoe": f"{number}" * 20})
            nginx.reload(started.options, started.folder)
            assert started.predict(f"{number}" * 20).status_code == 200


@pytest.mark.timeout(600)
def test_no_request_fails_during_upgrade_and_rollback(
    served: tuple[Gateway, Path], densenet: TorchvisionSource, note: list[str], tmp_path: Path
) -> None:
    started, model_store = served
    model = copy.deepcopy(densenet.module)
    for parameter in model.get_submodule("classifier").parameters():
        parameter.data = parameter.data.roll(1, dims=0)
    another = dataclasses.replace(densenet, module=model, sha256="0" * 64)
    archive = build(from_options(arch="densenet121"), tmp_path, another)

    def best() -> int:
        answer = started.predict(KEYS["bob"]).json()
        return int(answer["predictions"][0]["class_index"])

    before, served_before = best(), _server(started)
    broken = tmp_path / "broken" / archive.name
    broken.parent.mkdir()
    broken.write_bytes(b"not an archive")
    for wrong, message in ((broken, "is damaged"), (archive, "keep their label")):
        with pytest.raises(UserError, match=message):
            upgrade(wrong, folder=started.folder, model_store=model_store)
    assert _server(started).pid == served_before.pid
    assert best() == before
    with _no_request_fails(started, note, "an upgrade"):
        upgrade(archive, 0.0, started.folder, model_store)
    assert _server(started).archive_sha256 == sha256(archive)
    assert sha256(model_store / archive.name) == sha256(archive)
    assert best() == (before + 1) % 1000
    with pytest.raises(UserError, match="already"):
        upgrade(archive, 0.0, started.folder, model_store)
    previous = started.folder.parent / PREVIOUS / archive.name
    with _no_request_fails(started, note, "a rollback"):
        upgrade(previous, 0.0, started.folder, model_store)
    assert best() == before
    assert [path.name for path in previous.parent.iterdir()] == [archive.name]
