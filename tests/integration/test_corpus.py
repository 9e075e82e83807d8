"""The whole corpus through the real server, with the table that shows each answer."""

import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from handler.allocator import KEPT
from handler.cores import Cores
from handler.engines import Engine, load_engine
from handler.images import resize_and_crop
from handler.responses import softmax
from handler.settings import Preprocessing
from scripts.serve.management import model_status
from scripts.serve.running import Running
from scripts.store import read_card
from tests import corpus
from tests.pictures import encode, photographs

TIMEOUT = 60

# Shorter side in pixels from which a JPEG is decoded at a fraction of its size.
LARGE = 2550


@dataclass
class Row:
    """One line of the table."""

    name: str
    size: int
    answer: str
    milliseconds: float

    def __str__(self) -> str:
        return f"  {self.name:<52} {self.size:>9} B  {self.milliseconds:>6.0f} ms  {self.answer}"


@pytest.fixture(scope="module")
def reference(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The archive's model, asked directly."""
    card = read_card(archive)
    assert card is not None
    folder = tmp_path_factory.mktemp("reference")
    with zipfile.ZipFile(archive) as content:
        content.extract("model.onnx", folder)
    return load_engine(folder / "model.onnx", card, Cores(1, 1, folder / "busy"))


def post(running: Running, data: bytes) -> tuple[requests.Response, float]:
    started = time.perf_counter()
    answer = requests.post(
        running.predictions_url,
        data=data,
        headers={"Content-Type": "application/octet-stream"},
        timeout=TIMEOUT,
    )
    return answer, (time.perf_counter() - started) * 1000


def test_valid_pictures_are_classified_as_the_plain_library_sees_them(
    running: Running, reference: Engine, note: list[str]
) -> None:
    rows, labels = [], set()
    for picture in corpus.valid():
        seen = np.asarray(resize_and_crop(picture.seen, Preprocessing())).transpose(2, 0, 1)
        (expected,) = softmax(reference.logits(np.ascontiguousarray(seen)[None]))
        answer, milliseconds = post(running, picture.data)
        assert answer.status_code == 200, picture.name
        predictions = answer.json()["predictions"]
        order = [p["class_index"] for p in predictions]
        assert order == np.argsort(-expected, kind="stable")[:5].tolist(), picture.name
        # A large JPEG is decoded at half its size: within 3 levels, so nearly the same answer.
        is_reduced = picture.data.startswith(b"\xff\xd8") and min(picture.seen.size) >= LARGE
        assert [p["probability"] for p in predictions] == pytest.approx(
            expected[order].tolist(), abs=0.005 if is_reduced else 1e-6
        )
        labels.add(order[0])
        rows.append(Row(picture.name, len(picture.data), predictions[0]["label"], milliseconds))
    assert len(rows) >= 60
    assert len(labels) > 1
    note.append(f"{len(rows)} valid pictures, all classified as the plain library sees them:")
    note.extend(map(str, rows))


@pytest.fixture
def unchanged_workers(
    running: Running, worker_pids: Callable[[], set[int]], note: list[str]
) -> Iterator[None]:
    """The same processes serve after the test, and their memory stays within its bound."""
    _usual_load(running)
    pids, before = worker_pids(), _memory(running)
    yield
    _usual_load(running)
    assert worker_pids() == pids
    after = _memory(running)
    note.append(f"memory of the workers after the hostile corpus: {after / before - 1:+.1%}")
    # What a worker may hold on to, on purpose, and a little for its heap's holes.
    assert after < before * 1.05 + len(pids) * KEPT


def _usual_load(running: Running) -> None:
    """Full batches of photographs, until each worker's memory has settled."""
    pictures = [encode(image, "PNG", compress_level=1) for _, image in photographs()]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda data: post(running, data)[0].status_code, pictures * 2))
    assert set(answers) == {200}


def _memory(running: Running) -> int:
    pids = [worker["pid"] for worker in model_status(running)["workers"]]
    return sum(int(psutil.Process(pid).memory_full_info().pss) for pid in pids)


@pytest.mark.usefixtures("unchanged_workers")
def test_hostile_bytes_are_refused_and_cost_nothing(running: Running, note: list[str]) -> None:
    rows = []
    attacks = [(a.name, a.data, a.status, a.type) for a in corpus.hostile()]
    for name, data, status, type_name in (*attacks, *_bodies()):
        answer, milliseconds = post(running, data)
        body = answer.json()
        assert (answer.status_code, body["type"]) == (status, type_name), name
        assert body["success"] is False
        assert body["code"] == status
        rows.append(Row(name, len(data), f"{status} {type_name}", milliseconds))
    assert len(rows) >= 60
    note.append(f"{len(rows)} hostile bodies, all refused as expected:")
    note.extend(map(str, rows))


def _bodies() -> Iterator[tuple[str, bytes, int, str]]:
    """Bodies that are hostile as JSON, or as nothing at all."""
    yield "JSON: a million nested lists", b'{"image":' + b"[" * 1_000_000, 400, "BadRequest"
    yield "JSON: 10 MB of base64 that is zeros", _json(b"A" * 10_000_000), 400, "NotAnImage"
    yield "JSON: 10 MB that is no base64", _json(b"%" * 10_000_000), 400, "BadRequest"
    yield (
        "JSON: a million images",
        b'{"instances":[' + b"1," * 999_999 + b"1]}",
        400,
        "BadRequest",
    )
    yield (
        "JSON: a number of a million digits",
        b'{"topk":' + b"9" * 1_000_000 + b"}",
        400,
        "BadRequest",
    )
    yield "JSON: cut off", b'{"image": "', 400, "BadRequest"
    yield "nothing", b"", 400, "EmptyImage"


def _json(text: bytes) -> bytes:
    return b'{"image":"' + text + b'"}'


def test_a_body_over_the_limit_is_refused_by_the_frontend(running: Running) -> None:
    answer, _ = post(running, bytes(50_000_000))
    assert answer.status_code == 413
