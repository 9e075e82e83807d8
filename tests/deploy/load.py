"""Send requests until standard input is closed; then print one line of JSON per request."""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass

import requests

from scripts.samples import CAT

TIMEOUT = 60
# Seconds after a failed request.
_PAUSE = 0.2


@dataclass(frozen=True)
class Request:
    """One request of a client.

    Attributes:
        begin, end: in seconds since the epoch.
        outcome: the status, `refused` for a refused connection, or the name of another error.
        retry_after: the response's Retry-After.
    """

    begin: float
    end: float
    outcome: str
    retry_after: str | None = None


def main(url: str, key: str, count: int) -> None:
    """Run `count` clients, each of which sends its next request after a response."""
    done = threading.Event()
    found: list[Request] = []
    image = CAT.read_bytes()

    def work() -> None:
        session = requests.Session()
        while not done.is_set():
            begin = time.time()
            try:
                answer = session.post(url, image, headers={"X-API-Key": key}, timeout=TIMEOUT)
                outcome, after = str(answer.status_code), answer.headers.get("Retry-After")
            except requests.RequestException as error:
                refused = "Connection refused" in str(error)
                outcome, after = "refused" if refused else type(error).__name__, None
            found.append(Request(begin, time.time(), outcome, after))
            if outcome != "200":
                done.wait(_PAUSE)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    done.set()
    for thread in threads:
        thread.join()
    for request in found:
        print(json.dumps(asdict(request)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
