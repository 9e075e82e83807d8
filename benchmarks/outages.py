"""`make outages`: two minutes of sixteen clients for each thing that can happen to a cluster.

Workers are killed or hang, a frontend or a node is killed, the model upgraded, a node drained:
again and again, for as long as the clients ask. No client may see anything but 200. Prints a table.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

from benchmarks import faults
from benchmarks.cluster import Tally, clients, free_options
from benchmarks.machine import write_report
from scripts.build.archive import build, recipe
from scripts.build.weights import Weights, untrained
from scripts.gateway import start as starting
from scripts.gateway.gateway import find_gateway
from scripts.gateway.nodes import start_nodes, stop_nodes
from scripts.terminal import UserError, command, step

CLIENTS = 16
SECONDS = 120.0
_PAUSE = 2.0


def _archives(folder: Path) -> list[Path]:
    """Two archives whose answers differ."""
    weights = untrained()
    state = dict(weights.state_dict)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name].roll(1, dims=0)
    other: Weights = dataclasses.replace(weights, state_dict=state, sha256="0" * 64)
    return [build(recipe(weights), folder / "first"), build(recipe(other), folder / "second")]


def _run(folder: Path, seconds: float, happen: Callable[[int], None]) -> tuple[Tally, int]:
    gateway = find_gateway(folder)
    assert gateway is not None
    times = 0
    deadline = time.monotonic() + seconds
    with clients(gateway, CLIENTS) as tally:
        while time.monotonic() < deadline:
            time.sleep(_PAUSE)
            happen(times)
            times += 1
    return tally, times


def main(
    seconds: Annotated[float, typer.Option(help="For each kind of outage.")] = SECONDS,
    only: Annotated[str | None, typer.Option(help="One kind of outage.")] = None,
) -> None:
    """Lets workers and nodes die and be replaced under load, and counts what clients see."""
    rows = []
    failed = 0
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run" / "gateway"
        archives = _archives(Path(temporary))
        nodes = start_nodes(2, archives[0], workers=1, run_dir=folder.parent)
        options = free_options(rate=1000, burst=1000)
        starting.start(options, nodes, folder)
        kinds: dict[str, Callable[[int], None]] = {
            "nothing": lambda _: None,
            "a worker is killed": lambda n: faults.kill_worker(folder, n),
            "a worker hangs": lambda n: faults.hang_worker(folder, n),
            "a frontend is killed": lambda n: faults.kill_frontend(folder, n),
            "a node is killed": lambda _: faults.kill_node(folder),
            "the model is upgraded": lambda n: faults.upgrade_all(folder, archives[(n + 1) % 2]),
            "a node is drained": lambda _: faults.drain_node(folder),
        }
        try:
            for name, happen in kinds.items():
                if only not in (None, name):
                    continue
                tally, times = _run(folder, seconds, happen)
                median, longest = np.median(tally.seconds), max(tally.seconds)
                rows.append(
                    f"| {name} | {times} | {tally.outcomes.total()} | {tally.failed} "
                    f"| {median:.2f} s | {longest:.2f} s |"
                )
                step(rows[-1])
                failed += tally.failed
                if tally.failed:
                    step(f"{name}: {dict(tally.outcomes)} {tally.examples}")
        finally:
            last = find_gateway(folder)
            if last is not None:
                starting.stop(last, folder)
                stop_nodes(last.nodes)
    if only is None:
        write_report(
            "outages",
            "Outages",
            [
                f"{CLIENTS} clients, {seconds:.0f} s each, 2 nodes of 1 worker: `make outages`.",
                "",
                "| what happens | times | requests | failed | median | longest |",
                "|---|---|---|---|---|---|",
                *rows,
            ],
        )
    if failed:
        raise UserError(f"{failed} requests failed.")


if __name__ == "__main__":
    command(main)
