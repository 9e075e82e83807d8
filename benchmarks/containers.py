"""Builds the container image with docker or podman, and measures it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, TypeVar

import typer
import yaml

from benchmarks.containerized import FENCED, Container, container, in_flight, status_on
from benchmarks.images import costly
from benchmarks.report import table, write_section
from scripts.build.model_file import from_options
from scripts.build.pipeline import build
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

_T = TypeVar("_T")

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
    rows: list[tuple[str, str]] = []
    with TemporaryDirectory() as folder:
        archive = build(
            from_options(arch="densenet121", weights="random", engine=engine), Path(folder)
        )
        with _image(archive, base, Path(folder), rows) as (program, image):
            _measure(program, image, rows)
    results = table(["measured", "result"], rows)
    write_section("containers", "The container image", f"Engine {engine}", _HOW, results)


@contextmanager
def _image(
    archive: Path, base: str, folder: Path, rows: list[tuple[str, str]]
) -> Iterator[tuple[Engine, str]]:
    engine = require_engine()
    if base == "debian":
        base = debian_base(engine)
    _, seconds = _timed(lambda: build_image(engine, [archive], _IMAGE, base))
    try:
        rows += [
            ("built with", f"{engine.program}, in {seconds:.0f} s without the base"),
            ("size", f"{image_size(engine, _IMAGE) / 1e6:.0f} MB"),
        ]
        yield with_working_runtime(engine, _IMAGE, folder), _IMAGE
    finally:
        engine.run_unchecked("image", "rm", "--force", _IMAGE)


def _measure(engine: Engine, image: str, rows: list[tuple[str, str]]) -> None:
    limit = pod_limit()
    image_bytes = CAT.read_bytes()
    fenced = (*FENCED, f"--memory={limit}", f"--memory-swap={limit}")
    starts = []
    stops = []
    for _ in range(STARTS):
        began = time.monotonic()
        with container(engine, image, options=fenced) as running:
            starts.append(time.monotonic() - began)
            running.signal("TERM")
            stops.append(_timed(lambda: wait_until(lambda: not running.runs(), 60))[1])
    rows.append((f"from `run` to ready, {STARTS} starts", _seconds(starts)))
    rows.append(("from SIGTERM to exit without requests", _seconds(stops)))
    with container(engine, image, options=fenced) as running:
        _, first = _timed(lambda: _expect(running, image_bytes))
        rows.append(("first response", f"{first * 1000:.0f} ms"))
        rows.append(("memory after it", f"{running.used_bytes() / 1e6:.0f} MB"))
        began = time.monotonic()
        answers = _ask(running, [image_bytes] * REQUESTS, CLIENTS)
        rate = REQUESTS / (time.monotonic() - began)
        rows.append(
            (f"{REQUESTS} requests of {CLIENTS} clients", f"{_counts(answers)}; {rate:.1f}/s")
        )
        rows.append(("memory after them", f"{running.used_bytes() / 1e6:.0f} MB"))
        worst = list(costly()) * COSTLY_TIMES
        large = [image_bytes + bytes(UPLOAD_BYTES - len(image_bytes))] * UPLOADS
        flood = _ask(running, [*large, *worst], len(large) + len(worst))
        state = running.state()
        assert not state["OOMKilled"]
        what = f"{UPLOADS} uploads of 19 MB and {len(worst)} of the costliest images at once"
        peak = f"{running.peak_bytes() / 2**30:.2f} GiB at most"
        rows.append((f"{what}, in {limit / 2**30:g} GiB", f"{_counts(flood)}; {peak}"))
        _expect(running, image_bytes)
        _stop(running, image_bytes, rows)


def _stop(running: Container, image: bytes, rows: list[tuple[str, str]]) -> None:
    """Stop the container while requests are in flight."""
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
    found = f"{_counts(answers)} in {drain:.1f} s; exit {rest:.1f} s later, status {status}"
    rows.append((f"SIGTERM with {IN_FLIGHT} requests in flight", found))


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


def _seconds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values) + " s"


def _timed(act: Callable[[], _T]) -> tuple[_T, float]:
    began = time.monotonic()
    result = act()
    return result, time.monotonic() - began
