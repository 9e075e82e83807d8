"""Watches the nodes behind a gateway: takes out those that cannot answer, renews their tokens.

`make gateway` starts it, `make gateway-stop` ends it. nginx itself notices a node that refuses or
breaks off, and asks another; this notices one that hangs, or whose workers are gone.
"""

import dataclasses
import json
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated

import requests
import typer

from scripts.cluster import drain, undrain
from scripts.gateway import GATEWAY_DIR, Gateway, Node, change_nodes, find_gateway
from scripts.server import HOST, Running, find_running, ready_workers
from scripts.terminal import UserError, command

SECONDS_BETWEEN_CHECKS = 1.0
# A node goes after so many checks that failed one after the other, and comes back with the first
# that succeeds.
CHECKS_THAT_FAIL = 2
# TorchServe's tokens are good for an hour, unless token_expiration_min says otherwise.
RENEW_BEFORE_EXPIRY = timedelta(minutes=20)
_CHECK_TIMEOUT = 2.0
_HTTP_TIMEOUT = 10.0


def check_health(folder: Path, failures: Counter[str]) -> None:
    """Asks every node once whether a worker is ready, and lets the gateway know of changes.

    Args:
        folder: the gateway's.
        failures: for each node how many checks failed one after the other; is kept up to date.
    """
    gateway = find_gateway(folder)
    if gateway is None:
        return
    for node in gateway.nodes:
        failures[node.run_dir] = 0 if _answers(node) else failures[node.run_dir] + 1
    healthy = {n.run_dir: failures[n.run_dir] < CHECKS_THAT_FAIL for n in gateway.nodes}
    for node in gateway.nodes:
        if node.healthy != healthy[node.run_dir]:
            _say(f"{node.name} is {'healthy' if healthy[node.run_dir] else 'unhealthy'}")
    if any(node.healthy != healthy[node.run_dir] for node in gateway.nodes):
        change_nodes(
            lambda nodes: [
                dataclasses.replace(node, healthy=healthy.get(node.run_dir, node.healthy))
                for node in nodes
            ],
            folder,
        )


def _answers(node: Node) -> bool:
    running = find_running(Path(node.run_dir))
    return running is not None and ready_workers(running, timeout=_CHECK_TIMEOUT) > 0


def renew_tokens(folder: Path, before_expiry: timedelta = RENEW_BEFORE_EXPIRY) -> list[str]:
    """Renews the tokens that expire soon; returns the names of their nodes.

    A node is drained for that, since from the moment of renewal it refuses the old token; the only
    node of a gateway is not, and refuses requests for the moment that nginx needs to reload.
    """
    gateway = find_gateway(folder)
    if gateway is None:
        return []
    renewed = []
    for node in gateway.nodes:
        running = find_running(Path(node.run_dir))
        if running is None or not running.tokens or not _expires(running, before_expiry):
            continue
        if _others_serve(gateway, node):
            drain([node.name], folder)
            renew(running)
            undrain(node.name, folder)
        else:
            renew(running)
            change_nodes(lambda nodes: nodes, folder)
        renewed.append(node.name)
        _say(f"{node.name} has new tokens")
    return renewed


def _expires(running: Running, before_expiry: timedelta) -> bool:
    keys = json.loads((Path(running.temporary) / "key_file.json").read_text())
    # TorchServe writes nanoseconds, which Python 3.10 cannot read.
    first = min(keys[api]["expiration time"][:19] for api in ("inference", "management"))
    expiry = datetime.fromisoformat(first).replace(tzinfo=timezone.utc)
    return datetime.now(timezone.utc) + before_expiry >= expiry


def _others_serve(gateway: Gateway, node: Node) -> bool:
    return not node.drained and any(
        other.healthy and not other.drained for other in gateway.nodes if other != node
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


def _say(text: str) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": text}), flush=True)


def main(
    folder: Annotated[Path, typer.Option(help="The gateway's folder.")] = GATEWAY_DIR,
) -> None:
    """Watches until the gateway ends."""
    failures: Counter[str] = Counter()
    while not (folder / "gateway.json").exists():
        time.sleep(SECONDS_BETWEEN_CHECKS)
    while find_gateway(folder) is not None:
        try:
            check_health(folder, failures)
            renew_tokens(folder)
        except (UserError, requests.RequestException, OSError, ValueError) as error:
            _say(f"a check failed: {error}")
        time.sleep(SECONDS_BETWEEN_CHECKS)


if __name__ == "__main__":
    command(main)
