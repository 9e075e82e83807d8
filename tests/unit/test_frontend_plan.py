"""The queue and Java's memory follow the free memory."""

import pytest

from handler.settings import MAX_REQUEST_BYTES
from scripts.serve import machine
from scripts.serve.machine import WORKER_BYTES, Plan, plan_frontend

PLAN = Plan(workers=2, threads=1, max_threads=2)


@pytest.mark.parametrize(
    ("gigabytes", "models", "queue"),
    [(64, 1, 512), (18, 1, 512), (6, 1, 109), (2, 1, 16), (64, 4, 512)],
)
def test_the_heap_holds_the_longest_queue_that_the_memory_allows(
    gigabytes: int, models: int, queue: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: gigabytes * 10**9)
    plan = plan_frontend(PLAN, models, WORKER_BYTES)
    assert plan.queue == queue
    assert plan.heap_bytes >= models * queue * MAX_REQUEST_BYTES + 500_000_000
    assert plan.direct_bytes >= 256 << 20
    if queue > 16:
        taken = plan.heap_bytes + plan.direct_bytes + 2 * models * WORKER_BYTES
        assert taken <= gigabytes * 10**9
    assert plan.vmargs == (
        f"-Xmx{plan.heap_bytes >> 20}m -XX:MaxDirectMemorySize={plan.direct_bytes >> 20}m"
    )
