"""Timing: warm-up, alternating rounds, medians, and waiting for an idle server."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import psutil

from scripts.terminal import step, warn

T = TypeVar("T")

_WARM_UP = 2
# A server is idle below this share of a core, with no abandoned requests left.
_IDLE_SHARE, _IDLE_TIMEOUT, _IDLE_SECONDS = 0.2, 90.0, 0.5
# Time for 512 abandoned requests.
_SETTLE_SECONDS = 20.0


@dataclass(frozen=True)
class Cost:
    """The cost of a call: seconds by the clock (median) and of CPU (mean)."""

    seconds: float
    cpu_seconds: float


def alternate(items: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield all items in each round, starting with another one."""
    for number in range(rounds):
        begin = number * len(items) // rounds
        yield from items[begin:]
        yield from items[:begin]


def medians(measures: Mapping[T, Callable[[], float]], rounds: int) -> dict[T, float]:
    """Return the median of what each function returned, called in alternating rounds."""
    found: dict[T, list[float]] = {name: [] for name in measures}
    for name in alternate(list(measures), rounds):
        found[name].append(measures[name]())
        step(f"{name}: {found[name][-1]:.4g}")
    return {name: median(values) for name, values in found.items()}


def cost(work: Callable[[], object], repeats: int) -> Cost:
    """Return the cost of a call, after two that warm up."""
    for _ in range(_WARM_UP):
        work()
    times = []
    before = cpu_seconds()
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return Cost(median(times), (cpu_seconds() - before) / repeats)


def images_per_second(work: Callable[[], object], images: int, seconds: float) -> float:
    """Return the rate of a call that processes `images`, repeated for `seconds`."""
    work()
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        work()
        count += images
    return count / elapsed


def cpu_seconds() -> float:
    """Return the CPU time of this process and its children, running or not, in seconds."""
    times = os.times()
    alive = (child.cpu_times() for child in psutil.Process().children())
    return (
        time.process_time()
        + times.children_user
        + times.children_system
        + sum(child.user + child.system for child in alive)
    )


def call_elsewhere(module: str, function: str, *arguments: object, **environment: str) -> str:
    """Call a function with text arguments in a new process; return what it printed."""
    program = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def wait_until_idle(name: str, used: Callable[[], float]) -> None:
    """Wait until a server has processed the requests that the last load abandoned.

    Args:
        name: of the server, for the warning if it is still busy after 90 s.
        used: returns the CPU seconds that it has used so far.
    """
    if name == "LitServe":  # whose idle processes poll their queues
        time.sleep(_SETTLE_SECONDS)
        return
    deadline = time.monotonic() + _IDLE_TIMEOUT
    while time.monotonic() < deadline:
        before, began = used(), time.monotonic()
        time.sleep(_IDLE_SECONDS)
        if (used() - before) / (time.monotonic() - began) < _IDLE_SHARE:
            return
    warn(f"{name} is still busy after {_IDLE_TIMEOUT:.0f} s without requests.")
