"""The Deployment's pods on podman, behind the gateway's container.

`podman kube play` runs the Deployment of `deploy/kubernetes`; kustomize removes what podman does
not support. The tests start and stop pods, as a control plane would. Pods and gateway have their
own network, and clients connect to a port on loopback.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from scripts.container.engine import Engine
from scripts.serve.management import wait_until
from scripts.serve.running import unused_ports
from scripts.terminal import UserError

# Resolves to the addresses of all pods, as the headless Service in Kubernetes.
NODES = "densenet-nodes"
_OVERLAY = Path("deploy/kubernetes/overlays/cpu")
# As in deploy/kubernetes/overlays/gateway: keepalive notices a lost network within 9 s.
SYSCTLS = {"time": 5, "intvl": 2, "probes": 2}
# Seconds: grace periods as in deploy/kubernetes, and for a start on a busy machine.
_STOP_SECONDS = 45
_GATEWAY_STOP_SECONDS = 105
_PATIENCE = 180.0


@dataclass(frozen=True)
class Pod:
    """A pod of the Deployment.

    Attributes:
        name: podman's name of the pod.
        container: podman's name of TorchServe's container.
    """

    name: str
    container: str


@dataclass
class Pods:
    """Pods of the Deployment and the gateway in front of them.

    Attributes:
        engine: podman.
        folder: for manifests.
        label: part of all names, so that several groups can run concurrently.
        url: of the gateway.
        pods: the running ones, oldest first.
    """

    engine: Engine
    folder: Path
    label: str
    url: str = ""
    pods: list[Pod] = field(default_factory=list)
    _started: int = 0

    @property
    def network(self) -> str:
        """Return the name of the network."""
        return f"densenet-{self.label}"

    @property
    def gateway(self) -> str:
        """Return the name of the gateway's container."""
        return f"densenet-{self.label}-gateway"

    def manifest(self, name: str, image: str) -> Path:
        """Write the overlay's Deployment for podman, with a suffix to its name."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "kustomization.yaml").write_text(_kustomization(place, name, image))
        done = subprocess.run(
            ["kubectl", "kustomize", str(place)],
            capture_output=True,
            text=True,
            check=True,
        )
        path = place / "deployment.yaml"
        path.write_text(done.stdout)
        return path

    def start(self, image: str) -> Pod:
        """Start a pod and wait until it is ready, as a rollout does before it stops another."""
        self._started += 1
        name = f"{self.label}-{self._started}"
        manifest = self.manifest(name, image)
        self.engine.run(
            *("kube", "play", "--network", f"{self.network}:alias={NODES}", str(manifest)),
            timeout=_PATIENCE,
        )
        pod = Pod(f"densenet-{name}-pod-0", f"densenet-{name}-pod-0-torchserve")
        self.pods.append(pod)
        self.wait_until_ready(pod)
        return pod

    def wait_until_ready(self, pod: Pod) -> None:
        """Wait until the readiness probe passes."""
        if not wait_until(lambda: self.ready(pod), _PATIENCE):
            logs = self.engine.run_unchecked("logs", "--tail", "40", pod.container).stdout
            raise UserError(f"{pod.name} is not ready after {_PATIENCE:.0f} s: {logs}")

    def ready(self, pod: Pod) -> bool:
        """Return whether the readiness probe passes."""
        address = self.address(pod)
        if not address:
            return False
        try:
            return requests.get(f"http://{address}:8080/ping", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self, pod: Pod) -> None:
        """Stop a pod with SIGTERM and the Deployment's grace period, and remove it.

        As in Kubernetes the pod keeps its network until the container has exited; `podman pod stop`
        would remove it at once.
        """
        self.engine.run("stop", "-t", str(_STOP_SECONDS), pod.container, timeout=_PATIENCE)
        self.engine.run("pod", "rm", "-f", pod.name, timeout=_PATIENCE)
        self.pods.remove(pod)

    def address(self, pod: Pod) -> str:
        """Return the pod's address on the network; "" while it has none."""
        with suppress(UserError):
            asked = ("pod", "inspect", "--format", "{{.InfraContainerID}}", pod.name)
            infra = self.engine.run(*asked, timeout=_PATIENCE).stdout.strip()
            networks = self.engine.inspect("container", infra)["NetworkSettings"]["Networks"]
            return str(networks[self.network]["IPAddress"])
        return ""

    def process(self, pod: Pod) -> int:
        """Return the id of the container's first process on this machine; 0 for none."""
        return int(self.engine.inspect("container", pod.container)["State"]["Pid"])

    def wait_for_gateway(self) -> None:
        """Wait until the gateway reports that a worker is ready."""

        def ready() -> bool:
            try:
                return requests.get(f"{self.url}/readyz", timeout=5).ok
            except requests.RequestException:
                return False

        if not wait_until(ready, _PATIENCE):
            logs = self.engine.run_unchecked("logs", self.gateway)
            raise UserError(f"The gateway is not ready: {logs.stdout}{logs.stderr}")

    def stop_gateway(self) -> None:
        """Stop the gateway with its image's signal and the Deployment's grace period."""
        seconds = str(_GATEWAY_STOP_SECONDS)
        self.engine.run("stop", "-t", seconds, self.gateway, timeout=_PATIENCE)

    def start_gateway(self) -> None:
        """Start the stopped gateway."""
        self.engine.run("start", self.gateway, timeout=_PATIENCE)
        self.wait_for_gateway()

    def logged(self) -> list[dict[str, Any]]:
        """Return the gateway's access log of /predict, which it writes to standard output."""
        output = self.engine.run("logs", self.gateway, timeout=_PATIENCE).stdout
        lines = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
        return [line for line in lines if line["path"] == "/predict"]


