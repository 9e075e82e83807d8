"""Starts and ends the gateway: nginx, and the watch over its nodes."""

import dataclasses
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from scripts.gateway.certificate import check_certificate, with_certificate
from scripts.gateway.config import is_loopback, write_sign_in_pages
from scripts.gateway.gateway import (
    GATEWAY_DIR,
    STATE,
    Gateway,
    Node,
    Options,
    lock,
    require_gateway,
)
from scripts.gateway.nginx import DRAIN_TIMEOUT, keys_of, start_nginx, write_config
from scripts.serve.preflight import check_ports
from scripts.state import (
    forget,
    process_of,
    remember,
    started,
)
from scripts.terminal import UserError


def start(
    options: Options, nodes: Sequence[Node], folder: Path = GATEWAY_DIR, *, watch: bool = True
) -> Gateway:
    """Starts nginx in front of the nodes, and the watch over them.

    Raises:
        UserError: nginx is missing or refuses its configuration, or the options are unsafe.
    """
    check(options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = with_certificate(options, folder)
    (folder / "ready.json").write_text('{"success":true,"status":"ready"}\n')
    sockets = tempfile.mkdtemp(prefix="gateway-")
    keys = keys_of(options)
    gateway = Gateway(0, "", sockets, options, tuple(nodes), secrets.token_hex(), keys=keys)
    try:
        write_sign_in_pages(folder)
        write_config(gateway, folder)
        pid = start_nginx(folder)
        gateway = dataclasses.replace(gateway, pid=pid, started=started(pid))
        # Before the watch starts, which ends where there is no gateway.
        remember(folder / STATE, dataclasses.asdict(gateway))
        if watch:
            gateway = start_watch(gateway, folder)
    except BaseException:
        stop_lost(find_lost(folder))
        forget(folder / STATE)
        shutil.rmtree(sockets, ignore_errors=True)
        raise
    return gateway


def start_watch(gateway: Gateway, folder: Path) -> Gateway:
    """Starts the watch; returns the gateway as it is remembered then."""
    pid = _spawn_watch(folder)
    gateway = dataclasses.replace(gateway, watch_pid=pid, watch_started=started(pid))
    with lock(folder):
        # The watch may have changed the nodes already.
        gateway = dataclasses.replace(gateway, nodes=require_gateway(folder).nodes)
        remember(folder / STATE, dataclasses.asdict(gateway))
    return gateway


def stop(gateway: Gateway, folder: Path = GATEWAY_DIR) -> None:
    """Ends the watch and nginx; requests in hand are answered first."""
    _end(gateway.watch(), signal.SIGTERM)
    _end(gateway.process(), signal.SIGQUIT)
    shutil.rmtree(gateway.sockets, ignore_errors=True)
    forget(folder / STATE)


def find_lost(folder: Path = GATEWAY_DIR) -> list[psutil.Process]:
    """The watch and nginx of this folder, by what they run: for when the folder was removed."""
    place = folder.resolve()
    found = (
        process_of("scripts.gateway.watch", str(place)),
        process_of("nginx", "-c", f"{place}/nginx.conf"),
    )
    return [process for process in found if process is not None]


def stop_lost(processes: Iterable[psutil.Process]) -> None:
    """Ends what `find_lost` found; nginx answers first what it has."""
    for process in processes:
        _end(process, signal.SIGQUIT if process.name() == "nginx" else signal.SIGTERM)


def _end(process: psutil.Process | None, sign: signal.Signals) -> None:
    if process is None:
        return
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:
        return
    _, left = psutil.wait_procs([process], timeout=DRAIN_TIMEOUT)
    for slow in left:
        slow.terminate()


def check(options: Options, folder: Path = GATEWAY_DIR) -> None:
    """Stops, by a `UserError`, what cannot work or would not be safe; starts nothing."""
    if shutil.which("nginx") is None:
        raise UserError("nginx is missing. Install it (on Debian and Ubuntu: apt install nginx).")
    if not is_loopback(options) and not options.keys:
        raise UserError(
            f"{options.published or options.host} can be reached by others, and nobody would need "
            "a key. Give a file of keys with KEYS=file: a line a client, its name and a key of 16 "
            "or more letters and digits."
        )
    for name in ("rate", "burst", "connections", "timeout"):
        if getattr(options, name) < 1:
            raise UserError(f"{name.upper()} must be 1 or more, got {getattr(options, name)}.")
    keys_of(options)
    check_certificate(options)
    lost = find_lost(folder)
    if lost:
        raise UserError(
            f"A gateway of {folder} still runs (process {lost[-1].pid}), though its folder was "
            "removed or changed. End it with: make gateway-stop"
        )
    ports = {
        "http": options.http_port,
        "https": options.https_port,
        "metrics": options.metrics_port,
    }
    check_ports(options.host, ports, held=[options.metrics_port])
    check_ports(options.metrics_host, {"metrics": options.metrics_port})


def _spawn_watch(folder: Path) -> int:
    """Starts the watch in a session of its own, so that Ctrl-C in this terminal does not end it."""
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "scripts.gateway.watch", "--folder", str(folder.resolve())],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(folder / "watch.log"), appending, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
