"""A few bodies of `unit/test_corpus` and `unit/test_costs`, sent to a real server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event, Thread

import psutil
import pytest

from handler.settings import ADDED_BYTES
from scripts.serve.running import ServerState
from tests import corpus, costs
from tests.images import encode
from tests.served import post, worker_pids

VALID = (
    "JPEG CMYK Adobe",
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
            ("no base64", b'{"image":"' + b"%" * 10_000_000 + b'"}', "BadRequest"),
            ("a million images", b'{"instances":[' + b"1," * 999_999 + b"1]}", "BadRequest"),
            ("a million digits", b'{"topk":' + b"9" * 1_000_000 + b"}", "BadRequest"),
            ("nothing", b"", "EmptyImage"),
        )
    ),
]


def test_images_of_all_formats_are_classified_as_pillow_sees_them(running: ServerState) -> None:
    samples = {image.name: image for image in corpus.valid() if image.name in VALID}
    assert set(samples) == set(VALID)
    labels = set()
    for name, image in samples.items():
        found, expected = (
            post(running, data).json()["predictions"] for data in (image.data, encode(image.seen))
        )
        for one, other in zip(found, expected, strict=True):
            assert one == other | {"probability": pytest.approx(other["probability"], abs=1e-6)}, (
                name
            )
        labels.add(found[0]["label"])
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
    running: ServerState, note: list[str]
) -> None:
    makers = costs.kinds()
    bodies = [makers[name]() for name in costs.WORST]
    ordinary = encode(corpus.photograph(), "JPEG")
    # A worker that has not run a full batch yet grows by the memory of one.
    with ThreadPoolExecutor(28) as clients:
        list(clients.map(lambda _: post(running, ordinary), range(80)))
    before = worker_pids(running)
    usual = {pid: psutil.Process(pid).memory_info().rss for pid in before}
    with peaks(before) as most, ThreadPoolExecutor(28) as clients:
        attacks = [clients.submit(post, running, data) for data in bodies * 2]
        answers = [clients.submit(post, running, ordinary) for _ in range(40)]
        assert {answer.result().status_code for answer in answers} == {200}
        assert {attack.result().status_code for attack in attacks} <= {200, 400, 413}
    assert worker_pids(running) == before
    added = max(most[pid] - usual[pid] for pid in before)
    note.append(
        f"{len(attacks)} of the costliest images at once: a worker and its decoder process took "
        f"{added / 1e6:.0f} MB more at most, of {ADDED_BYTES / 1e6:.0f}"
    )
    assert added < ADDED_BYTES
