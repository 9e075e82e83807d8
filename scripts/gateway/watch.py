"""Watches over the nodes behind a gateway: takes out those that cannot answer, ends workers that
hang, starts dead nodes again, renews tokens, counts answers, and says what may be asked again.

`make gateway` starts it, `make gateway-stop` ends it. nginx itself notices a node that refuses or
breaks off, and asks another. What it cannot know is seen here: by processes and by answers, not by
what a frontend says of its workers.
"""

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import requests
import typer

from scripts.gateway.config import routes
from scripts.gateway.counting import Counting
from scripts.gateway.gateway import (
    GATEWAY_DIR,
    STATE,
    Gateway,
    Node,
    find_gateway,
    operation,
    require_gateway,
)
from scripts.gateway.health import Health
from scripts.gateway.nginx import change_nodes, check_keys
from scripts.gateway.nodes import drained, is_own, start_again
from scripts.gateway.upstreams import Answers, find_nodes
from scripts.gateway.waiting import Verdict, answering
from scripts.serve.running import HOST, Running, find_running
from scripts.terminal import UserError, command

SECONDS_BETWEEN_CHECKS = 1.0
# A node goes after so many checks that failed one after the other, and comes back with the first
# that succeeds.
CHECKS_THAT_FAIL = 2
# TorchServe's tokens are good for an hour, unless token_expiration_min says otherwise.
RENEW_BEFORE_EXPIRY = timedelta(minutes=20)
# With less time than this left a node's tokens are renewed even while no other node serves.
LAST_CHANCE = timedelta(minutes=5)
_HTTP_TIMEOUT = 10.0
# A node that dies soon after its start is started again after pauses that double, in seconds.
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 300.0
_STEADY = 600.0
# Seconds within which a request fails after its worker was ended here.
_ECHO = 3.0
_EXPECTED = (UserError, requests.RequestException, OSError, ValueError, psutil.Error)


