"""How everything here is timed: warm-up, alternating rounds, medians, quiet between two loads."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import psutil

from scripts.terminal import step, warn

T = TypeVar("T")

_WARM_UP = 2
# A server that still works on what was given up counts as quiet below this share of a core.
_QUIET, _QUIET_TIMEOUT, _QUIET_SECONDS = 0.2, 90.0, 0.5


@dataclass(frozen=True)
class Cost:
    """What a call takes: seconds by the clock, the median; seconds of CPU, the mean."""

    seconds: float
    cpu_seconds: float


def in_turn(ways: Sequence[T], rounds: int) -> Iterator[T]:
    """Every one of the ways in each round, so that a noisy minute does not hit only one.

    Each round begins with another one.
    """
    for number in range(rounds):
        begin = number * len(ways) // rounds
        yield from ways[begin:]
        yield from ways[:begin]


def medians(
    ways: Mapping[T, Callable[[], float]], rounds: int, say: Callable[[T, float], str]
) -> dict[T, float]:
    """The median of what each of the ways gave, measured in turn.

    Args:
        ways: what to measure: name to a function that measures once.
        rounds: how often.
        say: what to tell the person of a name and its latest measurement.
    """
    found: dict[T, list[float]] = {name: [] for name in ways}
    for name in in_turn(list(ways), rounds):
        found[name].append(ways[name]())
        step(say(name, found[name][-1]))
    return {name: median(values) for name, values in found.items()}


def cost(work: Callable[[], object], repeats: int) -> Cost:
    """What a call costs, after two that warm up."""
    for _ in range(_WARM_UP):
        work()
    times = []
    before = cpu_seconds()
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return Cost(median(times), (cpu_seconds() - before) / repeats)


def images_a_second(work: Callable[[], object], images: int, seconds: float) -> float:
    """The rate, over so many seconds, of a call that works on `images`; one warms up."""
    work()
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        work()
        count += images
    return count / elapsed


def cpu_seconds() -> float:
    """CPU time of this process and its children, ended or not, in seconds."""
    times = os.times()
    alive = (child.cpu_times() for child in psutil.Process().children())
    return (
        time.process_time()
        + times.children_user
        + times.children_system
        + sum(child.user + child.system for child in alive)
    )


def wait_until_quiet(name: str, used: Callable[[], float]) -> None:
    """A load's last requests are given up by their clients, but not by every server: what is
    measured next must not pay for them.

    Args:
        name: of the server, for the warning where it is still busy after 90 s.
        used: CPU seconds that it has used so far.
    """
    deadline = time.monotonic() + _QUIET_TIMEOUT
    while time.monotonic() < deadline:
        before, began = used(), time.monotonic()
        time.sleep(_QUIET_SECONDS)
        if (used() - before) / (time.monotonic() - began) < _QUIET:
            return
    warn(f"{name} is still busy after {_QUIET_TIMEOUT:.0f} s without requests.")
