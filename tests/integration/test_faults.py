"""What goes wrong in production: workers that die or hang, a full queue, a flood, bad clients."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from benchmarks.faults import wait_for
from benchmarks.flood import flood
from benchmarks.served import post
from scripts.samples import CAT
from scripts.serve.management import model_status, ready_workers, scale
from scripts.serve.running import Running
from tests.stress import chaos, fuzz

TIMEOUT = 60
CAT_BYTES = CAT.read_bytes()


def test_a_killed_worker_costs_no_right_answer_and_comes_back(
    running: Running, worker_pids: Callable[[], set[int]]
) -> None:
    before = worker_pids()
    with ThreadPoolExecutor(16) as clients:
        waiting = [clients.submit(post, running, CAT_BYTES) for _ in range(80)]
        wait_for(lambda: sum(future.done() for future in waiting) > 10)
        psutil.Process(min(before)).kill()
        answers = [future.result() for future in waiting]
    assert all(answer.status_code == 200 or chaos.may_ask_again(answer) for answer in answers)
    assert sum(answer.status_code == 200 for answer in answers) >= 80 - 16
    wait_for(lambda: ready_workers(running) == 2)
    assert min(before) not in worker_pids()


def test_a_full_queue_is_answered_503_at_once_and_loses_nobody(
    running: Running, one_worker: psutil.Process
) -> None:
    """More requests than the queue of 64 holds, while the worker is halted."""
    one_worker.suspend()
    with ThreadPoolExecutor(100) as clients:
        waiting = [clients.submit(post, running, CAT_BYTES) for _ in range(100)]
        wait_for(lambda: model_status(running)["jobQueueStatus"]["remainingCapacity"] == 0)
        wait_for(lambda: sum(future.done() for future in waiting) >= 100 - 64 - 8)
        refused = {future.result().status_code for future in waiting if future.done()}
        one_worker.resume()
        statuses = Counter(future.result().status_code for future in waiting)
    assert refused == {503}
    assert set(statuses) == {200, 503}
    assert statuses[200] >= 64


def test_a_client_that_goes_away_costs_the_others_nothing(running: Running) -> None:
    clients = chaos.Chaos(running, seed=3)
    clients.run(seconds=6)
    assert clients.wrong == []
    outcomes = Counter(kind for kind, _ in clients.outcomes.elements())
    assert outcomes["good"] > 0
    assert outcomes["disconnection"] > 0
    assert post(running, CAT_BYTES).status_code == 200


def test_a_flood_of_large_uploads_is_answered_200_or_503(running: Running) -> None:
    """The short form of `make flood`."""
    flood(running, clients=80, size=5_000_000)


def test_corrupted_pictures_do_no_harm(running: Running, note: list[str]) -> None:
    """The short form of `make fuzz`."""
    images = fuzz.fuzz_images(2_000, seed=2)
    statuses = fuzz.fuzz_server(running, 200, seed=2)
    note.append(f"fuzz: {dict(images)} in process, {dict(statuses)} served")


def test_scaling_under_load_loses_no_request_of_a_client_that_asks_again(
    running: Running, note: list[str]
) -> None:
    """TorchServe sometimes drops the batch that a worker holds when it is scaled away, and says
    500 "Worker died." to it. Asking again is right, since a classification changes nothing.
    """
    statuses: Counter[int] = Counter()
    finished = threading.Event()

    def client() -> None:
        session = requests.Session()
        again = Retry(
            total=5,
            backoff_factor=0.1,
            status_forcelist=[500, 503, 507],
            allowed_methods=["POST"],
            raise_on_status=False,
        )
        session.mount("http://", HTTPAdapter(max_retries=again))
        while not finished.is_set():
            answer = session.post(
                running.predictions_url, files={"file": CAT_BYTES}, timeout=TIMEOUT
            )
            statuses[answer.status_code] += 1
            statuses[0] += len(answer.raw.retries.history) if answer.raw.retries else 0

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    try:
        for workers in (1, 2, 1, 2):
            before = statuses[200]
            scale(running, workers)
            assert ready_workers(running) == workers
            wait_for(lambda least=before + 20: statuses[200] >= least)  # type: ignore[misc]
    finally:
        finished.set()
        for thread in clients:
            thread.join()
    asked_again = statuses.pop(0)
    note.append(f"scaling 2-1-2-1-2 under load: {dict(statuses)}, asked again {asked_again} times")
    assert set(statuses) == {200}
