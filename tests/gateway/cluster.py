"""A gateway on free ports, and clients that keep sending requests to it."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import requests

from scripts.gateway.gateway import Options
from scripts.samples import CAT
from scripts.serve.running import unused_ports

TIMEOUT = 60


def free_options(**options: Any) -> Options:
    """Options of a gateway, with ports that nobody uses yet."""
    http, https, metrics = unused_ports(3)
    return Options(http_port=http, https_port=https, metrics_port=metrics, **options)


class Gateway(Protocol):
    """What clients must know of one."""

    @property
    def url(self) -> str:
        """Plain HTTP."""
        ...


@dataclass
class Tally:
    """What clients saw, and how long it took them.

    Attributes:
        outcomes: how often each status, or kind of lost connection, was seen.
        seconds: of each request that was answered 200.
        examples: an answer of each other status, for people to read.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests that were not answered 200."""
        return self.outcomes.total() - self.outcomes["200"]


@contextmanager
def clients(gateway: Gateway, count: int) -> Iterator[Tally]:
    """Keeps so many clients asking, each the next request after the last answer.

    Half of them connect anew for each request, as the tutorials' do; half keep their connection.
    """
    tally = Tally()
    done = threading.Event()
    photograph = CAT.read_bytes()

    def work(number: int) -> None:
        session = requests.Session()
        while not done.is_set():
            sender = session if number % 2 else requests
            started = time.monotonic()
            try:
                answer = sender.post(
                    f"{gateway.url}/predict", files={"file": photograph}, timeout=TIMEOUT
                )
                outcome, text = str(answer.status_code), answer.text
            except requests.RequestException as error:
                outcome, text = type(error).__name__, str(error)
            tally.outcomes[outcome] += 1
            if outcome == "200":
                tally.seconds.append(time.monotonic() - started)
            else:
                tally.examples[outcome] = text[:300]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        done.set()
        for thread in threads:
            thread.join()
