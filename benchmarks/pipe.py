"""What each setting between the socket and the model is worth.

All variants run throughout, each a server of its own that differs in one setting from the first
one, which is this project as it is. Each round asks one after the other. Beside the rate stands
the CPU time an image takes of the frontend and of the workers, which noise changes least.
"""

import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
import yaml

from benchmarks.machine import CORES, write_report
from benchmarks.pictures import LARGE, SMALL, jpeg
from benchmarks.timing import in_turn, wait_until_quiet
from benchmarks.wrk import Body, closed_loop, require_wrk
from scripts.build.archive import build, recipe
from scripts.build.weights import untrained
from scripts.serve.running import Running, free_ports
from scripts.serve.server import CONFIG, LOG_CONFIG, start, stop
from scripts.terminal import command, step

CLIENTS = 16
WARM_UP_SECONDS = 6
# In megapixels.
PICTURES = {"small": SMALL, "large": LARGE}


@dataclass(frozen=True)
class Variant:
    """What is set apart from this project's configuration.

    Attributes:
        config: lines of config.properties.
        model: keys of model-config.yaml.
        log: text of log4j2.xml and what stands in its place.
        vmargs: text of the JVM's flags and what stands in its place.
        workers: worker processes; None for one a core.
        threads: of each worker; None for the cores divided by the workers.
    """

    config: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, int] = field(default_factory=dict)
    log: tuple[str, str] | None = None
    vmargs: tuple[str, str] | None = None
    workers: int | None = None
    threads: int | None = None


VARIANTS = {
    "as it is": Variant(),
    "batch size 1": Variant(model={"batchSize": 1}),
    "batch size 4": Variant(model={"batchSize": 4}),
    "batch size 16": Variant(model={"batchSize": 16}),
    "batch delay 5 ms": Variant(model={"maxBatchDelay": 5}),
    "batch delay 20 ms": Variant(model={"maxBatchDelay": 20}),
    "one worker, all threads": Variant(workers=1),
    "a worker a core, all threads each": Variant(threads=CORES),
    "1 frontend thread": Variant(config={"number_of_netty_threads": "1"}),
    "8 frontend threads": Variant(config={"number_of_netty_threads": "8"}),
    "1 thread to the workers": Variant(config={"netty_client_threads": "1"}),
    "logs written at once": Variant(config={"async_logging": "false"}),
    "no line for a request": Variant(log=('level="info" additivity', 'level="off" additivity')),
    "every line TorchServe has": Variant(log=('level="warn"/>', 'level="info"/>')),
    "metrics as lines of a log": Variant(config={"metrics_mode": "log"}),
    "pooled buffers": Variant(vmargs=("allocator.type=unpooled", "allocator.type=pooled")),
    "Java's own collector, G1": Variant(vmargs=("-XX:+UseSerialGC ", "")),
    "parallel collector": Variant(vmargs=("-XX:+UseSerialGC", "-XX:+UseParallelGC")),
    "both compilers": Variant(vmargs=("-XX:TieredStopAtLevel=1 ", "")),
}


@dataclass
class Server:
    """A variant that is running, with what each round of it gave."""

    running: Running
    measured: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def cpu_seconds(self) -> tuple[float, float]:
        """Of the frontend and of its workers, so far."""
        process = self.running.process()
        assert process is not None
        used = [sum(p.cpu_times()[:2]) for p in (process, *process.children())]
        return used[0], sum(used[1:])

    def load(self, body: Body, clients: int, seconds: int) -> dict[str, float]:
        """What wrk gives."""
        return closed_loop(self.running.predictions_url, body, clients, seconds)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=2)] = 4,
    only: Annotated[list[str] | None, typer.Option(help="These variants.")] = None,
) -> None:
    """Measures every variant and writes benchmarks/results/pipe.md."""
    require_wrk()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        bodies = {size: Body(jpeg(megapixels)) for size, megapixels in PICTURES.items()}
        servers = {name: _start(name, work, stack) for name in only or VARIANTS}
        for server in servers.values():
            server.load(bodies["small"], CLIENTS, WARM_UP_SECONDS)
        for name in in_turn(list(servers), rounds):
            _measure(name, servers[name], bodies, seconds)
            step(f"{name}: {servers[name].measured['small rate'][-1]:.1f}/s")
        _write(servers, rounds)


def _measure(name: str, server: Server, bodies: Mapping[str, Body], seconds: int) -> None:
    lone = server.load(bodies["small"], 1, max(2, seconds // 2))
    server.measured["lone p50"].append(lone["p50"])
    for size, body in bodies.items():
        before = server.cpu_seconds()
        found = server.load(body, CLIENTS, seconds)
        wait_until_quiet(name, lambda: sum(server.cpu_seconds()))
        after = server.cpu_seconds()
        count = max(1, found["count"])
        server.measured[f"{size} rate"].append(found["count"] / found["seconds"])
        for part, used in zip(("frontend", "workers"), np.subtract(after, before), strict=True):
            server.measured[f"{size} {part}"].append(1000 * used / count)


def _start(name: str, work: Path, stack: ExitStack) -> Server:
    variant = VARIANTS[name]
    folder = work / name.replace(" ", "-").replace(",", "")
    config, log_config = folder / "config.properties", folder / "log4j2.xml"
    archive = _archive(variant, folder / "store")
    config.write_text(
        _replaced(CONFIG.read_text(), variant.vmargs)
        + "".join(f"\n{key}={value}" for key, value in variant.config.items())
    )
    log_config.write_text(_replaced(LOG_CONFIG.read_text(), variant.log))
    run_dir = folder / "run"
    running = start(
        archive,
        free_ports(),
        variant.workers,
        run_dir,
        threads=variant.threads,
        config=config,
        log_config=log_config,
    )
    stack.callback(stop, running, run_dir)
    step(f"{name}: ready")
    return Server(running)


def _archive(variant: Variant, store: Path) -> Path:
    """The project's archive with other keys in its model-config.yaml."""
    archive = build(recipe(untrained()), store)
    unchanged = archive.rename(archive.with_suffix(".unchanged"))
    with zipfile.ZipFile(unchanged) as old, zipfile.ZipFile(archive, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "model-config.yaml":
                content = yaml.safe_dump({**yaml.safe_load(content), **variant.model}).encode()
            new.writestr(entry, content)
    return archive


def _replaced(text: str, change: tuple[str, str] | None) -> str:
    if change is None:
        return text
    assert change[0] in text, change[0]
    return text.replace(*change)


ONE_SIZE = "images/s | frontend ms | workers ms"


def _write(servers: dict[str, Server], rounds: int) -> None:
    lines = [
        (
            f"Medians of {rounds} alternating rounds: half a megapixel and 12, {CLIENTS} clients; "
            "one client with half a megapixel for the latency. CPU milliseconds an image, of the "
            "frontend and of all workers together. Made by `make bench-pipe`."
        ),
        "",
        f"| variant | one client, p50 ms | {ONE_SIZE} | 12 MP: {ONE_SIZE} |",
        "|---" * 8 + "|",
    ]
    columns = [f"{size} {part}" for size in PICTURES for part in ("rate", "frontend", "workers")]
    for name, server in servers.items():
        middle = [f"{median(server.measured[key]):.1f}" for key in ("lone p50", *columns)]
        lines.append(f"| {name} | {' | '.join(middle)} |")
    write_report("pipe", "Between the socket and the model", lines)


if __name__ == "__main__":
    command(main)