# podman 4.3 supports no other kind and no topology, publishes each port of a container on all
# addresses of this machine, and runs probes with systemd. An emptyDir is a volume with its name,
# which pods would share, so each gets its own name.
_UNSUPPORTED = ("HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "Service")
_TEMPLATE = "/spec/template/spec"
_REMOVED = (
    f"{_TEMPLATE}/topologySpreadConstraints",
    *(
        f"{_TEMPLATE}/containers/0/{part}"
        for part in ("ports", "startupProbe", "readinessProbe", "livenessProbe")
    ),
)


def _kustomization(place: Path, name: str, image: str) -> str:
    image_name, _, tag = image.rpartition(":")
    changes: list[dict[str, str]] = [{"op": "remove", "path": path} for path in _REMOVED]
    changes += [
        {"op": "replace", "path": f"{_TEMPLATE}/{part}/0/name", "value": f"densenet-{name}-tmp"}
        for part in ("volumes", "containers/0/volumeMounts")
    ]
    deletions = (
        {
            "target": {"kind": kind},
            "patch": json.dumps({"$patch": "delete", "kind": kind, "metadata": {"name": "any"}}),
        }
        for kind in _UNSUPPORTED
    )
    return json.dumps(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(_OVERLAY, place)],
            "nameSuffix": f"-{name}",
            "images": [{"name": "densenet-torchserve", "newName": image_name, "newTag": tag}],
            "patches": [
                *deletions,
                {"target": {"kind": "Deployment"}, "patch": json.dumps(changes)},
            ],
        }
    )


@contextmanager
def replicas(
    engine: Engine, image: str, gateway_image: str, folder: Path, label: str = "replicas"
) -> Iterator[Pods]:
    """Run two pods of this image behind the gateway; remove everything afterwards.

    Args:
        engine: podman.
        image: of TorchServe with a model archive, with its tag.
        gateway_image: of the gateway, with its tag.
        folder: for manifests.
        label: see `Pods`.
    """
    pods = Pods(engine, folder, label)
    _clean(pods)
    engine.run("network", "create", pods.network)
    try:
        for _ in range(2):
            pods.start(image)
        _start_gateway(pods, gateway_image)
        yield pods
    finally:
        _clean(pods)


def _start_gateway(pods: Pods, image: str) -> None:
    (port,) = unused_ports(1)
    pods.url = f"http://127.0.0.1:{port}"
    sysctls = [f"--sysctl=net.ipv4.tcp_keepalive_{key}={value}" for key, value in SYSCTLS.items()]
    pods.engine.run(
        *("run", "-d", "--name", pods.gateway, "--network", pods.network, "--tmpfs=/tmp"),
        *("--read-only", "--cap-drop=ALL", *sysctls, f"--publish=127.0.0.1:{port}:5000", image),
        *(f"--upstreams={NODES}:8080", "--model=densenet121", "--published=127.0.0.1"),
        *("--rate=1000", "--burst=1000"),
        timeout=_PATIENCE,
    )
    pods.wait_for_gateway()


def _clean(pods: Pods) -> None:
    """Remove pods, gateway and network, also those of an interrupted run."""
    engine, own = pods.engine, f"densenet-{pods.label}-"
    engine.run_unchecked("rm", "-f", "-t", "0", pods.gateway)
    for kind, forced in (("pod", ("-f", "-t", "0")), ("volume", ("-f",))):
        for name in engine.run_unchecked(kind, "ls", "--format", "{{.Name}}").stdout.split():
            if name.startswith(own):
                engine.run_unchecked(kind, "rm", *forced, name)
    engine.run_unchecked("network", "rm", "-f", pods.network)


def kill(pods: Pods, _: str) -> None:
    """Kill a container as the kernel would; podman restarts it, as a kubelet does."""
    pod = pods.pods[0]
    before = pods.process(pod)
    os.kill(before, signal.SIGKILL)
    _wait_for(lambda: pods.process(pod) not in {0, before}, f"{pod.name} was not restarted")
    pods.wait_until_ready(pod)
    pods.pods.append(pods.pods.pop(0))


def roll(pods: Pods, image: str) -> None:
    """Replace all pods by those of another image: each starts before the oldest one stops."""
    for oldest in list(pods.pods):
        pods.start(image)
        pods.stop(oldest)


def cut(pods: Pods, _: str, seconds: float = 15.0) -> None:
    """Take a pod's network interface down, in the pod's network namespace, and up again."""
    pod = pods.pods[0]
    process = pods.process(pod)
    with _interface_down(process):
        time.sleep(seconds)
    pods.wait_until_ready(pod)
    pods.pods.append(pods.pods.pop(0))


@contextmanager
def _interface_down(process: int) -> Iterator[None]:
    enter = ["nsenter", "--target", str(process), "--net", "ip", "link", "set", "eth0"]
    subprocess.run([*enter, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "up"], check=True)


FAULTS: dict[str, Callable[[Pods, str], None]] = {
    "a container is killed": kill,
    "a container's network is cut for 15 s": cut,
    "both are replaced one after the other": roll,
}


def _wait_for(check: Callable[[], bool], failure: str) -> None:
    if not wait_until(check, _PATIENCE):
        raise UserError(f"{failure} within {_PATIENCE:.0f} s.")
