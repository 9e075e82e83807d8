"""The Deployment's pods on podman, behind the gateway's container.

`podman kube play` runs the Deployment of `deploy/kubernetes` without what podman does not support.
The tests start and stop pods, as a control plane would. Pods and gateway have their own network,
and clients connect to a port on loopback.
"""

import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from scripts.container.engine import Engine
from scripts.serve.management import wait_until
from scripts.serve.running import unused_ports
from scripts.store import PACKAGED_ARCHITECTURE
from scripts.terminal import UserError
from tests.deploy.manifests import overlay

# Prefix of all names.
_LABEL = "densenet-test"
_GATEWAY = f"{_LABEL}-gateway"
# Resolves to the addresses of all pods, as the headless Service in Kubernetes.
_NODES = "densenet-nodes"
# As in deploy/kubernetes/overlays/gateway: keepalive notices a lost network within 9 s.
_SYSCTLS = {"time": 5, "intvl": 2, "probes": 2}
# Seconds: grace periods as in deploy/kubernetes, and for a start on a busy machine.
_STOP_SECONDS = 45
_GATEWAY_STOP_SECONDS = 105
_PATIENCE = 180.0
_CUT_SECONDS = 15.0
# podman 4.3 supports no topology, publishes each port of a container on all addresses of this
# machine, and runs probes with systemd.
_UNSUPPORTED = ("ports", "startupProbe", "readinessProbe", "livenessProbe")


@dataclass
class Pods:
    """Pods of the Deployment and the gateway in front of them.

    Attributes:
        engine: podman.
        folder: for manifests.
        url: of the gateway.
        running: names of the pods, oldest first.
    """

    engine: Engine
    folder: Path
    url: str = ""
    running: list[str] = field(default_factory=list)
    _started: int = 0

    def start(self, image: str) -> None:
        """Start a pod and wait until it is ready, as a rollout does before it stops another."""
        self._started += 1
        name = f"{_LABEL}-{self._started}"
        manifest = self.folder / f"{name}.yaml"
        manifest.write_text(yaml.safe_dump(_deployment(name, image)))
        network = f"--network={_LABEL}:alias={_NODES}"
        self.engine.run("kube", "play", network, str(manifest), timeout=_PATIENCE)
        self.running.append(f"{name}-pod-0")
        self.wait_until_ready(self.running[-1])

    def wait_until_ready(self, pod: str) -> None:
        """Wait until the readiness probe passes."""

        def ready() -> bool:
            try:
                return _responds(f"http://{self.address(pod)}:8080/ping")
            except (UserError, KeyError):  # it has no address
                return False

        if not wait_until(ready, _PATIENCE):
            logs = self.engine.run_unchecked("logs", "--tail", "40", f"{pod}-torchserve").stdout
            raise AssertionError(f"{pod} is not ready after {_PATIENCE:.0f} s: {logs}")

    def stop(self, pod: str) -> None:
        # As in Kubernetes the pod keeps its network until the container has exited; `podman pod
        # stop` would remove it at once.
        seconds = str(_STOP_SECONDS)
        self.engine.run("stop", "-t", seconds, f"{pod}-torchserve", timeout=_PATIENCE)
        self.engine.run("pod", "rm", "-f", pod, timeout=_PATIENCE)
        self.running.remove(pod)

    def address(self, pod: str) -> str:
        asked = ("pod", "inspect", "--format", "{{.InfraContainerID}}", pod)
        infra = self.engine.run(*asked, timeout=_PATIENCE).stdout.strip()
        networks = self.engine.inspect("container", infra)["NetworkSettings"]["Networks"]
        return str(networks[_LABEL]["IPAddress"])

    def process(self, pod: str) -> int:
        return int(self.engine.inspect("container", f"{pod}-torchserve")["State"]["Pid"])

    def start_gateway(self, *command: str) -> None:
        """Run the gateway, and wait until it reports that a worker is ready."""
        self.engine.run(*(command or ("start", _GATEWAY)), timeout=_PATIENCE)
        if not wait_until(lambda: _responds(f"{self.url}/readyz"), _PATIENCE):
            logs = self.engine.run_unchecked("logs", _GATEWAY)
            raise AssertionError(f"The gateway is not ready: {logs.stdout}{logs.stderr}")

    def stop_gateway(self) -> None:
        self.engine.run("stop", "-t", str(_GATEWAY_STOP_SECONDS), _GATEWAY, timeout=_PATIENCE)

    def logged(self) -> list[dict[str, Any]]:
        """Return the gateway's access log of /predict, which it writes to standard output."""
        output = self.engine.run("logs", _GATEWAY, timeout=_PATIENCE).stdout
        lines = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
        return [line for line in lines if line["path"] == "/predict"]


