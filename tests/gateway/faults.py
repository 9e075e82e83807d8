"""What happens to a cluster while clients keep asking; used by a test and by `make outages`."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from scripts.cluster import drain, replace, undrain
from scripts.gateway import Gateway, find_gateway
from scripts.server import Running, find_running, model_status, ready_workers
from scripts.upgrade import upgrade


def nodes_of(folder: Path) -> list[str]:
    """Names of the nodes that the gateway has now."""
    return [node.name for node in _gateway(folder).nodes]


def _gateway(folder: Path) -> Gateway:
    gateway = find_gateway(folder)
    assert gateway is not None
    return gateway


def servers_of(folder: Path) -> list[Running]:
    """The nodes that run."""
    found = [find_running(Path(node.run_dir)) for node in _gateway(folder).nodes]
    return [running for running in found if running is not None]


def kill_worker(folder: Path, number: int) -> None:
    """Kills a worker of one node, of the next node each time, and waits for its successor."""
    servers = servers_of(folder)
    victim = servers[number % len(servers)]
    for worker in model_status(victim)["workers"]:
        if psutil.pid_exists(worker["pid"]):
            psutil.Process(worker["pid"]).kill()
            break
    _wait(lambda: ready_workers(victim) > 0)


def kill_node(folder: Path) -> None:
    """Kills a node with its workers, as a power cut would, and puts a new one in its place."""
    name = nodes_of(folder)[0]
    server = servers_of(folder)[0]
    process = server.process()
    assert process is not None
    for victim in (process, *process.children(recursive=True)):
        victim.kill()
    replace(name, folder)


def drain_node(folder: Path) -> None:
    """Takes a node out, and lets it serve again."""
    name = nodes_of(folder)[-1]
    drain([name], folder)
    undrain(name, folder)


def upgrade_all(folder: Path, archive: Path) -> None:
    """Puts another archive in the place of the one that serves."""
    upgrade(archive, agreement=0.0, trial_seconds=1.0, folder=folder)


def _wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "no worker came back within a minute"
        time.sleep(0.2)
