"""A gateway on free ports, and clients that keep sending requests to it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import requests

from scripts.gateway import nginx
from scripts.gateway.options import Options, check
from scripts.samples import CAT
from scripts.serve.running import ServerState, unused_ports

TIMEOUT = 60


def free_options(**options: Any) -> Options:
    """Return options of a gateway with ports that nobody uses yet, and limits no test reaches."""
    http, https = unused_ports(2)
    usual = {"rate": 1000, "burst": 1000, "connections": 1000, "model": "densenet121"}
    return Options(**{**usual, "http_port": http, "https_port": https, **options})


def in_front_of(running: ServerState, **options: Any) -> Options:
    """Return options of a gateway in front of this server."""
    upstreams = f"127.0.0.1:{running.ports.inference}"
    return free_options(upstreams=upstreams, model=running.model, **options)


@dataclass(frozen=True)
class Gateway:
    """A gateway that is running, and a client of it."""

    options: Options
    folder: Path

    @property
    def url(self) -> str:
        """Return the address of plain HTTP, without the prefix."""
        return f"http://127.0.0.1:{self.options.http_port}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request over plain HTTP, and follow no redirect."""
        options = {"allow_redirects": False, **options}
        return requests.request(method, self.url + path, timeout=TIMEOUT, **options)

    def predict(self, key: str | None = None, **headers: str) -> requests.Response:
        """Classify a photograph."""
        headers = {**headers, **({"X-API-Key": key} if key else {})}
        return self.ask("POST", "/predict", data=CAT.read_bytes(), headers=headers)


@contextmanager
def gateway(options: Options, folder: Path) -> Iterator[Gateway]:
    """Run a gateway, which must survive its tests."""
    check(options)
    nginx.start(options, folder)
    try:
        yield Gateway(options, folder)
    finally:
        survived = nginx.stop(folder)
    assert survived, f"nginx ended during the tests; see {folder}"


class HasUrl(Protocol):
    """What clients must know of a gateway."""

    @property
    def url(self) -> str:
        """Return the address of plain HTTP."""
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
        """Return how many requests were not answered 200."""
        return self.outcomes.total() - self.outcomes["200"]


@contextmanager
def clients(server: HasUrl, count: int, headers: dict[str, str] | None = None) -> Iterator[Tally]:
    """Keep so many clients sending requests, each the next one after the last answer.

    Half of them connect for each request, as the tutorials' do; half keep their connection.
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
                    f"{server.url}/predict",
                    files={"file": photograph},
                    headers=headers,
                    timeout=TIMEOUT,
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


def wait_for(ready: Callable[[], object]) -> None:
    """Wait until the function returns true, for a minute."""
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.1)
