"""Builds the container image with docker or podman, and measures it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
import yaml

from benchmarks.archives import workspace
from benchmarks.containerized import FENCED, Container, container, in_flight, status_on
from benchmarks.images import costly
from benchmarks.report import table, write_section
from scripts.container.base import debian_base
from scripts.container.engine import Engine, require_engine, with_working_runtime
from scripts.container.image import build_image, image_size
from scripts.samples import CAT
from scripts.serve.management import wait_until

PREDICT = "/predictions/densenet121"
STARTS = 2
IN_FLIGHT = 16
UPLOADS = 120
UPLOAD_BYTES = 19_000_000
COSTLY_TIMES = 4
CLIENTS = 8
REQUESTS = 100
_IMAGE = "localhost/densenet-measured"

_HOW = (
    "Built without a cache, and run with a read-only root, no capabilities, an unprivileged user, "
    "and one tmpfs; random weights. Repeat: `make bench-containers`."
)

_DEPLOYMENT = Path("deploy/kubernetes/base/deployment.yaml")


def pod_limit() -> int:
    """Return the bytes of memory that the Kubernetes Deployment gives the container."""
    deployment = yaml.safe_load(_DEPLOYMENT.read_text())
    (spec,) = deployment["spec"]["template"]["spec"]["containers"]
    text = spec["resources"]["limits"]["memory"]
    return int(text[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[text[-2:]]


def main(
    base: Annotated[str, typer.Option(help="Base image; debian is made of packages.")] = "debian",
    engine: Annotated[str, typer.Option(help="onnx or torch.")] = "onnx",
) -> None:
    """Write benchmarks/results/containers.md."""
    builder = require_engine()
    if base == "debian":
        base = debian_base(builder)
    with workspace(engine=engine) as (work, archive):
        seconds = _seconds(lambda: build_image(builder, [archive], _IMAGE, base))
        try:
            rows = [
                ("built with", f"{builder.program}, in {seconds:.0f} s without the base"),
                ("size", f"{image_size(builder, _IMAGE) / 1e6:.0f} MB"),
                *_measure(with_working_runtime(builder, _IMAGE, work)),
            ]
        finally:
            builder.run_unchecked("image", "rm", "--force", _IMAGE)
    results = table(["measured", "result"], rows)
    write_section("containers", "The container image", f"Engine {engine}", _HOW, results)


def _measure(engine: Engine) -> Iterator[tuple[str, str]]:
    """Yield the table's rows."""
    limit = pod_limit()
    image = CAT.read_bytes()
    fenced = (*FENCED, f"--memory={limit}", f"--memory-swap={limit}")
    starts, stops = [], []
    for _ in range(STARTS):
        began = time.monotonic()
        with container(engine, _IMAGE, options=fenced) as running:
            starts.append(f"{time.monotonic() - began:.1f}")
            running.signal("TERM")
            stop = _seconds(lambda running=running: wait_until(lambda: not running.runs(), 60))  # type: ignore[misc]
            stops.append(f"{stop:.1f}")
    yield f"from `run` to ready, {STARTS} starts", f"{', '.join(starts)} s"
    yield "from SIGTERM to exit without requests", f"{', '.join(stops)} s"
    with container(engine, _IMAGE, options=fenced) as running:
        yield "first response", f"{_seconds(lambda: _expect(running, image)) * 1000:.0f} ms"
        yield "memory after it", f"{running.used_bytes() / 1e6:.0f} MB"
        began = time.monotonic()
        answers = _ask(running, [image] * REQUESTS, CLIENTS)
        rate = REQUESTS / (time.monotonic() - began)
        yield f"{REQUESTS} requests of {CLIENTS} clients", f"{_counts(answers)}; {rate:.1f}/s"
        yield "memory after them", f"{running.used_bytes() / 1e6:.0f} MB"
        worst = list(costly()) * COSTLY_TIMES
        large = [image + bytes(UPLOAD_BYTES - len(image))] * UPLOADS
        flood = _ask(running, [*large, *worst], len(large) + len(worst))
        assert not running.state()["OOMKilled"]
        yield (
            f"{UPLOADS} uploads of 19 MB and {len(worst)} of the costliest images at once, in "
            f"{limit / 2**30:g} GiB",
            f"{_counts(flood)}; {running.peak_bytes() / 2**30:.2f} GiB at most",
        )
        _expect(running, image)
        yield f"SIGTERM with {IN_FLIGHT} requests in flight", _stop(running, image)


def _stop(running: Container, image: bytes) -> str:
    """Stop the container while requests are in flight; describe how it exits."""
    with in_flight(running, PREDICT, image, IN_FLIGHT) as connections:
        for connection in connections:
            connection.sendall(image)
        running.signal("TERM")
        signalled = time.monotonic()
        answers = Counter(str(status_on(connection)) for connection in connections)
        answered = time.monotonic()
        wait_until(lambda: not running.runs(), 60)
        exited = time.monotonic()
    status = running.state()["ExitCode"]
    drain, rest = answered - signalled, exited - answered
    return f"{_counts(answers)} in {drain:.1f} s; exit {rest:.1f} s later, status {status}"


def _expect(running: Container, image: bytes) -> None:
    answer = running.ask(PREDICT, image)
    assert answer.status == 200, answer.body


def _ask(running: Container, bodies: Sequence[bytes], clients: int) -> Counter[str]:
    def outcome(body: bytes) -> str:
        try:
            return str(running.ask(PREDICT, body, timeout=300).status)
        except OSError as error:
            return type(error).__name__

    with ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(outcome, bodies))


def _counts(answers: Counter[str]) -> str:
    return ", ".join(f"{count} times {status}" for status, count in sorted(answers.items()))


def _seconds(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began