class Watch:
    """What is known of the nodes of one gateway, and what is done about it.

    `check`, `keep` and `find` are called over and over, each from a thread of its own: what `keep`
    does can take minutes, and health cannot wait so long.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder of the gateway."""
        self.folder = folder
        self.health: dict[str, Health | Answers] = {}
        self.starts: dict[str, Starts] = {}
        self._said: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(8)

    def check(self) -> None:
        """Looks at every node once, and lets the gateway know of changes."""
        gateway = find_gateway(self.folder)
        if gateway is None:
            return
        present = {node.run_dir: node for node in gateway.nodes}
        # In one step, since other threads read it.
        self.health = {
            run_dir: self.health.get(run_dir) or _health_of(node)
            for run_dir, node in sorted(present.items())
        }
        for node, ended in zip(
            gateway.nodes, self._pool.map(self._look, gateway.nodes), strict=True
        ):
            if ended:
                say(f"{node.name}: {ended}")
        healthy = {
            run_dir: health.failures < CHECKS_THAT_FAIL for run_dir, health in self.health.items()
        }
        changed = [node for node in gateway.nodes if node.healthy != healthy[node.run_dir]]
        for node in changed:
            say(f"{node.name} is {'healthy' if healthy[node.run_dir] else 'unhealthy'}")
        if changed:
            change_nodes(
                lambda nodes: [
                    dataclasses.replace(node, healthy=healthy.get(node.run_dir, node.healthy))
                    for node in nodes
                ],
                self.folder,
            )

    def _look(self, node: Node) -> str:
        return self.health[node.run_dir].look(own=is_own(node))

    def ready(self) -> bool:
        """Whether a node can answer, however busy it is."""
        gateway = find_gateway(self.folder)
        return gateway is not None and any(
            not node.drained and node.run_dir in self.health and self.health[node.run_dir].ready
            for node in gateway.nodes
        )

    def steady(self) -> bool:
        """Whether no worker of any node has ended for some seconds."""
        return all(health.steady() for health in self.health.values())

    def verdict(self, socket: str) -> Verdict:
        """What may become of a request that just failed on the node of this socket.

        Where its worker was ended here, that may have been for this very request: it is tried no
        more if the worker was at work all the time, and once if it was not.
        """
        name = Path(socket.removeprefix("unix:")).name.partition(".")[0]
        for run_dir, health in self.health.items():
            if Path(run_dir).name.lstrip(".") == name and health.ended is not None:
                when, busy = health.ended
                if time.monotonic() - when < _ECHO:
                    return "no" if busy else "once"
        return "again"

    def keep(self) -> None:
        """Keeps nodes and their tokens alive, and nginx's keys up to date."""
        gateway = find_gateway(self.folder)
        if gateway is None:
            return
        for node in gateway.nodes:
            self.carefully(f"{node.name} cannot be started", partial(self._start_again, node))
        self.carefully("tokens cannot be renewed", partial(renew_tokens, self.folder))
        self.carefully("clients' keys cannot be read", partial(check_keys, gateway))
        # Keys are read anew, and every half day sessions are others.
        if any(_can_serve(node) for node in gateway.nodes if not node.drained):
            self.carefully("nginx keeps what it has", partial(change_nodes, tuple, self.folder))

    def find(self) -> None:
        """Looks up anew which addresses the names of others' nodes have."""
        gateway = find_gateway(self.folder)
        if gateway is None or not gateway.options.upstreams:
            return
        model = Path(gateway.nodes[0].archive).stem
        found = {node.run_dir: node for node in find_nodes(gateway.options.upstreams, model)}
        known = {node.run_dir: node for node in gateway.nodes}
        if not found:
            raise UserError(f"{gateway.options.upstreams} has no address; the last ones stay.")
        if found.keys() == known.keys():
            return
        for name in sorted(found.keys() ^ known.keys()):
            say(f"{name} is {'there' if name in found else 'gone'}")
        change_nodes(
            lambda nodes: [
                *(node for node in nodes if node.run_dir in found),
                *(node for name, node in found.items() if name not in known),
            ],
            self.folder,
        )

    def carefully(self, failure: str, act: Callable[[], object]) -> None:
        """Does something; says once what keeps it from being done, and goes on."""
        try:
            act()
            self._said.pop(failure, None)
        except _EXPECTED as error:
            if self._said.get(failure) != str(error):
                say(f"{failure}: {error}")
            self._said[failure] = str(error)

    def _start_again(self, node: Node) -> None:
        if not is_own(node) or find_running(Path(node.run_dir)) is not None:
            return
        starts = self.starts.setdefault(node.run_dir, Starts())
        if not starts.due():
            return
        with operation(f"the watch, which starts {node.name} again,", self.folder):
            if node.run_dir not in {n.run_dir for n in require_gateway(self.folder).nodes}:
                return
            starts.count()
            say(f"{node.name} is dead and is started again")
            try:
                start_again(node)
            finally:
                starts.over()
            change_nodes(tuple, self.folder)


def _health_of(node: Node) -> Health | Answers:
    return Answers(node) if node.address else Health(Path(node.run_dir))


def _can_serve(node: Node) -> bool:
    return bool(node.address) or find_running(Path(node.run_dir)) is not None


@dataclasses.dataclass
class Starts:
    """When a node may be started again: at once, then after pauses that double."""

    pause: float = 0.0
    last: float = -_STEADY

    def due(self) -> bool:
        """Whether the pause since the last start is over."""
        return time.monotonic() >= self.last + self.pause

    def count(self) -> None:
        """Says that it is being started."""
        steady = time.monotonic() - self.last > _STEADY
        self.pause = _FIRST_PAUSE if steady else min(2 * self.pause, _LONGEST_PAUSE)

    def over(self) -> None:
        """Says that the start is over, well or not."""
        self.last = time.monotonic()


