"""Start, supervise and stop TorchServe.

The folder of a server, `.run`, holds its effective configuration, its logs, copies of the served
model archives and its state file, `server.json`. Several servers can run at the same time, each
with its own folder and ports.
"""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from rich.status import Status

from scripts.serve.environment import (
    make_temporary_folder,
    server_environment,
    write_properties,
)
from scripts.serve.machine import Plan, plan_frontend, plan_workers
from scripts.serve.management import ready_per_model, wait_until
from scripts.serve.preflight import (
    METRICS_CONFIG,
    check_start,
    find_load_error,
    java_home,
    max_worker_bytes,
)
from scripts.serve.running import (
    HOST,
    MANAGEMENT_SOCKET,
    RUN_DIR,
    STATE,
    Ports,
    ServerState,
    config_path,
    delete_server_files,
    find_running,
    read_server_state,
    worker_processes,
)
from scripts.serve.upkeep import Outage, Upkeep
from scripts.serve.worker_log import frontend_error, lines_from, root_cause
from scripts.state import write_state
from scripts.store import sha256
from scripts.terminal import UserError, console, warn

CONFIG = Path("config.properties")
LOG_CONFIG = Path("deploy/torchserve/log4j2.xml")
# TorchServe cannot disable gRPC. While gRPC is off, it listens at a multicast address, to which the
# kernel accepts no connections, on any free port.
_UNREACHABLE_ADDRESS = "224.0.0.1"

# Seconds. A worker is ready after about 5 s on an idle machine.
START_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0
_SUPERVISE_INTERVAL = 0.5
# Folder below the server's folder with copies of the served model archives.
SERVING = "serving"
# Seconds: a worker's last lines reach the log after it has exited.
_LOG_DELAY = 1.0
# Name prefix of the threads that serve connections; the kernel keeps 15 characters of a name.
_EVENT_LOOP = "epollEventLoop"
_MAX_NICE = 19
# If TorchServe cannot import the archive's handler, it falls back to its own handler and does not
# log the error.
_HANDLER_NOT_IMPORTED = "ts.torch_handler."


def start(
    archive: Path,
    ports: Ports | None = None,
    workers: int | None = None,
    run_dir: Path = RUN_DIR,
    *,
    threads: int | None = None,
    grpc: bool = False,
    config: Path = CONFIG,
    log_config: Path = LOG_CONFIG,
    extra_archives: Sequence[Path] = (),
    supervised: bool = False,
) -> ServerState:
    """Start TorchServe in the background and wait until all its workers are ready.

    Args:
        archive: the model archive to serve; its folder is the model store.
        ports: where to listen.
        workers: number of workers per model; by default planned for this machine.
        run_dir: the server's folder.
        threads: CPU threads per worker; by default the CPUs divided by the workers.
        grpc: whether gRPC is reachable. Its streams let any client stop all workers.
        config: TorchServe's configuration; this function adds settings in a copy.
        log_config: the logging configuration.
        extra_archives: more archives of the same folder, each served by its own workers.
        supervised: whether a supervisor restarts the server after it stops.

    Raises:
        UserError: a port is in use, an archive cannot be used, the machine is too small, or the
            workers do not become ready. All processes are stopped; the logs are kept.
    """
    archives = [archive, *extra_archives]
    ports = ports or Ports()
    check_start(archives, ports, workers, grpc=grpc)
    bytes_per_worker = max_worker_bytes(archives)
    plan = plan_workers(workers, len(archives), bytes_per_worker)
    frontend = plan_frontend(plan, len(archives), bytes_per_worker)
    if threads is not None:
        plan = dataclasses.replace(plan, threads=threads)
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    previous = read_server_state(run_dir)
    if previous is not None and previous.process() is None:
        delete_server_files(previous, run_dir)
    # Two servers must not share a temporary folder: the names of TorchServe's sockets and pid file
    # are constant.
    try:
        temporary = str(make_temporary_folder(run_dir))
    except OSError as error:
        raise UserError(str(error)) from error
    state = ServerState(
        pid=0,  # until the frontend runs
        temporary=temporary,
        ports=ports,
        models={archive.stem: sha256(archive) for archive in archives},
        model=archive.stem,
        grpc=grpc,
        workers=plan.workers,
        supervised=supervised,
    )
    settings = _addresses(state) | {
        "load_models": ",".join(each.name for each in archives),
        "default_workers_per_model": str(plan.workers),
        "metrics_config": str(METRICS_CONFIG.resolve()),
        "job_queue_size": str(frontend.queue),
        # If an argument occurs twice, Java uses the last one.
        "vmargs": f"{_read_value('vmargs', config)} {frontend.vmargs}",
    }
    write_properties(config_path(run_dir), config.read_text("utf-8"), settings)
    model_log = logs / "model.log"
    log_size = model_log.stat().st_size if model_log.exists() else 0
    try:
        write_state(Path(temporary) / STATE, dataclasses.asdict(state))
        state = dataclasses.replace(
            state, pid=_launch(temporary, archive.parent, plan, run_dir, log_config)
        )
        write_state(run_dir / STATE, dataclasses.asdict(state))
        if ports.management is None:
            _link(state.management_socket, run_dir / MANAGEMENT_SOCKET)
        _wait_until_ready(state, archives, logs, log_size)
        lower_event_loop_priority(state.pid)
        _copy_archives(archives, run_dir / SERVING)
    except BaseException:
        stop(find_running(run_dir) or state, run_dir)
        raise
    return state


