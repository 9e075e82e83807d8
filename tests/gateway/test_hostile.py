"""The costliest pictures, many at once: other clients must not notice more than a wait."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from benchmarks.cluster import TIMEOUT, clients
from scripts.gateway.gateway import Gateway
from tests import costs

AT_ONCE = 18

# What the frontend takes of each, at its largest: all that once held a worker for seconds, and what
# costs most now of each format. Kinds of one line are sent at once; the costliest is alone.
ROUNDS = (
    ("BMP: 8 megapixels of runs of 1",),
    ("TIFF: five million strips", "PNG: 25 megapixels of RGBA", "GIF: 36 megapixels, interlaced"),
    ("AVIF: noise", "JPEG: noise of 20 MB", "WebP: 9 megapixels, transparent"),
    ("HEIC: 12 megapixels", "JPEG: 100 scans of 4 megapixels", "PNG: noise of 19 MB"),
    ("JPEG: tiny Exif segments", "JPEG: four-byte segments", "PNG: empty chunks"),
    ("BMP: 64 megapixels of runs", "WebP: 64 megapixels, transparent"),
)


@pytest.mark.timeout(600)
def test_costly_pictures_at_once_fail_no_ordinary_request(
    cluster: Gateway, note: list[str]
) -> None:
    makers = dict(costs.kinds())
    slowest, ordinary = {}, 0
    for names in ROUNDS:
        bodies = [makers[name]() for name in names]

        def send(number: int, bodies: list[bytes] = bodies) -> tuple[int, int]:
            kind = number % len(bodies)
            answer = requests.post(
                f"{cluster.url}/predict", files={"file": bodies[kind]}, timeout=2 * TIMEOUT
            )
            return kind, answer.status_code

        with clients(cluster, 4) as tally, ThreadPoolExecutor(AT_ONCE) as pool:
            costly = Counter(pool.map(send, range(AT_ONCE)))
        beside = ", ".join(names)
        assert tally.failed == 0, f"beside {beside}: {tally.outcomes} {tally.examples}"
        assert tally.outcomes["200"] > 0
        # Each is answered or refused for its own sake, and none ends a worker.
        assert {status for _, status in costly} <= {200, 400, 413, 415}, f"{beside}: {costly}"
        slowest[beside] = max(tally.seconds)
        ordinary += tally.outcomes.total()
    worst = max(slowest, key=lambda names: slowest[names])
    note.append(
        f"{AT_ONCE} costly pictures at once at the gateway, of {sum(map(len, ROUNDS))} kinds in "
        f"{len(ROUNDS)} rounds: {ordinary} ordinary requests beside them, all answered; the "
        f"slowest took {slowest[worst]:.1f} s, beside {worst}"
    )
