"""What is planned for a machine, and rejected before anything is started or stopped."""

import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from handler.settings import MAX_REQUEST_BYTES, MODEL_CARD, ModelCard
from scripts.serve import machine
from scripts.serve.machine import WORKER_BYTES, Plan, plan_frontend, plan_workers
from scripts.serve.preflight import (
    check_archives,
    check_ports,
    check_workers,
    max_worker_bytes,
)
from scripts.serve.running import HOST, Ports
from scripts.terminal import UserError


def test_all_errors_of_ports_are_reported_at_once() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            check_ports(HOST, {"inference": port, "management": 0, "metrics": port, "grpc": 65536})
    message = str(error.value)
    assert f"Port {port} (inference) cannot be used: Address already in use" in message
    assert "MANAGEMENT_PORT must be 1 to 65535, got 0." in message
    assert "GRPC_PORT must be 1 to 65535, got 65536." in message
    assert f"PORT and METRICS_PORT are both {port}" in message


def test_the_port_of_the_server_that_stops_is_free() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        check_ports(HOST, {"inference": port}, held=[port])
        with pytest.raises(UserError, match="PORT="):
            check_ports(HOST, {"inference": port})


def test_ports_of_grpc_count_only_where_it_is_on() -> None:
    assert set(Ports(management=1).used(grpc=False)) == {"inference", "management", "metrics"}
    assert len(Ports(management=1).used(grpc=True)) == 5
    assert "management" not in Ports(management=None).used(grpc=False)


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that sets the machine's CPUs and free memory."""

    def set_(cpus: int, memory: int) -> None:
        monkeypatch.setattr("joblib.cpu_count", lambda: cpus)
        monkeypatch.setattr(machine, "_available", lambda: memory)

    return set_


def test_more_workers_than_fit_are_rejected_with_the_number_that_fits(
    resources: Callable[[int, int], None],
) -> None:
    resources(16, 5 * WORKER_BYTES)
    check_workers(3)
    with pytest.raises(UserError, match=r"WORKERS=4 .*at most 3, since .*GB of memory"):
        check_workers(4)
    check_workers(4, stopping=2)
    with pytest.raises(UserError, match="at most 1 for each model"):
        check_workers(2, models=2)
    resources(1, 10**12)
    check_workers(4)
    with pytest.raises(UserError, match=r"WORKERS=999 .*at most 4, since there are 1 CPUs"):
        check_workers(999)


def test_the_default_number_of_workers_is_never_rejected_and_uses_all_cpus(
    resources: Callable[[int, int], None],
) -> None:
    for available in (0, WORKER_BYTES, 10**12):
        for cpus in (1, 2, 64):
            resources(cpus, available)
            for models in (1, 3):
                check_workers(plan_workers(models=models).workers, models=models)
    resources(16, 10**12)
    assert plan_workers() == Plan(workers=16, threads=1, max_threads=8)
    assert plan_workers(workers=3) == Plan(workers=3, threads=5, max_threads=8)
    assert plan_workers(workers=1) == Plan(workers=1, threads=16, max_threads=16)


def test_an_int8_worker_gets_more_memory(
    tmp_path: Path, resources: Callable[[int, int], None]
) -> None:
    an_archive(tmp_path / "lower.mar", precision="int8")
    resources(16, 5 * WORKER_BYTES)
    for name, workers in (("none.mar", 3), ("lower.mar", 2)):
        needed = max_worker_bytes([tmp_path / name])
        assert plan_workers(bytes_per_worker=needed).workers == workers


@pytest.mark.parametrize(
    ("gigabytes", "models", "queue"),
    [(64, 1, 512), (18, 1, 512), (6, 1, 109), (2, 1, 16), (64, 4, 512)],
)
def test_the_heap_holds_the_longest_queue_that_the_memory_allows(
    gigabytes: int, models: int, queue: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: gigabytes * 10**9)
    planned = plan_frontend(Plan(workers=2, threads=1, max_threads=2), models, WORKER_BYTES)
    heap, direct = planned.heap_bytes, planned.direct_bytes
    assert planned.queue == queue
    assert planned.vmargs == f"-Xmx{heap >> 20}m -XX:MaxDirectMemorySize={direct >> 20}m"
    assert heap >= models * queue * MAX_REQUEST_BYTES + 500_000_000
    assert direct >= 256 << 20
    if queue > 16:
        assert heap + direct + 2 * models * WORKER_BYTES <= gigabytes * 10**9


def an_archive(path: Path, precision: str = "float32") -> bytes:
    card = ModelCard("resnet50", 2, True, "w", "0" * 64, "0" * 64, precision=precision)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.onnx", b"model" * 1000)
        archive.writestr(MODEL_CARD, card.to_json())
    return path.read_bytes()


def test_a_damaged_or_repeated_archive_is_rejected(tmp_path: Path) -> None:
    archive = tmp_path / "model.mar"
    whole = an_archive(archive)
    check_archives([archive])
    with pytest.raises(UserError, match="named twice: model, model"):
        check_archives([archive, archive])
    flipped = bytearray(whole)
    flipped[500] ^= 1
    for content in (whole[:1000], bytes(flipped), b"", b"no archive"):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.mar is damaged, cut off, or no archive"):
            check_archives([archive])
    archive.unlink()
    with pytest.raises(UserError, match="There is no model archive"):
        check_archives([archive])
