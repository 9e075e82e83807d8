"""Timing: warm-up, alternating rounds, medians, and waiting for an idle server."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def alternate(items: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield all items in each round, starting with another one."""
    for number in range(rounds):
        begin = number * len(items) // rounds
        yield from items[begin:]
        yield from items[:begin]


def medians(
    items: Sequence[T], rounds: int, measure: Callable[[T], Mapping[str, float]]
) -> dict[T, dict[str, float]]:
    """Return the medians of each item's values, which `measure` returns, in alternating rounds."""
    found: dict[T, list[Mapping[str, float]]] = {item: [] for item in items}
    for item in alternate(items, rounds):
        found[item].append(measure(item))
        step(f"{item}: " + ", ".join(f"{k} {v:.4g}" for k, v in found[item][-1].items()))
    return {
        item: {key: median(values[key] for values in measured) for key in measured[0]}
        for item, measured in found.items()
    }


def cost(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return a call's milliseconds by the clock (median) and of CPU (mean), after two others."""
    for _ in range(_WARM_UP):
        work()
    times = []
    before = cpu_seconds()
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    used = (cpu_seconds() - before) / repeats
    return {"ms": 1000 * median(times), "CPU ms": 1000 * used}


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
