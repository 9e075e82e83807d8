"""A Ray cluster of several nodes on this machine: real `ray start` processes."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from scripts.serve.running import free_ports
from tests.batch.command import wait_for

# Seconds that a node may take to end by itself.
_END = 20.0


class Cluster:
    """A head and more nodes, of a CPU each; only this machine's loopback has their addresses.

    Attributes:
        address: of the head.
        environment: what a program needs to be let in.
    """

    def __init__(self, folder: Path, nodes: int, gpus: int = 0) -> None:
        """Starts it.

        Args:
            folder: for Ray's files, with a short name.
            nodes: beside the head.
            gpus: that each node says it has, whether they are there or not.
        """
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # By itself Ray gives way to all other work.
            "RAY_worker_niceness": "0",
        }
        self._folder = folder
        self._gpus = gpus
        self._last = 2
        port = free_ports().inference
        self.address = f"127.0.0.2:{port}"
        self.head = self._start("--head", f"--port={port}", f"--temp-dir={folder}")
        self.nodes: list[psutil.Popen] = []
        for _ in range(nodes):
            self.add()

    def add(self) -> psutil.Popen:
        """One more node."""
        self._last += 1
        self.nodes.append(self._start(f"--address={self.address}"))
        return self.nodes[-1]

    def kill(self, node: psutil.Popen) -> None:
        """Ends a node with all that runs on it, as a power cut would."""
        self.nodes.remove(node)
        _kill([node, *node.children(recursive=True)])

    def workers(self, name: str) -> list[psutil.Process]:
        """The processes of actors of this name, on all nodes."""
        return [
            child
            for node in (self.head, *self.nodes)
            for child in node.children(recursive=True)
            if name in _title(child)
        ]

    def close(self) -> None:
        """Ends all nodes."""
        for node in (*self.nodes, self.head):
            _kill([node, *node.children(recursive=True)])

    def _start(self, *args: str) -> psutil.Popen:
        own = f"127.0.0.{self._last}"
        log = self._folder.parent / f"node-{self._last}.log"
        resources = ["--num-cpus=1", f"--num-gpus={self._gpus}"]
        options = [f"--node-ip-address={own}", *resources, "--disable-usage-stats", "--block"]
        if "--head" in args:
            options.append("--include-dashboard=false")
        with log.open("wb") as output:
            process = psutil.Popen(
                [Path(sys.executable).with_name("ray"), "start", *args, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
            )
        started = b"Ray runtime started"
        wait_for(lambda: started in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(processes: Sequence[psutil.Process | psutil.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, _END)
