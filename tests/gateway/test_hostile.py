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
# costs most now of each format.
KINDS = (
    "JPEG: tiny Exif segments",
    "JPEG: four-byte segments",
    "JPEG: 100 scans of 4 megapixels",
    "JPEG: noise of 20 MB",
    "PNG: empty chunks",
    "PNG: noise of 19 MB",
    "PNG: 25 megapixels of RGBA",
    "GIF: 36 megapixels, interlaced",
    "BMP: 64 megapixels of runs",
    "BMP: 8 megapixels of runs of 1",
    "WebP: 64 megapixels, transparent",
    "WebP: 9 megapixels, transparent",
    "TIFF: five million strips",
    "AVIF: noise",
    "HEIC: 12 megapixels",
)


@pytest.mark.timeout(600)
def test_costly_pictures_at_once_fail_no_ordinary_request(
    cluster: Gateway, note: list[str]
) -> None:
    bodies = {name: make for name, make in costs.kinds() if name in KINDS}
    assert set(bodies) == set(KINDS)
    slowest, ordinary = {}, 0
    for name, make in bodies.items():
        data = make()

        def send(_: int, data: bytes = data) -> str:
            answer = requests.post(
                f"{cluster.url}/predict", files={"file": data}, timeout=2 * TIMEOUT
            )
            return str(answer.status_code)

        with clients(cluster, 4) as tally, ThreadPoolExecutor(AT_ONCE) as pool:
            costly = Counter(pool.map(send, range(AT_ONCE)))
        assert tally.failed == 0, f"beside {name}: {tally.outcomes} {tally.examples}"
        assert tally.outcomes["200"] > 0
        # Each is answered or refused for its own sake, and none ends a worker.
        assert set(costly) <= {"200", "400", "413", "415"}, f"{name}: {costly}"
        slowest[name] = max(tally.seconds)
        ordinary += tally.outcomes.total()
    worst = max(slowest, key=lambda name: slowest[name])
    note.append(
        f"{AT_ONCE} of each of {len(bodies)} costly pictures at once at the gateway: {ordinary} "
        f"ordinary requests beside them, all answered; the slowest took {slowest[worst]:.1f} s, "
        f"beside {worst}"
    )
