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
from scripts.gateway.config import DRAIN_SECONDS, default_upstreams, render
from scripts.gateway.options import Options
from scripts.serve.management import wait_until
from scripts.serve.running import RUN_DIR, ServerState, find_running
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


def start(options: Options, folder: Path = GATEWAY_DIR) -> None:
    """Start nginx in the background.

    Args:
        options: complete and checked options.
        folder: the folder of nginx's files.

    Raises:
        UserError: no server is running, or nginx rejects the configuration.
    """
    prepare(options, folder)
    run_nginx(folder / "nginx.conf", folder)
    _require(lambda: find(folder) is not None, "nginx did not start")


def prepare(options: Options, folder: Path) -> None:
    """Prepare the folder of a gateway that is about to start."""
    if wrong := set('"$\\') & set(str(folder.resolve())):
        raise UserError(
            f"nginx cannot use a folder with {wrong.pop()} in its path: {folder.resolve()}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nginx.pid").unlink(missing_ok=True)
    _rotate_logs(folder)
    write_config(options, folder)
    write_state(folder / STATE, dataclasses.asdict(options))


def write_config(
    options: Options, folder: Path, upstreams: Sequence[tuple[str, int]] | None = None
) -> None:
    """Write nginx.conf if nginx accepts it; otherwise keep the previous one.

    Args:
        options: the gateway's options.
        folder: the gateway's folder.
        upstreams: override the configured ones.

    Raises:
        UserError: nginx rejects it, the API keys cannot be read, or no server is running.
    """
    if upstreams is None:
        upstreams = default_upstreams(options, _port_of(folder.parent, options))
    candidate = folder / "nginx.conf.new"
    candidate.touch(mode=0o600)
    # Paths are bytes, independent of the locale.
    candidate.write_bytes(os.fsencode(render(options, folder, upstreams)))
    run_nginx(candidate, folder, "-t")
    openapi.write(folder, openapi.describe("gateway", [options.model], options.prefix))
    candidate.replace(folder / "nginx.conf")


def _rotate_logs(folder: Path) -> None:
    """Rename long logs, keeping one old file each; nginx opens new ones at its start or reload."""
    for log in (folder / "access.log", folder / "error.log"):
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))


def _port_of(run_dir: Path, options: Options) -> int:
    if options.upstreams:
        return 0
    return require_upstream(run_dir).ports.inference


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
    options: Options, folder: Path = GATEWAY_DIR, upstreams: Sequence[tuple[str, int]] | None = None
) -> None:
    """Apply the options, API keys, certificate and upstreams, and drain the old processes.

    The old processes of nginx answer the requests in flight; wait until they have exited.

    Args:
        options: the gateway's options.
        folder: the gateway's folder.
        upstreams: override the configured ones.

    Raises:
        UserError: the configuration is rejected, and the previous one is kept; or the gateway is
            not running.
    """
    master = require(folder)
    write_config(options, folder, upstreams)
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
        raise UserError("The gateway is not running. Start it with: make gateway")
    return master


def read_options(folder: Path = GATEWAY_DIR) -> Options:
    """Return the options of the gateway that was started last.

    Raises:
        UserError: there was none, or its state file cannot be parsed.
    """
    values = read_state(folder / STATE)
    if values is None:
        raise UserError("The gateway is not running. Start it with: make gateway")
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


def run_nginx(config: Path, folder: Path, *arguments: str) -> None:
    """Run nginx's command line.

    Raises:
        UserError: it fails.
    """
    done = subprocess.run(
        nginx_command(config, folder, *arguments),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"nginx failed: {' '.join(done.stderr.split())[-500:]}")


def nginx_command(config: Path, folder: Path, *arguments: str) -> list[str]:
    """Return nginx's command line; early errors are logged to the folder's error.log."""
    log = folder.resolve() / "error.log"
    return ["nginx", "-c", str(config.resolve()), "-e", str(log), *arguments]


def replace_process(folder: Path) -> None:
    """Replace this process with nginx in the foreground (exec)."""
    command = [*nginx_command(folder / "nginx.conf", folder)[:-1], "stderr"]
    os.execvp(command[0], command)


def _require(check: Callable[[], bool], failure: str) -> None:
    if not wait_until(check, _START_TIMEOUT):
        raise UserError(f"{failure} within {_START_TIMEOUT:.0f} s.")
