"""Starts, stops, scales and watches a TorchServe of this project's own.

All that a running server needs beside the archive is in one folder, `.run`: its effective
configuration, its logs and `server.json`, which says which process it is. Several servers live
beside one another with a folder and ports each.
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
from pathlib import Path

import psutil
from rich.status import Status

from scripts.serve.machine import WORKER_BYTES, Plan, plan, worker_bytes
from scripts.serve.management import poll, ready_workers
from scripts.serve.preflight import (
    check_archives,
    check_ports,
    check_workers,
    java_home,
    why_not_loaded,
)
from scripts.serve.running import (
    FRONTEND,
    HOST,
    RUN_DIR,
    STATE,
    Ports,
    Running,
    config_of,
    forget_server,
    last_started,
    worker_processes,
)
from scripts.serve.worker_log import NewLines, cause, last_words, says_died
from scripts.state import (
    process_of,
    remember,
    started,
)
from scripts.store import read_card, sha256
from scripts.terminal import UserError, console

CONFIG = Path("config.properties")
LOG_CONFIG = Path("log4j2.xml")
METRICS_CONFIG = Path("metrics.yaml")
# Where TorchServe's gRPC listens while nobody asked for it, since it cannot be told not to listen:
# a multicast address, from which the kernel never answers a connection, and any free port.
_NOWHERE = "224.0.0.1"

# Seconds. A worker is ready after about 5 s on an idle machine.
START_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0
_SUPERVISE_INTERVAL = 0.5
# In the server's folder: the archives that it serves.
SERVING = "serving"
# The log comes later than what it tells of.
_LOG_DELAY = 1.0


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
    beside: Sequence[Path] = (),
    supervised: bool = False,
) -> Running:
    """Starts TorchServe in the background and waits until all its workers are ready.

    Args:
        archive: the `.mar` to serve; its folder is the model store.
        ports: where to listen.
        workers: how many for each model; None for as many as suit the machine.
        run_dir: the server's folder.
        threads: CPU threads of one worker; None for the CPUs divided by the workers.
        grpc: whether it can be reached over gRPC, by whose streams any client can end all workers.
        config: TorchServe's configuration, to which this start adds what it decides.
        log_config: what is logged.
        beside: more archives of the same folder, each served by workers of its own.
        supervised: whether something starts it again after it stopped.

    Raises:
        UserError: a port is taken, Java or the archive cannot be used, the machine is too small, or
            no worker gets ready. Nothing is left running then; the logs are kept.
    """
    ports = ports or Ports()
    archives = [archive, *beside]
    check_start(archives, ports, workers, grpc=grpc)
    chosen = plan(workers, len(archives), _heaviest(archives))
    if threads is not None:
        chosen = dataclasses.replace(chosen, threads=threads)
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    dead = last_started(run_dir)
    if dead is not None and dead.process() is None:
        forget_server(dead, run_dir)
    decided = _decided_at_start(archives, ports, chosen, grpc=grpc)
    # The last line of a key counts.
    (run_dir / "config.properties").write_text(config.read_text() + decided)
    # TorchServe names its sockets and its process file after nothing but the temporary folder:
    # two servers must not share one. The path is short, since a socket's must be.
    temporary = tempfile.mkdtemp(prefix="torchserve-")
    models = {archive.stem: sha256(archive) for archive in archives}
    unborn = Running(
        *(0, "", temporary, ports, models, archives[0].stem, grpc),
        workers=chosen.workers,
        supervised=supervised,
    )
    model_log = NewLines(logs / "model.log")
    try:
        remember(Path(temporary) / STATE, dataclasses.asdict(unborn))
        running = _launch(unborn, archives[0].parent, chosen, run_dir, log_config)
    except BaseException:
        orphan = process_of(FRONTEND, str(config_of(run_dir)))
        if orphan is not None:
            orphan.kill()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        remember(run_dir / STATE, dataclasses.asdict(running))
        _wait_until_ready(running, archives, chosen.workers, logs, model_log)
        _keep(archives, run_dir / SERVING)
    except BaseException:
        stop(running, run_dir)
        raise
    return running


def _keep(archives: Sequence[Path], folder: Path) -> None:
    """Keep copies of what is served: the files may be replaced, and an upgrade needs them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for archive in archives:
        shutil.copyfile(archive, folder / archive.name)


