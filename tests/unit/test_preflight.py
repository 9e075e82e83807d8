"""What is rejected before anything is started or stopped."""

import socket
import zipfile
from pathlib import Path

import pytest

from handler.settings import MODEL_CARD, ModelCard
from scripts.serve import machine, server
from scripts.serve.machine import Plan, plan_workers
from scripts.serve.preflight import check_archives, check_ports, check_workers
from scripts.serve.running import HOST, Ports
from scripts.terminal import UserError


def test_all_that_is_wrong_with_ports_is_said_at_once() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as refused:
            check_ports(HOST, {"inference": port, "management": 0, "metrics": port, "grpc": 65536})
    said = str(refused.value)
    assert f"Port {port} (inference) cannot be used: Address already in use" in said
    assert "MANAGEMENT_PORT must be 1 to 65535, got 0." in said
    assert "GRPC_PORT must be 1 to 65535, got 65536." in said
    assert f"PORT and METRICS_PORT are both {port}" in said


def test_the_port_of_the_server_that_ends_is_free() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        check_ports(HOST, {"inference": port}, held=[port])
        with pytest.raises(UserError, match="PORT="):
            check_ports(HOST, {"inference": port})


def test_ports_of_grpc_count_only_where_it_is_on() -> None:
    assert set(Ports().used(grpc=False)) == {"inference", "management", "metrics"}
    assert len(Ports().used(grpc=True)) == 5


def test_more_workers_than_fit_are_rejected_with_the_number_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_available", lambda: 5 * machine.WORKER_BYTES)
    monkeypatch.setattr("joblib.cpu_count", lambda: 16)
    check_workers(3)
    with pytest.raises(UserError, match=r"WORKERS=4 .*at most 3, since .*GB of memory"):
        check_workers(4)
    check_workers(4, stopping=2)
    with pytest.raises(UserError, match="at most 1 for each model"):
        check_workers(2, models=2)
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)
    monkeypatch.setattr(machine, "_available", lambda: 10**12)
    check_workers(4)
    with pytest.raises(UserError, match=r"WORKERS=999 .*at most 4, since there are 1 CPUs"):
        check_workers(999)


def test_a_worker_in_8_bits_is_given_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_archive(tmp_path / "lower.mar", precision="int8")
    monkeypatch.setattr("joblib.cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "_available", lambda: 5 * machine.WORKER_BYTES)
    for name, workers in (("none.mar", 3), ("lower.mar", 2)):
        assert (
            machine.plan_workers(
                bytes_per_worker=server._max_worker_bytes([tmp_path / name])
            ).workers
            == workers
        )


def test_the_default_number_of_workers_is_never_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (0, machine.WORKER_BYTES, 10**12):
        for cpus in (1, 2, 64):
            monkeypatch.setattr(machine, "_available", lambda value=available: value)
            monkeypatch.setattr("joblib.cpu_count", lambda value=cpus: value)
            check_workers(machine.plan_workers().workers)
            check_workers(machine.plan_workers(models=3).workers, models=3)


def an_archive(path: Path, precision: str = "float32") -> bytes:
    sha256 = "0" * 64
    card = ModelCard(
        "resnet50",
        2,
        trained=True,
        weights_file="w",
        weights_sha256=sha256,
        inputs_sha256=sha256,
        precision=precision,
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.onnx", b"model" * 1000)
        archive.writestr(MODEL_CARD, card.to_json())
    return path.read_bytes()


def test_a_damaged_archive_is_rejected(tmp_path: Path) -> None:
    archive = tmp_path / "model.mar"
    whole = an_archive(archive)
    check_archives([archive])
    flipped = bytearray(whole)
    flipped[500] ^= 1
    for content in (whole[:1000], bytes(flipped), b"", b"no archive"):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.mar is damaged, cut off, or no archive"):
            check_archives([archive])
    archive.unlink()
    with pytest.raises(UserError, match="There is no archive"):
        check_archives([archive])


def test_a_model_named_twice_is_rejected(tmp_path: Path) -> None:
    an_archive(tmp_path / "a.mar")
    with pytest.raises(UserError, match="named twice: a, a"):
        check_archives([tmp_path / "a.mar", tmp_path / "a.mar"])


def test_workers_share_the_cpus_and_one_alone_may_use_up_to_eight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 16)
    monkeypatch.setattr("scripts.serve.machine._available", lambda: 10**12)
    assert plan_workers() == Plan(workers=16, threads=1, max_threads=8)
    assert plan_workers(workers=3) == Plan(workers=3, threads=5, max_threads=8)
    assert plan_workers(workers=1) == Plan(workers=1, threads=16, max_threads=16)
