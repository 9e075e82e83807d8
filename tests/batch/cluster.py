"""A Ray cluster on this machine: several `ray start` processes."""

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil

from scripts.serve.running import unused_ports
from tests.batch.command import wait_for


class Cluster:
    """A head and more nodes, on addresses of this machine's loopback.

    Each node has one CPU and reports one GPU, which need not exist.

    Attributes:
        address: of the head.
        environment: variables that a program needs to connect.
        nodes: their processes, the head's first.
    """

    def __init__(self, folder: Path) -> None:
        """Start the head; `folder` is for Ray's files and has a short path."""
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's default is the lowest priority.
            "RAY_worker_niceness": "0",
        }
        self._folder = folder
        self._last = 1
        self.nodes: list[psutil.Popen] = []
        (port,) = unused_ports(1)
        self.address = f"127.0.0.2:{port}"
        dashboard = "--include-dashboard=false"
        self._start("--head", f"--port={port}", f"--temp-dir={folder}", dashboard)

    def add(self) -> None:
        """Start one more node."""
        self._start(f"--address={self.address}")

    def kill(self, node: psutil.Popen) -> None:
        """Kill a node and all its processes, as a power failure would."""
        self.nodes.remove(node)
        processes = [node, *node.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 20)

    def workers(self, name: str) -> list[psutil.Process]:
        """Return the processes of actors of this name, on all nodes."""
        children = (child for node in self.nodes for child in node.children(recursive=True))
        return [child for child in children if name in _title(child)]

    def close(self) -> None:
        """Kill all nodes, the head last."""
        for node in reversed(self.nodes):
            self.kill(node)

    def _start(self, *args: str) -> None:
        self._last += 1
        log = self._folder.parent / f"node-{self._last}.log"
        options = [f"--node-ip-address=127.0.0.{self._last}", "--num-cpus=1", "--num-gpus=1"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *args, *options]
        with log.open("wb") as output:
            process = psutil.Popen(
                [*command, "--disable-usage-stats", "--block"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
            )
        self.nodes.append(process)
        started = b"Ray runtime started"
        wait_for(lambda: started in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
