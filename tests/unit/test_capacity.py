"""The simulation behind docs/capacity.md against what queueing theory knows."""

import numpy as np
import pytest

from benchmarks import capacity
from benchmarks.capacity import Worker, simulate


def test_the_measurements_come_out_again() -> None:
    worker = Worker.measured(single=0.05, full=25.0)
    assert worker.seconds(1) == pytest.approx(0.05)
    assert worker.most == pytest.approx(25.0)


def test_without_batches_it_is_the_queue_that_theory_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pollaczek and Khinchine: mean time with one worker and a fixed time of service."""
    monkeypatch.setattr(capacity, "BATCH", 1)
    seconds, load = 0.05, 0.7
    latencies = simulate(Worker(fixed=seconds, each=0.0), workers=1, rate=load / seconds)
    expected = seconds * (1 + load / (2 * (1 - load)))
    assert float(np.mean(latencies)) == pytest.approx(expected, rel=0.05)


def test_an_idle_worker_answers_in_the_time_of_a_single_image() -> None:
    worker = Worker(fixed=0.01, each=0.04)
    assert float(np.median(simulate(worker, 1, rate=0.1))) == pytest.approx(0.05)


def test_more_workers_wait_less_at_the_same_load() -> None:
    worker = Worker(fixed=0.01, each=0.04)
    one, many = (simulate(worker, n, rate=0.8 * worker.most * n) for n in (1, 16))
    assert np.quantile(many, 0.95) < np.quantile(one, 0.95)
