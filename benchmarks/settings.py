"""Measures the effect of each setting of TorchServe and of its Java runtime.

Each variant is this project's server with one changed setting. One server runs at a time, in
another order each round. CPU time per image varies less than the rate.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
import yaml

from benchmarks.archives import repack, workspace
from benchmarks.images import LARGE, SMALL, jpeg
from benchmarks.load import Body, closed_loop
from benchmarks.report import CORES, table, write_section
from benchmarks.servers import Server, ours
from benchmarks.timing import medians, wait_until_idle
from scripts.serve.server import CONFIG, LOG_CONFIG

CLIENTS = 16
_WARM_UP_SECONDS = 6
_MEGAPIXELS = {"0.5 MP": SMALL, "12 MP": LARGE}


@dataclass(frozen=True)
class Variant:
    """Changes of the configuration.

    Attributes:
        config: lines of config.properties.
        model: keys of model-config.yaml.
        log, vmargs: text of log4j2.xml and of the Java options, and its replacement.
        workers: worker processes; None for one per core.
        threads: of each worker; None for the cores divided by the workers.
    """

    config: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, int] = field(default_factory=dict)
    log: tuple[str, str] | None = None
    vmargs: tuple[str, str] | None = None
    workers: int | None = None
    threads: int | None = None


VARIANTS = {
    "unchanged": Variant(),
    "batch size 1": Variant(model={"batchSize": 1}),
    "batch size 4": Variant(model={"batchSize": 4}),
    "batch size 16": Variant(model={"batchSize": 16}),
    "batch delay 5 ms": Variant(model={"maxBatchDelay": 5}),
    "batch delay 20 ms": Variant(model={"maxBatchDelay": 20}),
    "one worker, all threads": Variant(workers=1),
    "one worker per core, all threads each": Variant(threads=CORES),
    "1 frontend thread": Variant(config={"number_of_netty_threads": "1"}),
    "8 frontend threads": Variant(config={"number_of_netty_threads": "8"}),
    "1 thread towards the workers": Variant(config={"netty_client_threads": "1"}),
    "synchronous logs": Variant(config={"async_logging": "false"}),
    "no access log": Variant(log=('level="info" additivity', 'level="off" additivity')),
    "all of TorchServe's log lines": Variant(log=('level="warn"/>', 'level="info"/>')),
    "metrics as log lines": Variant(config={"metrics_mode": "log"}),
    "pooled buffers": Variant(vmargs=("allocator.type=unpooled", "allocator.type=pooled")),
    "serial garbage collector": Variant(vmargs=("-XX:+UseG1GC", "-XX:+UseSerialGC")),
    "parallel garbage collector": Variant(vmargs=("-XX:+UseG1GC", "-XX:+UseParallelGC")),
    "both JIT compilers": Variant(vmargs=("-XX:TieredStopAtLevel=1 ", "")),
}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    seconds: Annotated[int, typer.Option(min=2)] = 4,
    only: Annotated[list[str] | None, typer.Option(help="These variants.")] = None,
) -> None:
    """Write benchmarks/results/settings.md."""
    bodies = {name: Body(jpeg(megapixels)) for name, megapixels in _MEGAPIXELS.items()}
    with workspace() as (work, archive):
        found = medians(
            only or list(VARIANTS),
            rounds,
            lambda name: _measure(VARIANTS[name], archive, work, bodies, seconds),
        )
    columns = next(iter(found.values()))
    rows = [[name, *values.values()] for name, values in found.items()]
    write_section(
        *("settings", "Settings", "TorchServe and its Java runtime"),
        f"Medians of {rounds} alternating rounds with one server at a time; {CLIENTS} clients, 1 "
        "for the latency; frontend and workers: CPU ms per image. Repeat: `make bench-settings`.",
        table(["variant", *columns], rows),
    )


def _measure(
    variant: Variant, archive: Path, work: Path, bodies: Mapping[str, Body], seconds: int
) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(dir=work))
    config, log_config = folder / "config.properties", folder / "log4j2.xml"
    lines = (f"\n{key}={value}" for key, value in variant.config.items())
    config.write_text(_replaced(CONFIG.read_text(), variant.vmargs) + "".join(lines))
    log_config.write_text(_replaced(LOG_CONFIG.read_text(), variant.log))
    packed = _with_keys(archive, variant.model, folder)
    options = {"config": config, "log_config": log_config}
    with ours(packed, work, workers=variant.workers, threads=variant.threads, **options) as server:
        closed_loop(server.url, bodies["0.5 MP"], CLIENTS, _WARM_UP_SECONDS)
        single = closed_loop(server.url, bodies["0.5 MP"], 1, max(2, seconds // 2))
        measured = {"1 client, p50 ms": single.p50}
        for size, body in bodies.items():
            before = _cpu_seconds(server)
            load = closed_loop(server.url, body, CLIENTS, seconds)
            wait_until_idle(server.name, server.cpu_seconds)
            measured[f"{size}: images/s"] = load.rate
            for part, used in _cpu_seconds(server).items():
                per_image = 1000 * (used - before[part]) / max(1, load.answered)
                measured[f"{size}: {part}"] = per_image
    return measured


def _cpu_seconds(server: Server) -> dict[str, float]:
    used = [sum(process.cpu_times()[:2]) for process in server.processes()]
    return {"frontend": used[0], "workers": sum(used[1:])}


def _with_keys(archive: Path, keys: Mapping[str, int], folder: Path) -> Path:
    """Return a copy of the archive with other keys in its model-config.yaml."""

    def change(name: str, content: bytes) -> bytes:
        if name == "model-config.yaml":
            return yaml.safe_dump({**yaml.safe_load(content), **keys}).encode()
        return content

    return repack(archive, folder / archive.name, change)


def _replaced(text: str, change: tuple[str, str] | None) -> str:
    if change is None:
        return text
    assert change[0] in text, change[0]
    return text.replace(*change)
