"""What happens to a cluster while clients keep asking; each waits until all is well again."""

from collections.abc import Callable
from pathlib import Path

import psutil

from scripts.gateway.gateway import Gateway, find_gateway
from scripts.gateway.nodes import drain, replace, undrain
from scripts.gateway.upgrade import upgrade
from scripts.serve.management import model_status, poll, ready_workers
from scripts.serve.running import Running, find_running
from scripts.terminal import UserError


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
    worker_of(victim).kill()
    wait_for(lambda: ready_workers(victim) > 0)


def worker_of(server: Running) -> psutil.Process:
    """The process of a worker that lives; one that was killed has a successor in a moment."""
    alive: list[int] = []

    def look() -> bool:
        alive.extend(
            w["pid"] for w in model_status(server)["workers"] if psutil.pid_exists(w["pid"])
        )
        return bool(alive)

    wait_for(look)
    return psutil.Process(alive[0])


def kill_node(folder: Path) -> None:
    """Kills a node with its workers, as a power cut would, and puts a new one in its place."""
    name = nodes_of(folder)[0]
    server = servers_of(folder)[0]
    cut_power(server)
    patiently(lambda: replace(name, folder))


def kill_frontend(folder: Path, number: int) -> None:
    """Kills the frontend of one node, of the next each time, and waits for the watch to mend it.

    The watch starts a node that dies again and again after pauses that double.
    """
    servers = servers_of(folder)
    place = number % len(servers)
    process = servers[place].process()
    assert process is not None
    process.kill()
    wait_for(lambda: serves_anew(folder, servers[place], place))


def serves_anew(folder: Path, before: Running, place: int = 0) -> bool:
    """Whether the node in this place is another process than before, and serves."""
    node = _gateway(folder).nodes[place]
    running = find_running(Path(node.run_dir))
    if running is None or running.pid == before.pid:
        return False
    return ready_workers(running) > 0 and node.healthy


def cut_power(server: Running) -> None:
    """Ends a frontend and its workers without a warning."""
    process = server.process()
    assert process is not None
    for victim in (process, *process.children(recursive=True)):
        victim.kill()


def patiently(act: Callable[[], object]) -> None:
    """Does what the watch may be in the way of for a moment."""
    wait_for(lambda: not _refused(act))


def _refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except UserError as error:
        if "Not now" in str(error):
            return True
        raise
    return False


def drain_node(folder: Path) -> None:
    """Takes a node out, and lets it serve again."""
    name = nodes_of(folder)[-1]
    patiently(lambda: drain([name], folder))
    patiently(lambda: undrain(name, folder))


def upgrade_all(folder: Path, archive: Path) -> None:
    """Puts another archive in the place of the one that serves."""
    patiently(lambda: upgrade(archive, agreement=0.0, trial_seconds=1.0, folder=folder))


def wait_for(ready: Callable[[], bool]) -> None:
    """Waits until it is so, for a minute."""
    assert poll(ready, 60), "it did not happen within a minute"
