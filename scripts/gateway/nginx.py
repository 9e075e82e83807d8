"""Runs nginx in front of the nodes, as an ordinary user.

Whoever changes which nodes serve does it with `change_nodes`, which holds a lock, writes the
configuration anew and reloads nginx without cutting a connection.
"""

import dataclasses
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from scripts.gateway.config import config
from scripts.gateway.gateway import (
    GATEWAY_DIR,
    STATE,
    Gateway,
    Node,
    Options,
    lock,
    require_gateway,
)
from scripts.gateway.keys import Key, read_keys
from scripts.state import (
    remember,
)
from scripts.terminal import UserError

# Seconds.
_START_TIMEOUT = 10.0
DRAIN_TIMEOUT = 100.0
_POLL = 0.05


def change_nodes(
    change: Callable[[tuple[Node, ...]], Sequence[Node]], folder: Path = GATEWAY_DIR
) -> set[int]:
    """Changes which nodes serve, and lets nginx know.

    Args:
        change: makes the new list from the present one.
        folder: the gateway's.

    Returns:
        processes of nginx that still work by the old list, for `wait_for_drain`.
    """
    with lock(folder):
        gateway = require_gateway(folder)
        gateway = dataclasses.replace(gateway, nodes=tuple(change(gateway.nodes)))
        # A mistake in that file keeps no node from being changed; `check_keys` says it.
        with suppress(UserError):
            gateway = dataclasses.replace(gateway, keys=keys_of(gateway.options))
        changed = write_config(gateway, folder)
        remember(folder / STATE, dataclasses.asdict(gateway))
        return _reload(gateway) if changed else set()


def check_keys(gateway: Gateway) -> None:
    """Stops, by a `UserError`, where the file of keys is not what counts."""
    try:
        keys_of(gateway.options)
    except UserError as error:
        raise UserError(f"The keys that were read last still count. {error}") from error


def keys_of(options: Options) -> tuple[Key, ...]:
    """The clients' keys; none where nobody needs one."""
    return tuple(read_keys(Path(options.keys))) if options.keys else ()


def wait_for_drain(old: set[int]) -> bool:
    """Waits until those processes have answered what they had; false where some took too long."""
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while any(psutil.pid_exists(pid) for pid in old):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def write_config(gateway: Gateway, folder: Path) -> bool:
    """Writes nginx's configuration; false where it stays as it is.

    Raises:
        UserError: nginx refuses it; the old one stays then.
    """
    path = folder / "nginx.conf"
    text = config(gateway, folder)
    if path.exists() and path.read_text() == text:
        return False
    candidate = folder / "nginx.conf.new"
    candidate.touch(mode=0o600)
    candidate.write_text(text)
    _run(candidate, folder, "-t")
    candidate.replace(path)
    return True


def start_nginx(folder: Path) -> int:
    """Starts nginx with the configuration of this folder; returns its master process."""
    # What a gateway that was cut off may have left.
    (folder / "nginx.pid").unlink(missing_ok=True)
    _run(folder / "nginx.conf", folder)
    return int(_wait_for(lambda: _read(folder / "nginx.pid"), "nginx did not start"))


def _run(path: Path, folder: Path, *arguments: str) -> None:
    log = folder.resolve() / "error.log"
    result = subprocess.run(
        ["nginx", "-c", str(path.resolve()), "-e", str(log), *arguments],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(f"nginx refuses to start: {result.stderr.strip()[-500:]}")


def _reload(gateway: Gateway) -> set[int]:
    """Has nginx read its configuration anew; returns the processes that work by the old one."""
    master = gateway.process()
    assert master is not None
    old = {child.pid for child in master.children()}
    master.send_signal(signal.SIGHUP)
    _wait_for(
        lambda: "new" if {child.pid for child in master.children()} - old else "",
        "nginx did not read its configuration anew",
    )
    return old


def _wait_for(read: Callable[[], str], failure: str) -> str:
    deadline = time.monotonic() + _START_TIMEOUT
    while not (value := read()):
        if time.monotonic() > deadline:
            raise UserError(f"{failure} within {_START_TIMEOUT:.0f} s.")
        time.sleep(_POLL)
    return value


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
