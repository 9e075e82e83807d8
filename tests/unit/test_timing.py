"""How benchmarks are timed."""

import time
from itertools import chain

from benchmarks.timing import cost, images_a_second, in_turn, medians


def test_every_round_has_every_way_and_begins_with_another() -> None:
    order = list(in_turn("abcd", rounds=3))
    rounds = [order[i : i + 4] for i in range(0, 12, 4)]
    assert [sorted(one) for one in rounds] == [list("abcd")] * 3
    assert len({one[0] for one in rounds}) == 3


def test_the_median_is_taken_over_the_rounds() -> None:
    first, second = iter((1.0, 9.0, 2.0)), iter((5.0, 5.0, 7.0))
    ways = {"first": first.__next__, "second": second.__next__}
    found = medians(ways, 3, lambda name, value: f"{name}: {value:g}")
    assert found == {"first": 2.0, "second": 5.0}


def test_sleeping_costs_time_and_no_cpu() -> None:
    calls = []
    pauses = chain((0.2, 0.2), iter(lambda: 0.01, None))  # what warms up is left out

    def work() -> None:
        calls.append(1)
        time.sleep(next(pauses))

    found = cost(work, repeats=5)
    assert len(calls) == 7
    assert 0.01 <= found.seconds < 0.1
    assert found.cpu_seconds < found.seconds
    assert 0 < images_a_second(work, 8, seconds=0.05) <= 800