def lower_event_loop_priority(frontend: int) -> None:
    """Lower the priority of the frontend's event loops, so that rejections do not slow the workers.

    With 128 clients that retry immediately and a queue of 64, throughput fell from 30.5 to 27.5
    images per second instead of to 8. Workers do not inherit the priority, since other threads
    start them, except those that the management API adds; see `handler.densenet_handler`.

    Args:
        frontend: Java's process id.
    """
    for thread in Path(f"/proc/{frontend}/task").glob("*"):  # Linux only
        with suppress(OSError):  # the thread has exited
            if (thread / "comm").read_text().startswith(_EVENT_LOOP):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), _MAX_NICE)


def _link(target: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _copy_archives(archives: Sequence[Path], folder: Path) -> None:
    """Copy the served archives: an upgrade needs them, and the originals may be replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for archive in archives:
        shutil.copyfile(archive, folder / archive.name)


def supervise(running: ServerState, run_dir: Path = RUN_DIR) -> int:
    """Wait until the server exits, or stop it on SIGTERM or SIGINT.

    Kill workers that are suspended (SIGSTOP). Stop the server, for its supervisor to restart it, if
    its files were deleted or a model has had no ready worker for `OUTAGE_SECONDS`: without a worker
    TorchServe does not answer requests, and after 5 minutes it no longer starts workers.

    Returns:
        The exit status: 0 after a signal, 1 if the server exited by itself.
    """
    received = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: received.set())
    _notify("READY=1")
    frontend = running.process()
    upkeep = Upkeep(frontend) if frontend is not None else None
    outage = Outage()
    while upkeep is not None and running.process() is not None:
        if received.wait(_SUPERVISE_INTERVAL):
            _notify("STOPPING=1")
            stop(running, run_dir)
            return 0
        upkeep.run()
        reason = running.lost_files() or outage.check(lambda: min(ready_per_model(running)) > 0)
        if reason:
            warn(f"{reason} TorchServe stops.")
            stop(running, run_dir)
    return 1


def _notify(state: str) -> None:
    """Report a state to systemd, if that started this process (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        notify.send(state.encode())


def _addresses(state: ServerState) -> dict[str, str]:
    """Return where TorchServe listens, as settings of its configuration."""
    ports = state.ports
    management = f"http://{HOST}:{ports.management}"
    if ports.management is None:
        management = f"unix:{state.management_socket}"
    grpc_host = HOST if state.grpc else _unreachable_grpc_address()
    return {
        "inference_address": f"http://{HOST}:{ports.inference}",
        "management_address": management,
        "metrics_address": f"http://{HOST}:{ports.metrics}",
        "grpc_inference_address": grpc_host,
        "grpc_inference_port": str(ports.grpc_inference if state.grpc else 0),
        "grpc_management_address": grpc_host,
        "grpc_management_port": str(ports.grpc_management if state.grpc else 0),
    }


def _unreachable_grpc_address() -> str:
    """Return an address at which gRPC cannot be reached.

    On kernels that do not allow a process to listen at `_UNREACHABLE_ADDRESS` (macOS, gVisor), this
    is loopback, on a port that is not published.
    """
    with socket.socket() as probe:
        try:
            probe.bind((_UNREACHABLE_ADDRESS, 0))
        except OSError:
            return HOST
    return _UNREACHABLE_ADDRESS


def _read_number(key: str, config: Path) -> str:
    """Return the number that the configuration sets for a key."""
    value = _read_value(key, config)
    if not value.isdecimal():
        raise UserError(f"{config} has no {key}. Set it to a number of bytes.")
    return value


def _read_value(key: str, config: Path) -> str:
    """Return the value of a key, from the last line with that key; empty if there is none."""
    values = re.findall(rf"^{key}=(.*)$", config.read_text("utf-8"), re.MULTILINE)
    return values[-1].strip() if values else ""


def _launch(temporary: str, model_store: Path, plan: Plan, run_dir: Path, log_config: Path) -> int:
    """Start Java; return its process id."""
    logs, config = run_dir / "logs", config_path(run_dir)
    environment = server_environment(java_home(), temporary) | {
        "LOG_LOCATION": str(logs.resolve()),
        "METRICS_LOCATION": str(logs.resolve()),
        "OMP_NUM_THREADS": str(plan.threads),
        "MAX_THREADS": str(plan.max_threads),
        # Shared by all servers of this user, since their workers use the same cores.
        "BUSY_WORKERS": str(Path(tempfile.gettempdir(), f"classification-{os.getuid()}-busy")),
        # The gateway's list of requests whose clients have disconnected.
        "CANCELLED_REQUESTS": str((run_dir / "gateway" / "cancelled.log").resolve()),
        # The frontend stores bodies outside its heap; by default glibc does not free that memory.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        # TorchServe does not pass these settings to workers.
        "TS_MAX_RESPONSE_SIZE": _read_number("max_response_size", config),
        "MAX_REQUEST_BYTES": _read_number("max_request_size", config),
    }
    # Java receives this path as a URL, and the project's path may have spaces or non-ASCII letters.
    shutil.copyfile(log_config, Path(temporary) / "log4j2.xml")
    command = [
        *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
        *("--ts-config", str(config)),
        *("--log-config", str(Path(temporary) / "log4j2.xml")),
        # Not in the configuration, in which the launcher supports no escapes.
        *("--model-store", str(model_store.resolve())),
    ]
    with (logs / "console.log").open("w") as output:
        # A new session, so that Ctrl-C in this terminal does not stop the server.
        result = subprocess.run(
            command,
            env=environment,
            # TorchServe writes to its working directory.
            cwd=temporary,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    try:
        return int((Path(temporary) / ".model_server.pid").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"TorchServe did not start (exit status {result.returncode}). {frontend_error(logs)}"
        ) from error


def _wait_until_ready(
    running: ServerState, archives: Sequence[Path], logs: Path, log_size: int
) -> None:
    """Wait until all workers are ready; `log_size` is the bytes that model.log had before.

    Raises:
        UserError: the frontend or a worker exited, or the timeout has passed.
    """
    oom_kills_before = _oom_kills()
    seen: set[int] = set()
    with Status("Waiting for TorchServe ...", console=console) as status:

        def check() -> bool:
            if running.process() is None:
                raise UserError(f"TorchServe exited while it started. {frontend_error(logs)}")
            now = {process.pid for process in worker_processes(running)}
            log = logs / "model.log"
            if seen - now:
                # A worker's last lines reach the log after it has exited.
                wait_until(lambda: root_cause(lines_from(log, log_size)) is not None, _LOG_DELAY)
                reason = root_cause(lines_from(log, log_size))
                reason = _crash_reason(archives, reason, _oom_kills() > oom_kills_before)
                raise UserError(
                    f"The archive cannot be loaded: {reason.rstrip('.')}. The worker's log is "
                    f"{log}."
                )
            seen.update(now)
            ready = ready_per_model(running)
            wanted = running.workers * len(ready)
            status.update(f"Waiting for TorchServe: {sum(ready)} of {wanted} workers ready ...")
            return min(ready) >= running.workers

        if not wait_until(check, START_TIMEOUT):
            raise UserError(
                f"No {running.workers} workers were ready after {START_TIMEOUT:.0f} s. "
                f"{frontend_error(logs)}"
            )


def _crash_reason(archives: Sequence[Path], logged: str | None, killed_by_kernel: bool) -> str:
    """Return why a worker exited, from its log or by loading the archives again."""
    if killed_by_kernel:
        return logged or "the kernel killed a process because memory ran out; try WORKERS=1"
    if logged is not None and _HANDLER_NOT_IMPORTED not in logged:
        return logged
    errors = filter(None, map(find_load_error, archives))
    return next(errors, logged) or "its worker exited and logged no error, as if it was killed"


def _oom_kills() -> int:
    """Return how many processes the kernel's OOM killer has killed on this machine."""
    try:
        counters = Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def stop(running: ServerState, run_dir: Path = RUN_DIR) -> None:
    """Stop the server and its workers. TorchServe does not drain: requests in flight fail."""
    frontend = running.process()
    if frontend is not None:
        try:
            processes = [*frontend.children(recursive=True), frontend]
            frontend.terminate()
        except psutil.NoSuchProcess:
            processes = []  # it has just exited
        _, left = psutil.wait_procs(processes, timeout=STOP_TIMEOUT)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT)
    delete_server_files(running, run_dir)
