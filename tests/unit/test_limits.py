"""What the container decides from its limits."""

from pathlib import Path

import pytest

from deploy.container import limits, serving
from deploy.container.limits import Limits, fitting
from deploy.container.serving import Refused, chosen
from handler.settings import MAX_REQUEST_BYTES
from scripts.serve import machine
from scripts.serve.machine import WORKER_BYTES

GIB = 1 << 30


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr(machine, "_available", lambda: 512 * GIB)
    return monkeypatch


def _within(bytes_: int, container: pytest.MonkeyPatch, models: int = 1) -> Limits:
    container.setattr(limits, "most_memory", lambda: bytes_)
    return fitting(WORKER_BYTES, models)


@pytest.mark.parametrize("gibibytes", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("models", [1, 2])
def test_all_processes_together_stay_within_the_limit(
    gibibytes: int, models: int, container: pytest.MonkeyPatch
) -> None:
    try:
        found = _within(gibibytes * GIB, container, models)
    except Refused:
        assert gibibytes * GIB < models * 2 * GIB
        return
    java = found.heap_bytes + found.direct_bytes
    assert java + found.workers * models * WORKER_BYTES + 300_000_000 < gibibytes * GIB
    assert found.direct_bytes >= found.large * MAX_REQUEST_BYTES
    assert found.heap_bytes > found.large * MAX_REQUEST_BYTES
    assert found.requests > found.large >= 4


def test_workers_follow_cpus_and_then_memory(container: pytest.MonkeyPatch) -> None:
    assert _within(8 * GIB, container).workers == 2
    assert (_within(2 * GIB, container).workers, _within(2 * GIB, container).threads) == (1, 2)
    container.setattr("joblib.cpu_count", lambda: 4)
    assert _within(8 * GIB, container).workers == 4


def test_what_does_not_fit_is_refused(container: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"1\.07 GB, does not hold 1 worker\(s\).*Raise the limit"):
        _within(GIB, container)
    container.setattr(limits, "most_memory", lambda: 2 * GIB)
    with pytest.raises(Refused, match=r"does not hold 2 worker\(s\).*Lower WORKERS"):
        fitting(WORKER_BYTES, workers=2)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "2147483648", "memory.current": "100", "inactive_file": "30"}, 2 * GIB),
        ({"memory.max": "max", "memory.current": "100", "inactive_file": "30"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "2147483648",
                "memory/memory.usage_in_bytes": "100",
                "total_inactive_file": "30",
            },
            2 * GIB,
        ),
        ({}, None),
    ],
)
def test_both_versions_of_cgroups_are_read(
    files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("inactive_file"):
            folder = tmp_path / "memory" if name.startswith("total") else tmp_path
            (folder / "memory.stat").write_text(f"cache 500\n{name} {text}\n")
        else:
            path.write_text(f"{text}\n")
    found = machine._container_memory()
    assert found == (None if limit is None else (limit, 70))


def test_a_limit_above_the_machine_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_container_memory", lambda: (1 << 62, 0))
    monkeypatch.setattr(machine, "_available", lambda: 4 * GIB)
    assert machine.most_memory() == 3 * GIB


def test_what_is_served_is_the_images_own_unless_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MODEL_STORE", tmp_path)
    with pytest.raises(Refused, match="There is no archive"):
        chosen([], {})
    (tmp_path / "b.mar").touch()
    (tmp_path / "a.mar").touch()
    found = chosen([], {"WORKERS": "3", "PORT": ""})
    assert (found.models, found.workers, found.port) == (("a", "b"), 3, 8080)
    with pytest.raises(Refused, match="WORKERS must be a whole number from 1 to 1024, got '0'"):
        chosen([], {"WORKERS": "0"})