def renew_tokens(folder: Path, before_expiry: timedelta = RENEW_BEFORE_EXPIRY) -> list[str]:
    """Renews the tokens that expire soon; returns the names of their nodes.

    A node is drained for that, since from the moment of renewal it refuses the old token; the only
    node of a gateway is not, and refuses requests for the moment that nginx needs to reload. It
    serves afterwards, whether or not it could be renewed.
    """
    gateway = find_gateway(folder)
    if gateway is None:
        return []
    renewed = []
    for run_dir in [node.run_dir for node in gateway.nodes]:
        if _expiring(run_dir, before_expiry) is None:
            continue
        name = Path(run_dir).name
        with operation(f"the watch, which renews the tokens of {name},", folder):
            # Until now somebody else may have drained this node or others, or replaced it.
            nodes = require_gateway(folder).nodes
            node = next((node for node in nodes if node.run_dir == run_dir), None)
            running = _expiring(run_dir, before_expiry)
            if node is None or running is None:
                continue
            can_wait = len(nodes) > 1 and _expiring(run_dir, LAST_CHANCE) is None
            if can_wait and not node.drained and not _others_serve(nodes, node):
                continue  # the others will be back in seconds
            if _others_serve(nodes, node):
                with drained(node.name, folder):
                    renew(running)
            else:
                try:
                    renew(running)
                finally:
                    change_nodes(tuple, folder)
        renewed.append(node.name)
        say(f"{node.name} has new tokens")
    return renewed


def _expiring(run_dir: str, before_expiry: timedelta) -> Running | None:
    """The server of this folder, if its tokens expire soon."""
    running = find_running(Path(run_dir))
    if running is None or not running.tokens or not _expires(running, before_expiry):
        return None
    return running


def _expires(running: Running, before_expiry: timedelta) -> bool:
    keys = json.loads((Path(running.temporary) / "key_file.json").read_text())
    # TorchServe writes nanoseconds, which Python 3.10 cannot read.
    first = min(keys[api]["expiration time"][:19] for api in ("inference", "management"))
    expiry = datetime.fromisoformat(first).replace(tzinfo=timezone.utc)
    return datetime.now(timezone.utc) + before_expiry >= expiry


def _others_serve(nodes: Sequence[Node], node: Node) -> bool:
    return not node.drained and any(
        other.healthy and not other.drained for other in nodes if other.run_dir != node.run_dir
    )


def renew(running: Running) -> None:
    """Has TorchServe make new tokens; the old ones are void at once.

    Raises:
        UserError: it refuses.
    """
    for api in ("management", "inference"):
        answer = requests.get(
            f"http://{HOST}:{running.ports.management}/token",
            params={"type": api},
            headers=running.authorization("API"),
            timeout=_HTTP_TIMEOUT,
        )
        if not answer.ok:
            raise UserError(f"TorchServe refuses a new token: {answer.text.strip()[:300]}")


def say(text: str) -> None:
    """Writes an event down."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": text}), flush=True)


def main(
    folder: Annotated[Path, typer.Option(help="The gateway's folder.")] = GATEWAY_DIR,
) -> None:
    """Watches until the gateway ends."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    gateway = require_gateway(folder)
    watch = Watch(folder)
    model = Path(gateway.nodes[0].archive).stem
    known = {path for path, _, _ in routes(model)}
    counting = Counting(folder / "access.log", known)

    def keep() -> None:
        while not ended.wait(SECONDS_BETWEEN_CHECKS):
            watch.carefully("nodes cannot be kept", watch.keep)

    def find() -> None:
        while not ended.wait(SECONDS_BETWEEN_CHECKS):
            watch.carefully("nodes cannot be found", watch.find)

    def check() -> None:
        watch.carefully("nodes cannot be checked", watch.check)
        watch.carefully("answers cannot be counted", counting.read)

    # Whoever asks finds an answer.
    check()
    keeper = threading.Thread(target=keep)
    # Looking names up may take seconds, which neither health nor tokens can wait for.
    threading.Thread(target=find, daemon=True).start()
    with answering(Path(gateway.sockets) / "watch.sock", watch, counting.metrics):
        keeper.start()
        while not ended.wait(SECONDS_BETWEEN_CHECKS) and _serves(gateway, folder):
            check()
        ended.set()
        # A node that is being started is ready first, or is nobody's.
        keeper.join()


def _serves(gateway: Gateway, folder: Path) -> bool:
    """Whether this gateway is still the one of the folder; not whether its file can be read."""
    return gateway.process() is not None and (folder / STATE).exists()


if __name__ == "__main__":
    command(main)
