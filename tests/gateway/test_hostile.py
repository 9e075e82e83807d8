"""The costliest images, many at once: other clients must not notice more than a wait."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests import costs
from tests.gateway.cluster import TIMEOUT, Gateway, clients


@pytest.mark.timeout(600)
def test_costly_images_at_once_fail_no_ordinary_request(client: Gateway) -> None:
    makers = costs.kinds()
    bodies = [makers[name]() for name in costs.WORST]

    def send(data: bytes) -> int:
        url, files = f"{client.url}/predict", {"file": data}
        return requests.post(url, files=files, timeout=2 * TIMEOUT).status_code

    with clients(client, 4) as tally, ThreadPoolExecutor(18) as pool:
        costly = Counter(pool.map(send, bodies * 4))
    assert tally.failed == 0, f"{tally.outcomes} {tally.examples}"
    assert tally.outcomes["200"] > 0
    # Each is answered or rejected for its own sake, and none crashes a worker.
    assert set(costly) <= {200, 400, 413, 415}, costly
