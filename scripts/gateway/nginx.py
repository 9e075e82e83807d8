"""Start, reload and stop the gateway's nginx, without root privileges.

All files are in one folder, `.run/gateway`. The state file, `gateway.json`, stores the options for
reloads.
"""

import dataclasses
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from scripts.gateway import openapi
from scripts.gateway.config import DRAIN_SECONDS, render
from scripts.gateway.options import Options, read_upstreams
from scripts.serve.management import wait_until
from scripts.serve.running import HOST, RUN_DIR, ServerState, find_running
from scripts.state import (
    delete_state,
    process_by_arguments,
    read_state,
    unreadable_state,
    write_state,
)
from scripts.terminal import UserError

GATEWAY_DIR = RUN_DIR / "gateway"
STATE = "gateway.json"
# Seconds.
_START_TIMEOUT = 10.0
_DRAIN_TIMEOUT = DRAIN_SECONDS + 10.0
# A longer log is rotated. This is about 200,000 requests.
_MAX_LOG_BYTES = 64 << 20
_NOT_RUNNING = "The gateway is not running. Start it with: make gateway"


def start(options: Options, folder: Path = GATEWAY_DIR) -> None:
    """Start nginx in the background, or replace this process by it (`foreground`).

    Raises:
        UserError: no server is running, or nginx rejects the configuration.
    """
    if wrong := set('"$\\') & set(str(folder.resolve())):
        raise UserError(
            f"nginx cannot use a folder with {wrong.pop()} in its path: {folder.resolve()}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nginx.pid").unlink(missing_ok=True)
    _rotate_logs(folder)
    _write_config(options, folder)
    write_state(folder / STATE, dataclasses.asdict(options))
    config = folder / "nginx.conf"
    if options.foreground:
        os.execvp("nginx", ["nginx", "-c", str(config.resolve()), "-e", "stderr"])
    _run_nginx(config)
    _require(lambda: find(folder) is not None, "nginx did not start")


def _write_config(options: Options, folder: Path, upstreams: Sequence[str] | None = None) -> None:
    """Write nginx.conf if nginx accepts it; otherwise keep the previous one."""
    upstreams = upstreams or read_upstreams(options.upstreams)
    if not upstreams:
        upstreams = [f"{HOST}:{require_upstream(folder.parent).ports.inference}"]
    candidate = folder / "nginx.conf.new"
    candidate.touch(mode=0o600)
    # Paths are bytes, independent of the locale.
    candidate.write_bytes(os.fsencode(render(options, folder, upstreams)))
    _run_nginx(candidate, "-t")
    openapi.write(folder, openapi.describe("gateway", [options.model], options.prefix))
    candidate.replace(folder / "nginx.conf")


def _rotate_logs(folder: Path) -> None:
    """Rename long logs, keeping one old file each; nginx opens new ones at its start or reload."""
    for log in (folder / "access.log", folder / "error.log"):
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))


def require_upstream(run_dir: Path = RUN_DIR) -> ServerState:
    """Return the running server that is the gateway's upstream.

    Raises:
        UserError: none is running.
    """
    running = find_running(run_dir)
    if running is None:
        raise UserError(
            "TorchServe is not running. Run make run or make start first, or set UPSTREAMS."
        )
    return running


def reload(
    options: Options, folder: Path = GATEWAY_DIR, upstreams: Sequence[str] | None = None
) -> None:
    """Apply the options, API keys, certificate and upstreams, and drain the old processes.

    The old processes of nginx answer the requests in flight; wait until they have exited.
    `upstreams` (HOST:PORT) override the configured ones.

    Raises:
        UserError: the configuration is rejected, and the previous one is kept; or the gateway is
            not running.
    """
    master = require(folder)
    _write_config(options, folder, upstreams)
    _rotate_logs(folder)
    old = {child.pid for child in master.children()}
    master.send_signal(signal.SIGHUP)
    _require(
        lambda: bool({child.pid for child in master.children()} - old),
        "nginx did not reload its configuration",
    )
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in old), _DRAIN_TIMEOUT)


def stop(folder: Path = GATEWAY_DIR) -> bool:
    """Drain and stop nginx; return false if it was not running."""
    master = find(folder)
    if master is None:
        return False
    master.send_signal(signal.SIGQUIT)
    _, slow = psutil.wait_procs([master], timeout=_DRAIN_TIMEOUT)
    for process in slow:
        process.terminate()
    delete_state(folder / STATE)
    return True


def find(folder: Path = GATEWAY_DIR) -> psutil.Process | None:
    """Return nginx's master process, even if its folder was removed; None if it is not running."""
    return process_by_arguments("nginx:", "master", str(folder.resolve() / "nginx.conf"))


def require(folder: Path = GATEWAY_DIR) -> psutil.Process:
    """Return nginx's master process.

    Raises:
        UserError: it is not running.
    """
    master = find(folder)
    if master is None:
        raise UserError(_NOT_RUNNING)
    return master


def read_options(folder: Path = GATEWAY_DIR) -> Options:
    """Return the options of the gateway that was started last.

    Raises:
        UserError: there was none, or its state file cannot be parsed.
    """
    values = read_state(folder / STATE)
    if values is None:
        raise UserError(_NOT_RUNNING)
    try:
        return Options(**values)
    except TypeError as error:
        raise unreadable_state(folder / STATE) from error


@contextmanager
def lock(folder: Path = GATEWAY_DIR) -> Iterator[None]:
    """Hold the lock on reloads of the gateway; the kernel releases it if this process dies.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("Another upgrade, rollback or gateway-reload is running.") from error
        yield


def _run_nginx(config: Path, *arguments: str) -> None:
    """Run nginx's command line; early errors are logged to error.log in its folder."""
    log = config.resolve().with_name("error.log")
    done = subprocess.run(
        ["nginx", "-c", config.resolve(), "-e", log, *arguments],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"nginx failed: {' '.join(done.stderr.split())[-500:]}")


def _require(check: Callable[[], bool], failure: str) -> None:
    if not wait_until(check, _START_TIMEOUT):
        raise UserError(f"{failure} within {_START_TIMEOUT:.0f} s.")