def _responds(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def _deployment(name: str, image: str) -> dict[str, Any]:
    deployment = copy.deepcopy(overlay("cpu")["Deployment", "densenet"])
    deployment["metadata"]["name"] = name
    pod = deployment["spec"]["template"]["spec"]
    del pod["topologySpreadConstraints"]
    (container,) = pod["containers"]
    for part in _UNSUPPORTED:
        del container[part]
    container["image"] = image
    # An emptyDir is a volume with its name, which pods would share.
    for volumes in (pod["volumes"], container["volumeMounts"]):
        volumes[0]["name"] = f"{name}-tmp"
    return deployment


@contextmanager
def replicas(engine: Engine, image: str, gateway_image: str, folder: Path) -> Iterator[Pods]:
    """Run two pods of this image behind the gateway; remove everything afterwards."""
    _clean(engine)
    engine.run("network", "create", _LABEL)
    (port,) = unused_ports(1)
    pods = Pods(engine, folder, f"http://127.0.0.1:{port}")
    sysctls = (f"--sysctl=net.ipv4.tcp_keepalive_{key}={value}" for key, value in _SYSCTLS.items())
    try:
        for _ in range(2):
            pods.start(image)
        pods.start_gateway(
            *("run", "-d", f"--name={_GATEWAY}", f"--network={_LABEL}", "--tmpfs=/tmp"),
            *("--read-only", "--cap-drop=ALL", *sysctls, f"--publish=127.0.0.1:{port}:5000"),
            *(gateway_image, f"--upstreams={_NODES}:8080", f"--model={PACKAGED_ARCHITECTURE}"),
            *("--published=127.0.0.1", "--rate=1000", "--burst=1000"),
        )
        yield pods
    finally:
        _clean(engine)


def _clean(engine: Engine) -> None:
    """Remove pods, gateway and network, also those of an interrupted run."""
    engine.run_unchecked("rm", "-f", "-t", "0", _GATEWAY)
    for kind, forced in (("pod", ("-f", "-t", "0")), ("volume", ("-f",))):
        for name in engine.run_unchecked(kind, "ls", "--format", "{{.Name}}").stdout.split():
            if name.startswith(_LABEL):
                engine.run_unchecked(kind, "rm", *forced, name)
    engine.run_unchecked("network", "rm", "-f", _LABEL)


def kill(pods: Pods, _: str) -> None:
    """Kill a container as the kernel would; podman restarts it, as a kubelet does."""
    pod = pods.running[0]
    before = pods.process(pod)
    os.kill(before, signal.SIGKILL)
    assert wait_until(lambda: pods.process(pod) not in {0, before}, _PATIENCE)
    pods.wait_until_ready(pod)


def roll(pods: Pods, image: str) -> None:
    """Replace all pods by those of another image: each starts before the oldest one stops."""
    for oldest in list(pods.running):
        pods.start(image)
        pods.stop(oldest)


def cut(pods: Pods, _: str) -> None:
    """Take a pod's network interface down, in the pod's network namespace, and up again."""
    pod = pods.running[0]
    enter = ["nsenter", "--target", str(pods.process(pod)), "--net", "ip", "link", "set", "eth0"]
    subprocess.run([*enter, "down"], check=True)
    try:
        time.sleep(_CUT_SECONDS)
    finally:
        subprocess.run([*enter, "up"], check=True)
    pods.wait_until_ready(pod)


FAULTS: dict[str, Callable[[Pods, str], None]] = {
    "a container is killed": kill,
    "a container's network is cut for 15 s": cut,
    "both are replaced one after the other": roll,
}
