"""The Deployment's pods on podman, with the gateway's container in front of them.

`podman kube play` runs the very Deployment of `deploy/kubernetes`, but for what it cannot do, and
that is taken away by kustomize. What a control plane would decide, which pod starts and which ends,
is decided here. Pods and gateway have a network of their own, and clients reach the gateway by a
port of this machine's loopback.
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

import requests

from scripts.container.engine import Engine
from scripts.serve.management import poll
from scripts.serve.running import unused_ports
from scripts.terminal import UserError

# Stands for all pods, as the Service without an address of its own does in Kubernetes.
NODES = "densenet-nodes"
_OVERLAY = Path("deploy/kubernetes/overlays/cpu")
# As in deploy/kubernetes/overlays/gateway: a pod that says nothing any more is noticed within 9 s.
SYSCTLS = {"time": 5, "intvl": 2, "probes": 2}
_STOP_SECONDS = 45
# Seconds: a start on a busy machine.
_PATIENCE = 180.0


@dataclass(frozen=True)
class Pod:
    """A pod of the Deployment.

    Attributes:
        name: podman's, of the pod.
        container: that of TorchServe's container.
    """

    name: str
    container: str


@dataclass
class Pods:
    """Pods of the Deployment and the gateway before them.

    Attributes:
        engine: podman.
        folder: for manifests.
        label: in the names of all that is made, so that several may be there at once.
        url: of the gateway.
        metrics: likewise, what Prometheus reads.
        pods: those that run, the oldest first.
    """

    engine: Engine
    folder: Path
    label: str
    url: str = ""
    metrics: str = ""
    pods: list[Pod] = field(default_factory=list)
    _started: int = 0

    @property
    def network(self) -> str:
        """Of pods and gateway."""
        return f"densenet-{self.label}"

    @property
    def gateway(self) -> str:
        """The gateway's container."""
        return f"densenet-{self.label}-gateway"

    def manifest(self, name: str, image: str) -> Path:
        """Writes what podman plays: the overlay's Deployment, its name with this one's end."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "kustomization.yaml").write_text(_kustomization(place, name, image))
        done = subprocess.run(
            ["kubectl", "kustomize", str(place)],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
        path = place / "deployment.yaml"
        path.write_text(done.stdout)
        return path

    def start(self, image: str) -> Pod:
        """Starts a pod and waits until it is ready, as a rollout does before it ends another."""
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
        """Asks what the readiness probe asks."""
        if not poll(lambda: self.ready(pod), _PATIENCE):
            logs = self.engine.tried("logs", "--tail", "40", pod.container).stdout
            raise UserError(f"{pod.name} is not ready after {_PATIENCE:.0f} s: {logs}")

    def ready(self, pod: Pod) -> bool:
        """Whether it is."""
        address = self.address(pod)
        if not address:
            return False
        try:
            return requests.get(f"http://{address}:8080/ping", timeout=5).ok
        except requests.RequestException:
            return False

    def end(self, pod: Pod) -> None:
        """Ends a pod with SIGTERM and the Deployment's grace period, and forgets it."""
        self.engine.run("pod", "stop", "-t", str(_STOP_SECONDS), pod.name, timeout=_PATIENCE)
        self.engine.run("pod", "rm", "-f", pod.name, timeout=_PATIENCE)
        self.pods.remove(pod)

    def address(self, pod: Pod) -> str:
        """Its address on the network; "" while it has none."""
        with suppress(UserError):
            asked = ("pod", "inspect", "--format", "{{.InfraContainerID}}", pod.name)
            infra = self.engine.run(*asked, timeout=_PATIENCE).stdout.strip()
            networks = self.engine.inspect("container", infra)["NetworkSettings"]["Networks"]
            return str(networks[self.network]["IPAddress"])
        return ""

    def process(self, pod: Pod) -> int:
        """The first process of TorchServe's container, as this machine counts it; 0 for none."""
        return int(self.engine.inspect("container", pod.container)["State"]["Pid"])

    def counted(self) -> dict[str, float]:
        """What the gateway counted: how many answers, by their labels as Prometheus writes them."""
        text = requests.get(f"{self.metrics}/metrics", timeout=10).text
        name = "densenet_gateway_requests_total"
        rows = (line.rpartition(" ") for line in text.splitlines() if line.startswith(name))
        return {labels.removeprefix(name): float(value) for labels, _, value in rows}


# What podman 4.3 cannot do: it plays no other kind, knows no topology, opens each port of a
# container on all addresses of this machine, and has systemd ask the probes. An emptyDir is a
# volume of its name, which pods would share: each gets its own.
_UNPLAYED = ("HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "Service")
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
        for kind in _UNPLAYED
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
    """Two pods of this image behind the gateway; all of it is gone afterwards.

    Args:
        engine: podman.
        image: of TorchServe with an archive, with its tag.
        gateway_image: of the gateway, likewise.
        folder: for what is written meanwhile; inside the repository or not.
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
    http, metrics = unused_ports(2)
    pods.url, pods.metrics = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{metrics}"
    sysctls = [f"--sysctl=net.ipv4.tcp_keepalive_{key}={value}" for key, value in SYSCTLS.items()]
    pods.engine.run(
        *("run", "-d", "--name", pods.gateway, "--network", pods.network, "--tmpfs=/tmp"),
        *("--read-only", "--cap-drop=ALL", *sysctls),
        *(f"--publish=127.0.0.1:{http}:5000", f"--publish=127.0.0.1:{metrics}:9145", image),
        *(f"--upstreams={NODES}:8080", "--published=127.0.0.1", "--metrics-host=0.0.0.0"),
        *("--rate=1000", "--burst=1000"),
        timeout=_PATIENCE,
    )

    def serves() -> bool:
        try:
            return requests.get(f"{pods.url}/readyz", timeout=5).ok
        except requests.RequestException:
            return False

    if not poll(serves, _PATIENCE):
        raise UserError(f"The gateway is not ready: {pods.engine.tried('logs', pods.gateway)}")


def _clean(pods: Pods) -> None:
    """Removes pods, gateway and network, also those of a run that was cut off."""
    engine, own = pods.engine, f"densenet-{pods.label}-"
    engine.tried("rm", "-f", "-t", "0", pods.gateway)
    for kind, forced in (("pod", ("-f", "-t", "0")), ("volume", ("-f",))):
        for name in engine.tried(kind, "ls", "--format", "{{.Name}}").stdout.split():
            if name.startswith(own):
                engine.tried(kind, "rm", *forced, name)
    engine.tried("network", "rm", "-f", pods.network)


def kill(pods: Pods, _: str) -> None:
    """Kills a container as the kernel would; podman starts it again, as a kubelet does."""
    pod = pods.pods[0]
    before = pods.process(pod)
    os.kill(before, signal.SIGKILL)
    _wait_for(lambda: pods.process(pod) not in {0, before}, f"{pod.name} was not started again")
    pods.wait_until_ready(pod)
    pods.pods.append(pods.pods.pop(0))


def roll(pods: Pods, image: str) -> None:
    """Replace all pods by those of another image: each starts before the oldest one stops."""
    for oldest in list(pods.pods):
        pods.start(image)
        pods.end(oldest)


def cut(pods: Pods, _: str, seconds: float = 15.0) -> None:
    """Takes a pod's network interface down, in the pod's own namespace, and up again."""
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
    "both are replaced, one after the other": roll,
}


def _wait_for(check: Callable[[], bool], failure: str) -> None:
    if not poll(check, _PATIENCE):
        raise UserError(f"{failure} within {_PATIENCE:.0f} s.")