def supervise(running: Running, run_dir: Path = RUN_DIR) -> int:
    """Wait until the server stops, or stop it on SIGTERM or SIGINT.

    Returns:
        the exit status: 0 after a signal, 1 if the server stopped by itself.
    """
    received = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: received.set())
    _notify("READY=1")
    while running.process() is not None:
        if received.wait(_SUPERVISE_INTERVAL):
            _notify("STOPPING=1")
            stop(running, run_dir)
            return 0
    return 1


def _notify(state: str) -> None:
    """Report to systemd, if it started this process (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        notify.send(state.encode())


def check_start(
    archives: Sequence[Path],
    ports: Ports,
    workers: int | None,
    *,
    grpc: bool = False,
    instead_of: Running | None = None,
) -> None:
    """Checks all that can be known before a start.

    Args:
        archives: what to serve; none of them where that is not known yet.
        ports: where to listen.
        workers: how many for each model.
        grpc: whether gRPC will be reachable.
        instead_of: a server that ends before this one starts.

    Raises:
        UserError: an archive, a port, Java, or the number of workers cannot be used.
    """
    java_home()
    held: list[int] = []
    ending = 0
    if instead_of is not None:
        held = list(instead_of.ports.used(grpc=instead_of.grpc).values())
        ending = len(worker_processes(instead_of))
    check_ports(HOST, ports.used(grpc=grpc), held)
    check_workers(workers, max(1, len(archives)), ending, _heaviest(archives))
    check_archives(archives)


def _heaviest(archives: Sequence[Path]) -> int:
    """The most memory, in bytes, that a worker of one of them may take."""
    cards = [card for card in map(read_card, archives) if card is not None]
    return max((worker_bytes(card.precision) for card in cards), default=WORKER_BYTES)


def _decided_at_start(archives: Sequence[Path], ports: Ports, chosen: Plan, *, grpc: bool) -> str:
    return (
        "\n# --- Decided at start ---\n"
        f"inference_address=http://{HOST}:{ports.inference}\n"
        f"management_address=http://{HOST}:{ports.management}\n"
        f"metrics_address=http://{HOST}:{ports.metrics}\n"
        f"grpc_inference_address={HOST if grpc else _nowhere()}\n"
        f"grpc_inference_port={ports.grpc_inference if grpc else 0}\n"
        f"grpc_management_address={HOST if grpc else _nowhere()}\n"
        f"grpc_management_port={ports.grpc_management if grpc else 0}\n"
        f"model_store={archives[0].parent.resolve()}\n"
        f"load_models={','.join(archive.name for archive in archives)}\n"
        f"default_workers_per_model={chosen.workers}\n"
        f"metrics_config={METRICS_CONFIG.resolve()}\n"
    )


def _nowhere() -> str:
    """Where gRPC cannot be reached; loopback, at a port that nobody is told, where this kernel does
    not let anybody listen there (macOS, gVisor).
    """
    with socket.socket() as probe:
        try:
            probe.bind((_NOWHERE, 0))
        except OSError:
            return HOST
    return _NOWHERE


def _configured(key: str, config: Path) -> str:
    """A key's value in the configuration; the last line of a key counts."""
    values = re.findall(rf"^{key}=(\d+)\s*$", config.read_text(), re.MULTILINE)
    if not values:
        raise UserError(f"{CONFIG} says nothing of {key}; a number of bytes is needed.")
    value: str = values[-1]
    return value


