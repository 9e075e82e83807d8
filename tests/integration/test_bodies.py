"""A few bodies of `unit/test_corpus` and `unit/test_costs`, sent to a real server."""

import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil
import pytest
import requests

from handler.decoding.transform import resize_and_crop
from handler.inference.activation import softmax
from handler.inference.cores import Cores
from handler.inference.engines import Engine, load_engine
from handler.settings import ADDED_BYTES, Preprocessing
from scripts.serve.running import ServerState
from scripts.store import read_card
from tests import corpus, costs
from tests.images import encode

TIMEOUT = 120
VALID = (
    "JPEG CMYK Adobe",
    "JPEG 4000x3000",
    "PNG palette, clear color",
    "WEBP alpha",
    "GIF clear color",
    "BMP 32-bit with alpha",
    "TIFF 16-bit CMYK",
    "AVIF",
    "HEIF orientation 6",
)
# One image per error type, hostile JSON, and an empty body.
HOSTILE = [
    *{attack.type: attack for attack in corpus.hostile()}.values(),
    *(
        corpus.Hostile(name, data, 400, type_name)
        for name, data, type_name in (
            ("lists in lists", b'{"image":' + b"[" * 1_000_000, "BadRequest"),
            ("gigabytes", b'{"image":[' + b"[]," * 6_900_000 + b"1]}", "BadRequest"),
            ("base64 of zeros", b'{"image":"' + b"A" * 10_000_000 + b'"}', "NotAnImage"),
            ("no base64", b'{"image":"' + b"%" * 10_000_000 + b'"}', "BadRequest"),
            ("a million images", b'{"instances":[' + b"1," * 999_999 + b"1]}", "BadRequest"),
            ("a million digits", b'{"topk":' + b"9" * 1_000_000 + b"}", "BadRequest"),
            ("cut off", b'{"image": "', "BadRequest"),
            ("nothing", b"", "EmptyImage"),
        )
    ),
]


@pytest.fixture(scope="module")
def reference(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of the archive's model, without a server."""
    card = read_card(archive)
    assert card is not None
    folder = tmp_path_factory.mktemp("reference")
    with zipfile.ZipFile(archive) as content:
        content.extract("model.onnx", folder)
    return load_engine(folder / "model.onnx", card, Cores(1, 1, folder / "busy"))


def post(running: ServerState, data: bytes) -> requests.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return requests.post(running.predictions_url, data=data, headers=headers, timeout=TIMEOUT)


def test_images_of_all_formats_are_classified_as_pillow_sees_them(
    running: ServerState, reference: Engine
) -> None:
    samples = {image.name: image for image in corpus.valid() if image.name in VALID}
    assert set(samples) == set(VALID)
    labels = set()
    for name, image in samples.items():
        seen = np.asarray(resize_and_crop(image.seen, Preprocessing())).transpose(2, 0, 1)
        (expected,) = softmax(reference.run(np.ascontiguousarray(seen)[None]).logits)
        answer = post(running, image.data)
        assert answer.status_code == 200, name
        predictions = answer.json()["predictions"]
        order = [p["class_index"] for p in predictions]
        assert order == np.argsort(-expected, kind="stable")[:5].tolist(), name
        # A large JPEG is decoded at half its size, which changes pixels by up to 3 levels.
        assert [p["probability"] for p in predictions] == pytest.approx(
            expected[order].tolist(), abs=0.005 if "4000" in name else 1e-6
        )
        labels.add(order[0])
    assert len(labels) > 1


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.name)
def test_hostile_bodies_are_rejected_with_their_error(
    attack: corpus.Hostile, running: ServerState
) -> None:
    answer = post(running, attack.data)
    body = answer.json()
    assert (answer.status_code, body["type"]) == (attack.status, attack.type)
    assert (body["code"], body["success"]) == (attack.status, False)


def test_a_body_over_the_limit_is_rejected_by_the_frontend(running: ServerState) -> None:
    assert post(running, bytes(50_000_000)).status_code == 413


@contextmanager
def peaks(pids: set[int]) -> Iterator[dict[int, int]]:
    """Sample the peak memory of each worker and its decoder process, in bytes."""
    most = dict.fromkeys(pids, 0)
    done = Event()

    def sample() -> None:
        while not done.wait(0.05):
            for pid in pids:
                with suppress(psutil.NoSuchProcess):
                    worker = psutil.Process(pid)
                    family = (worker, *worker.children(recursive=True))
                    held = sum(process.memory_info().rss for process in family)
                    most[pid] = max(most[pid], held)

    thread = Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def test_the_costliest_images_at_once_fail_no_ordinary_request(
    running: ServerState, worker_pids: Callable[[], set[int]], note: list[str]
) -> None:
    makers = costs.kinds()
    bodies = [makers[name]() for name in costs.WORST]
    ordinary = encode(corpus.photograph(), "JPEG")
    # A worker that has not run a full batch yet grows by the memory of one.
    with ThreadPoolExecutor(28) as clients:
        list(clients.map(lambda _: post(running, ordinary), range(80)))
    before = worker_pids()
    usual = {pid: psutil.Process(pid).memory_info().rss for pid in before}
    with peaks(before) as most, ThreadPoolExecutor(28) as clients:
        attacks = [clients.submit(post, running, data) for data in bodies * 2]
        answers = [clients.submit(post, running, ordinary) for _ in range(40)]
        assert {answer.result().status_code for answer in answers} == {200}
        assert {attack.result().status_code for attack in attacks} <= {200, 400, 413}
    assert worker_pids() == before
    added = max(most[pid] - usual[pid] for pid in before)
    note.append(
        f"{len(attacks)} of the costliest images at once: a worker and its decoder process took "
        f"{added / 1e6:.0f} MB more at most, of {ADDED_BYTES / 1e6:.0f}"
    )
    assert added < ADDED_BYTES
