"""Workers, threads, requests and memory within the container's limits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.container import limits
from deploy.container.limits import Limits, plan_resources
from deploy.container.serving import ConfigError
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve import machine
from scripts.serve.machine import WORKER_BYTES, Plan

GIB = 1 << 30


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr(machine, "_available", lambda: 512 * GIB)
    return monkeypatch


def _within(bytes_: int, container: pytest.MonkeyPatch, models: int = 1) -> Limits:
    container.setattr(limits, "memory_limit", lambda: bytes_)
    return plan_resources(WORKER_BYTES, models)


@pytest.mark.parametrize("gibibytes", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("models", [1, 2])
def test_all_processes_together_stay_within_the_limit(
    gibibytes: int, models: int, container: pytest.MonkeyPatch
) -> None:
    try:
        found = _within(gibibytes * GIB, container, models)
    except ConfigError:
        assert gibibytes * GIB < models * 2 * GIB
        return
    workers, frontend = found.plan.workers, found.frontend
    java = frontend.heap_bytes + frontend.direct_bytes
    assert java + workers * models * WORKER_BYTES + 300_000_000 < gibibytes * GIB
    assert frontend.direct_bytes >= found.large * MAX_REQUEST_BYTES
    assert frontend.heap_bytes > found.large * MAX_REQUEST_BYTES
    assert frontend.queue > found.large >= 4


def test_workers_follow_cpus_and_then_memory(container: pytest.MonkeyPatch) -> None:
    assert _within(8 * GIB, container).plan == Plan(workers=2, threads=1, max_threads=2)
    assert _within(2 * GIB, container).plan == Plan(workers=1, threads=2, max_threads=2)
    container.setattr("joblib.cpu_count", lambda: 4)
    assert _within(8 * GIB, container).plan.workers == 4


def test_a_limit_that_is_too_small_is_rejected(container: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"1\.07 GB, does not hold 1 worker\(s\).*Raise the limit"
    ):
        _within(GIB, container)
    container.setattr(limits, "memory_limit", lambda: 2 * GIB)
    with pytest.raises(ConfigError, match=r"does not hold 2 worker\(s\).*Lower WORKERS"):
        plan_resources(WORKER_BYTES, workers=2)


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Return a function that writes a cgroup's memory limit and usage, in a folder of this one."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")

    def write(limit: str, usage: str, cached: str) -> None:
        name, number = limit.split()
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{number}\n")
        (tmp_path / usage).write_text("100\n")
        (tmp_path / name).with_name("memory.stat").write_text(f"cache 500\n{cached} 30\n")

    return write


@pytest.mark.parametrize(
    ("limit", "usage", "cached", "found"),
    [
        ("memory.max 2147483648", "memory.current", "inactive_file", (2 * GIB, 70)),
        ("memory.max max", "memory.current", "inactive_file", None),
        (
            "memory/memory.limit_in_bytes 2147483648",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
            (2 * GIB, 70),
        ),
        ("none 0", "none", "none", None),
    ],
)
def test_both_versions_of_cgroups_are_read(
    limit: str,
    usage: str,
    cached: str,
    found: object,
    cgroups: Callable[[str, str, str], None],
    tmp_path: Path,
) -> None:
    cgroups(limit, usage, cached)
    # As a container of a host without cgroup namespaces sees it: a path that is not mounted.
    (tmp_path / "own").write_text("4:memory:/docker/0123\n0::/docker/0123\n")
    assert machine._container_memory() == found


@pytest.mark.parametrize("outer", ["max", "1073741824"])
def test_the_limit_of_a_systemd_service_counts(
    outer: str, cgroups: Callable[[str, str, str], None], tmp_path: Path
) -> None:
    for folder, limit in (("system.slice", outer), ("system.slice/densenet.service", "2147483648")):
        cgroups(f"{folder}/memory.max {limit}", f"{folder}/memory.current", "inactive_file")
    (tmp_path / "own").write_text("0::/system.slice/densenet.service\n")
    assert machine._container_memory() == (2 * GIB if outer == "max" else GIB, 70)
    (tmp_path / "own").write_text("0::/\n")
    assert machine._container_memory() is None


def test_a_limit_above_the_machines_memory_is_ignored(container: pytest.MonkeyPatch) -> None:
    container.setattr(machine, "_container_memory", lambda: (1 << 62, 0))
    container.setattr(machine, "_available", lambda: 4 * GIB)
    assert machine.memory_limit() == 3 * GIB
