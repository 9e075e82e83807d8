"""Failures in production: killed workers, a full queue, large uploads, disconnecting clients."""

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from PIL import Image

from classification_client import Client
from scripts.samples import CAT
from scripts.serve.management import PIXEL, model_status, ready_workers, scale
from scripts.serve.running import ServerState
from tests.gateway.cluster import wait_for
from tests.images import encode
from tests.served import frontend_memory, post, worker_pids
from tests.stress import chaos, fuzz

CAT_BYTES = CAT.read_bytes()
# 80 uploads of 5 MB on the heap and in buffers, copies of them, and Java itself.
MAX_FRONTEND_BYTES = 3_500_000_000


def test_a_killed_worker_fails_at_most_its_batch_and_is_replaced(running: ServerState) -> None:
    before = worker_pids(running)
    with ThreadPoolExecutor(16) as clients:
        waiting = [clients.submit(post, running, CAT_BYTES) for _ in range(80)]
        wait_for(lambda: sum(future.done() for future in waiting) > 10)
        psutil.Process(min(before)).kill()
        answers = [future.result() for future in waiting]
    assert all(answer.status_code == 200 or chaos.is_retryable(answer) for answer in answers)
    assert sum(answer.status_code == 200 for answer in answers) >= 80 - 16
    wait_for(lambda: ready_workers(running) == 2)
    assert min(before) not in worker_pids(running)


def test_a_full_queue_returns_503_at_once_and_loses_no_request(
    running: ServerState, one_worker: psutil.Process
) -> None:
    """Send more requests than the queue holds while the worker is suspended."""
    queue = model_status(running)["jobQueueStatus"]["remainingCapacity"]
    one_worker.suspend()
    with ThreadPoolExecutor(queue + 36) as clients:
        waiting = [clients.submit(post, running, PIXEL) for _ in range(queue + 36)]
        wait_for(lambda: model_status(running)["jobQueueStatus"]["remainingCapacity"] == 0)
        wait_for(lambda: sum(future.done() for future in waiting) >= 36 - 8)
        rejected = {future.result().status_code for future in waiting if future.done()}
        one_worker.resume()
        statuses = Counter(future.result().status_code for future in waiting)
    assert rejected == {503}
    assert set(statuses) == {200, 503}
    assert statuses[200] >= queue


def test_bad_and_disconnecting_clients_do_not_affect_others(running: ServerState) -> None:
    clients = chaos.Chaos(running, seed=3)
    clients.run(seconds=6)
    assert clients.wrong == []
    outcomes = Counter(kind for kind, _ in clients.outcomes.elements())
    assert outcomes["good"] > 0
    assert outcomes["disconnection"] > 0
    assert post(running, CAT_BYTES).status_code == 200


def test_the_memory_of_large_uploads_is_reused_and_freed(running: ServerState) -> None:
    before, image = worker_pids(running), encode(Image.effect_noise((2000, 1500), 80))
    data = image + bytes(5_000_000 - len(image))  # decoders ignore trailing bytes
    for uploads, at_once, limit in ((220, 8, 1_000_000_000), (80, 80, MAX_FRONTEND_BYTES)):
        with ThreadPoolExecutor(at_once) as clients:
            answers = clients.map(lambda _: post(running, data, timeout=300), range(uploads))
            statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) <= {200, 503}
        assert statuses[200] > 0
        assert frontend_memory(running, collected=False) < limit
    assert worker_pids(running) == before
    wait_for(lambda: frontend_memory(running, collected=False) < 400_000_000)


def test_event_loops_have_the_lowest_priority_and_workers_the_usual_one(
    running: ServerState,
) -> None:
    threads = Path(f"/proc/{running.pid}/task").glob("*")
    names = {int(thread.name): (thread / "comm").read_text() for thread in threads}
    loops = [thread for thread, name in names.items() if name.startswith("epollEventLoop")]
    # Loops of connections to workers start with the worker and may have the usual priority.
    assert 19 in {os.getpriority(os.PRIO_PROCESS, thread) for thread in loops}
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert all(os.getpriority(os.PRIO_PROCESS, worker) == usual for worker in worker_pids(running))


def test_corrupted_images_crash_no_worker(running: ServerState) -> None:
    """A short `make fuzz`."""
    fuzz.fuzz_images(200, seed=2)
    fuzz.fuzz_server(running, 200, seed=2)


def test_scaling_under_load_loses_no_request_of_a_client_that_retries(running: ServerState) -> None:
    """TorchServe sometimes drops the batch of a worker that it scales down, and returns
    500 "Worker died." for it. A retry is safe, since a classification has no side effects.
    """
    answered: Counter[str] = Counter()
    finished = threading.Event()

    def work() -> None:
        with Client(running.predictions_url) as client:
            while not finished.is_set():
                answered[client.classify(CAT).label] += 1

    with ThreadPoolExecutor(8) as clients:
        futures = [clients.submit(work) for _ in range(8)]
        try:
            for workers in (1, 2, 1, 2):
                before = answered.total()
                scale(running, workers)
                assert ready_workers(running) == workers
                wait_for(lambda least=before + 20: answered.total() >= least)  # type: ignore[misc]
        finally:
            finished.set()
        for future in futures:
            future.result()
    assert len(answered) == 1
