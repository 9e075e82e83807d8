"""`make chaos`: sixteen clients send good and bad requests while workers are killed.

Seven of ten requests are good; the others are bad bodies, disconnections, slow uploads and oversize
bodies. Every half minute a worker is killed. Every good request must get the right response or a
status that allows a retry, and the server must not use more memory afterwards.
"""

import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import psutil
import requests
import typer
from rich.table import Table

from benchmarks.known import PHOTOGRAPHS
from scripts.serve.management import ready_workers, wait_until
from scripts.serve.running import HOST, ServerState
from scripts.terminal import UserError, command, console, step
from tests.corpus import hostile
from tests.served import (
    frontend_memory,
    post,
    served_densenet,
    worker_memory,
    worker_pids,
)

CLIENTS = 16
SECONDS_BETWEEN_KILLS = 30.0
# Of the memory of the frontend and of a worker.
MAX_GROWTH = 0.10
OVERSIZE_BYTES = 25_000_000
# TorchServe's statuses for the batch of a crashed worker, and for a full queue.
RETRYABLE = {503, 507}


class Chaos:
    """Sixteen clients against one server.

    Attributes:
        outcomes: number of requests by kind and outcome.
        wrong: descriptions of wrong responses.
    """

    def __init__(self, running: ServerState, seed: int) -> None:
        self._running = running
        self._seed = seed
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._good = [path.read_bytes() for path in PHOTOGRAPHS[:6]]
        self._expected = [self._predictions(post(running, data)) for data in self._good]
        self._bad = [attack.data for attack in hostile() if len(attack.data) < 300_000]
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    @staticmethod
    def _predictions(answer: requests.Response) -> list[dict[str, Any]]:
        predictions: list[dict[str, Any]] = answer.json()["predictions"]
        return predictions

    def run(self, seconds: float) -> None:
        """Send requests for some seconds while workers are killed."""
        self._stopping.clear()
        with ThreadPoolExecutor(CLIENTS) as clients:
            working = [clients.submit(self._client, number) for number in range(CLIENTS)]
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                time.sleep(min(SECONDS_BETWEEN_KILLS, left))
                if deadline - time.monotonic() > 5:  # time for a worker to be replaced
                    psutil.Process(min(worker_pids(self._running))).kill()
                    self._count("kill", "worker killed")
            self._stopping.set()
        for client in working:
            client.result()

    def _client(self, number: int) -> None:
        chance = random.Random(self._seed * 1000 + number)
        others = (self._send_bad, self._disconnect, self._send_slowly, self._send_oversize)
        while not self._stopping.is_set():
            action = self._send_good if chance.random() < 0.7 else chance.choice(others)
            action(chance)

    def _count(self, kind: str, outcome: str) -> None:
        with self._lock:
            self.outcomes[kind, outcome] += 1

    def _send_good(self, chance: random.Random) -> None:
        index = chance.randrange(len(self._good))
        answer = post(self._running, self._good[index])
        right = answer.ok and self._predictions(answer) == self._expected[index]
        self._judge("good", answer, expected=right)

    def _send_bad(self, chance: random.Random) -> None:
        answer = post(self._running, chance.choice(self._bad))
        self._judge("bad body", answer, expected=400 <= answer.status_code < 500)

    def _judge(self, kind: str, answer: requests.Response, *, expected: bool) -> None:
        fine = expected or is_retryable(answer)
        self._count(kind, f"{answer.status_code}{'' if fine else ', WRONG'}")
        if not fine:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")

    def _connect(self, length: int) -> socket.socket:
        connection = socket.create_connection((HOST, self._running.ports.inference), timeout=60)
        head = (
            f"POST /predictions/densenet121 HTTP/1.1\r\nHost: {HOST}\r\n"
            f"Content-Type: image/jpeg\r\nContent-Length: {length}\r\n\r\n"
        )
        connection.sendall(head.encode())
        return connection

    def _disconnect(self, chance: random.Random) -> None:
        data = chance.choice(self._good)
        # Half of them disconnect during the upload, half before the response.
        sent = len(data) // 2 if chance.random() < 0.5 else len(data)
        with self._connect(len(data)) as connection:
            connection.sendall(data[:sent])
        self._count("disconnection", "gone")

    def _send_slowly(self, chance: random.Random) -> None:
        data = chance.choice(self._good)
        with self._connect(len(data)) as connection:
            for start in range(0, len(data), len(data) // 10 + 1):
                connection.sendall(data[start : start + len(data) // 10 + 1])
                time.sleep(0.2)
            status = connection.recv(100).split(b" ")[1].decode()
        self._count("slow upload", status)

    def _send_oversize(self, _: random.Random) -> None:
        try:
            status = str(post(self._running, bytes(OVERSIZE_BYTES)).status_code)
        except requests.ConnectionError:
            status = "connection closed"
        self._count("oversize body", status)


def is_retryable(answer: requests.Response) -> bool:
    """Return whether a retry may succeed."""
    died = answer.status_code == 500 and answer.json().get("message") == "Worker died."
    return died or answer.status_code in RETRYABLE


def _settled_memory(running: ServerState) -> dict[str, float]:
    """Return the bytes of each process, after both workers have classified images again."""
    assert wait_until(lambda: ready_workers(running) == 2, 60), "the killed worker was not replaced"
    usual = PHOTOGRAPHS[0].read_bytes()
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda _: post(running, usual), range(8 * CLIENTS)))
    assert answers[-1].status_code == 200
    return {"frontend": frontend_memory(running, collected=True), "worker": worker_memory(running)}


def main(
    seconds: Annotated[float, typer.Option(help="How long.")] = 300.0,
    warm_up: Annotated[float, typer.Option(help="How long before memory is measured.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Which requests.")] = 1,
) -> None:
    """Good and bad requests, disconnections, slow and oversize uploads, and killed workers."""
    with served_densenet() as running:
        chaos = Chaos(running, seed)
        step(f"Chaos: {warm_up:.0f} s until memory has settled, then {seconds:.0f} s")
        chaos.run(warm_up)
        chaos.outcomes.clear()
        before = _settled_memory(running)
        chaos.run(seconds)
        after = _settled_memory(running)
    table = Table("request", "outcome", "count")
    for (kind, outcome), count in sorted(chaos.outcomes.items()):
        table.add_row(kind, outcome, str(count))
    console.print(table)
    for name, size in before.items():
        growth = after[name] / size - 1
        console.print(f"{name}: {size / 1e6:.0f} MB before, {growth:+.1%} after")
        if growth > MAX_GROWTH:
            raise UserError(f"Memory of the {name} grew.")
    if chaos.wrong:
        raise UserError(f"Wrong responses: {chaos.wrong[:3]}")
    step("Chaos: every good request got the right response or may be retried")


if __name__ == "__main__":
    command(main)