def _launch(
    unborn: Running, model_store: Path, chosen: Plan, run_dir: Path, log_config: Path
) -> Running:
    """Starts Java; gives back `unborn` with the process that it became."""
    logs = run_dir / "logs"
    temporary = unborn.temporary
    environment = {
        **os.environ,
        "JAVA_HOME": java_home(),
        "TMPDIR": temporary,
        "TEMP": temporary,
        "LOG_LOCATION": str(logs.resolve()),
        "METRICS_LOCATION": str(logs.resolve()),
        "OMP_NUM_THREADS": str(chosen.threads),
        "MAX_THREADS": str(chosen.max_threads),
        # The frontend receives bodies outside its heap, in blocks that glibc would keep for later.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        # TorchServe does not tell its workers; the handler keeps its answers below it.
        "TS_MAX_RESPONSE_SIZE": _configured("max_response_size", config_of(run_dir)),
    }
    # A module path of the user's could put other modules before the archive's own.
    environment.pop("PYTHONPATH", None)
    command = [
        *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
        *("--ts-config", str(config_of(run_dir))),
        *("--log-config", str(log_config.resolve())),
        *("--model-store", str(model_store.resolve())),
    ]
    with (logs / "console.log").open("w") as output:
        # A session of its own: Ctrl-C in this terminal is for this command, not for the server.
        result = subprocess.run(
            command,
            env=environment,
            # TorchServe writes into the folder in which it is started.
            cwd=temporary,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    try:
        pid = int((Path(temporary) / ".model_server.pid").read_text())
        return dataclasses.replace(unborn, pid=pid, started=started(pid))
    except (OSError, ValueError, psutil.NoSuchProcess) as error:
        raise UserError(
            f"TorchServe did not start (exit status {result.returncode}). {last_words(logs)}"
        ) from error


def _wait_until_ready(
    running: Running, archives: Sequence[Path], workers: int, logs: Path, model_log: NewLines
) -> None:
    """Raises `UserError` as soon as a worker ends, which a sound one never does."""
    killed_before = _killed_for_memory()
    seen: set[int] = set()
    with Status("Waiting for TorchServe ...", console=console) as status:

        def check() -> bool:
            if running.process() is None:
                raise UserError(f"TorchServe ended while it started. {last_words(logs)}")
            now = {process.pid for process in worker_processes(running)}
            if seen - now or says_died(model_log.read()):
                reason = _why_it_died(archives, model_log, killed_before)
                raise UserError(
                    f"The archive cannot be loaded: {reason.rstrip('.')}. The worker's log is "
                    f"{logs / 'model.log'}."
                )
            seen.update(now)
            ready = [ready_workers(running.serving(model)) for model in running.models]
            wanted = workers * len(ready)
            status.update(f"Waiting for TorchServe: {sum(ready)} of {wanted} workers ready ...")
            return min(ready) >= workers

        if not poll(check, START_TIMEOUT):
            raise UserError(
                f"No {workers} workers were ready after {START_TIMEOUT:.0f} s. {last_words(logs)}"
            )


def _why_it_died(archives: Sequence[Path], model_log: NewLines, killed_before: int) -> str:
    poll(lambda: cause(model_log.read()) is not None, _LOG_DELAY)
    reason = cause(model_log.read())
    if _killed_for_memory() > killed_before:
        return reason or "the kernel killed a process for want of memory; try WORKERS=1"
    if reason is not None and _HANDLER_NOT_IMPORTED not in reason:
        return reason
    # Loading it once more tells more than the log.
    again = (why_not_loaded(archive, 1, METRICS_CONFIG) for archive in archives)
    found = next((why for why in again if why is not None), reason)
    return found or "its worker ended without a word, as when somebody kills it"


# TorchServe looks for a handler of its own where the archive's cannot be imported, and forgets why.
_HANDLER_NOT_IMPORTED = "ts.torch_handler."


def _killed_for_memory() -> int:
    """How many processes the kernel has killed on this machine for want of memory."""
    try:
        counters = Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def stop(running: Running, run_dir: Path = RUN_DIR) -> None:
    """Ends the server and its workers. TorchServe cuts what is in flight."""
    frontend = running.process()
    if frontend is not None:
        try:
            processes = [*frontend.children(recursive=True), frontend]
            frontend.terminate()
        except psutil.NoSuchProcess:
            processes = []  # it has just ended
        _, left = psutil.wait_procs(processes, timeout=STOP_TIMEOUT)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT)
    forget_server(running, run_dir)
