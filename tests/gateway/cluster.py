"""A gateway on free ports, and clients that keep sending requests to it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from scripts.gateway import nginx
from scripts.gateway.options import Options, check
from scripts.samples import CAT
from scripts.serve.running import ServerState, unused_ports

TIMEOUT = 60


def free_options(**options: Any) -> Options:
    """Return options of a gateway with free ports and high limits."""
    http, https = unused_ports(2)
    usual = {"rate": 1000, "burst": 1000, "connections": 1000, "model": "densenet121"}
    return Options(**{**usual, "http_port": http, "https_port": https, **options})


def in_front_of(running: ServerState, **options: Any) -> Options:
    """Return options of a gateway in front of a server."""
    return free_options(upstreams=f"127.0.0.1:{running.ports.inference}", **options)


@dataclass(frozen=True)
class Gateway:
    """A running gateway and a client of it."""

    options: Options
    folder: Path

    @property
    def url(self) -> str:
        """Return the address of plain HTTP, without the prefix."""
        return f"http://127.0.0.1:{self.options.http_port}"

    @property
    def https_url(self) -> str:
        return f"https://127.0.0.1:{self.options.https_port}"

    @property
    def access_log(self) -> Path:
        return self.folder / "access.log"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request over plain HTTP without following redirects."""
        options = {"allow_redirects": False, **options}
        return requests.request(method, self.url + path, timeout=TIMEOUT, **options)

    def predict(self, key: str | None = None, **headers: str) -> requests.Response:
        """Classify a photograph."""
        headers = {**headers, **({"X-API-Key": key} if key else {})}
        path = f"{self.options.prefix}/predict"
        return self.ask("POST", path, data=CAT.read_bytes(), headers=headers)


@contextmanager
def gateway(options: Options, folder: Path) -> Iterator[Gateway]:
    """Run a gateway; fail if nginx exits during the tests."""
    check(options)
    nginx.start(options, folder)
    try:
        yield Gateway(options, folder)
    finally:
        survived = nginx.stop(folder)
    assert survived, f"nginx exited during the tests; see {folder}"


def error(answer: requests.Response) -> tuple[int, str]:
    """Return status and type of an error, which must be in the service's format."""
    body = answer.json()
    assert (body["success"], body["code"]) == (False, answer.status_code)
    assert body["message"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, body["type"]


def write_keys(folder: Path, keys: dict[str, str]) -> str:
    """Write a file of API keys that only its owner can read; return its path."""
    path = folder / "keys"
    path.touch(mode=0o600)
    path.write_text("# clients\n" + "".join(f"{name} {key}\n" for name, key in keys.items()))
    return str(path)


class HasUrl(Protocol):
    """A server with an address."""

    @property
    def url(self) -> str: ...


@dataclass
class Tally:
    """The responses that clients got.

    Attributes:
        outcomes: number of responses by status, or by type of connection error.
        examples: the text of a response by outcome.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Return the number of requests without status 200."""
        return self.outcomes.total() - self.outcomes["200"]


@contextmanager
def clients(server: HasUrl, count: int, headers: dict[str, str] | None = None) -> Iterator[Tally]:
    """Keep clients sending requests, each the next one after a response.

    Half of them connect for each request, as the tutorials' clients do; half keep a connection.
    Those send a request again, once, if the connection breaks: a reload of nginx closes idle
    connections, perhaps at the moment of the next request (RFC 9112, 9.3.1).
    """
    reconnect = HTTPAdapter(max_retries=Retry(total=None, connect=0, read=1, allowed_methods=None))
    tally, done = Tally(), threading.Event()
    request: dict[str, Any] = {"files": {"file": CAT.read_bytes()}, "headers": headers}

    def work(number: int) -> None:
        session = requests.Session()
        session.mount("http://", reconnect)
        while not done.is_set():
            sender = session if number % 2 else requests
            try:
                answer = sender.post(f"{server.url}/predict", timeout=TIMEOUT, **request)
                outcome, text = str(answer.status_code), answer.text
            except requests.RequestException as error:
                outcome, text = type(error).__name__, str(error)
            tally.outcomes[outcome] += 1
            tally.examples[outcome] = text[:300]

    with ThreadPoolExecutor(count) as pool:
        working = [pool.submit(work, number) for number in range(count)]
        try:
            yield tally
        finally:
            done.set()
    for each in working:
        each.result()


def wait_for(ready: Callable[[], object]) -> None:
    """Wait up to a minute until the function returns true."""
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.1)
