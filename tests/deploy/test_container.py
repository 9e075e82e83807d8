"""The container images without building them: Dockerfiles, pinned packages, entry point."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.container import entry, readiness
from deploy.container.limits import Limits
from deploy.container.serving import Model, Serving, read_properties
from scripts.serve.machine import FrontendPlan, Plan
from scripts.serve.management import wait_until
from tests.deploy.manifests import manifests

CONTAINER, GATEWAY = Path("deploy/container"), Path("deploy/gateway")
# Dockerfile and stage.
STAGES = {"ray": (CONTAINER, -2), "server": (CONTAINER, -1), "gateway": (GATEWAY, -1)}
SERVING = Serving((Model("pets", "1.0", Path("/models/pets.mar")),), port=9090)
LIMITS = Limits(Plan(2, 1, 2), FrontendPlan(90, 1 << 30, 1 << 29), large=10)


@pytest.mark.parametrize("folder", [CONTAINER, GATEWAY], ids=str)
def test_hadolint_accepts_the_dockerfile(folder: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, "--no-color", folder / "Dockerfile"], check=True)


@pytest.mark.parametrize("name", STAGES)
def test_an_image_has_an_unprivileged_user_and_existing_files(name: str) -> None:
    folder, number = STAGES[name]
    text = (folder / "Dockerfile").read_text().replace("\\\n", " ")
    final = text.split("\nFROM ")[number]
    assert final.startswith("${BASE} AS ray\n") == (name == "ray")
    # After a clone with umask 077 this user could not read the files.
    assert not re.search(r"^COPY (?!--from|--chmod=755)", final, re.MULTILINE)
    assert re.findall(r"^USER (\S+)", final, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"\b(gcc|build-essential|pip)\b", final)
    ignored = Path(".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"^COPY --chmod=755 (.+) \S+$", final, re.MULTILINE):
        for source in line.replace("model_store/", "model_store/densenet121.mar").split():
            path = source.rstrip("/")
            assert Path(path).exists() or path.endswith(".mar"), path
            assert any(path == k or path.startswith(f"{k}/") for k in kept), path


def test_the_images_have_the_pinned_packages_of_the_run_group() -> None:
    def pins(group: str) -> set[str]:
        text = Path(f"requirements/{group}.lock").read_text()
        return set(re.findall(r"^([a-z0-9.-]+==[^ ]+)", text, re.MULTILINE))

    # The tests' group has the packages that only the image's gRPC needs.
    known = pins("run") | pins("tests")
    assert pins("container") | pins("gateway") <= known
    # Only Ray's head needs packages of its own.
    known |= pins("batch")
    names = {pin.split("==")[0] for pin in known}
    assert {pin for pin in pins("ray") if pin.split("==")[0] in names} <= known


def test_the_containers_torchserve_properties_differ_only_where_needed() -> None:
    base = read_properties(Path("config.properties"))
    found = entry.torchserve_properties(SERVING, LIMITS)
    different = {key: value for key, value in found.items() if base.get(key) != value}
    assert different == {
        "inference_address": "http://127.0.0.1:8085",  # nginx is in front
        "metrics_address": "http://0.0.0.0:8082",
        "metrics_config": str(Path("deploy/torchserve/metrics.yaml").resolve()),
        "model_store": "/models",
        "load_models": "pets=pets.mar",
        "default_workers_per_model": "2",
        "job_queue_size": "90",  # nginx rejects before it is full
        "vmargs": f"{base['vmargs']} -Xmx1024m -XX:MaxDirectMemorySize=512m",
    }
    assert found.keys() >= base.keys()
    assert found["management_address"] == "http://127.0.0.1:8081"


def test_nginx_listens_on_ipv6_only_if_the_machine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_ipv6, ipv6 in ((True, ["[::]:9090 ipv6only=on"]), (False, [])):
        monkeypatch.setattr(entry, "has_ipv6", lambda has_ipv6=has_ipv6: has_ipv6)
        config = entry.nginx_config(SERVING, LIMITS, [])
        assert re.findall(r"^ *listen (.*);$", config, re.MULTILINE) == ["0.0.0.0:9090", *ipv6]


def test_the_container_stops_within_each_platforms_grace_period() -> None:
    """Kubernetes' grace period is compared in test_manifests.py."""
    (compose,) = manifests(Path("deploy/compose/compose.yaml"))
    periods = [compose["services"]["densenet"]["stop_grace_period"].removesuffix("s")]
    for page, pattern in (
        ("containers", r"podman stop --time (\d+)"),
        ("sagemaker", r"kills .* after (\d+) seconds"),
    ):
        periods += re.findall(pattern, Path(f"docs/deploy/{page}.md").read_text())
    assert len(periods) == 3
    assert min(map(int, periods)) > entry.STOP_SECONDS


def test_a_container_that_cannot_serve_exits_with_an_error_message(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deploy.container.serving.MODEL_STORE", archive.parent)
    monkeypatch.setattr(sys, "argv", ["entry"])
    for variable, value, message in (
        ("PORT", "http", "PORT must be a whole number from 1 to 65535, got 'http'"),
        ("AIP_PREDICT_ROUTE", "/ping", "AIP_PREDICT_ROUTE is /ping, which has another use"),
        ("WORKERS", "1024", "does not hold 1024 worker(s)"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert entry.main() == 1
        printed = capsys.readouterr().err
        assert printed.startswith("==> Error: ")
        assert message in printed


def test_the_drain_has_a_time_limit_and_then_java_stops_and_no_process_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of nginx never finish; Java gets SIGTERM, which its launcher does not forward."""
    monkeypatch.setattr(entry, "READY", tmp_path / "ready")
    monkeypatch.setattr(entry, "_LAST_SECONDS", 2)
    entry.READY.touch()
    java = f"trap 'touch {tmp_path}/SIGTERM' TERM; touch {tmp_path}/TorchServe; sleep 60 & wait"
    scripts = {
        entry.NGINX: f"trap '' QUIT; touch {tmp_path}/nginx; sleep 60 & wait",
        entry.TORCHSERVE: f'sh -c "{java}; wait" & wait',
    }
    processes = {
        name: subprocess.Popen(["sh", "-c", script], start_new_session=True)
        for name, script in scripts.items()
    }
    assert wait_until(lambda: all((tmp_path / name).exists() for name in scripts), 10)
    children = psutil.Process(processes[entry.TORCHSERVE].pid).children(recursive=True)
    start = time.monotonic()
    entry.stop(processes, 4)
    assert 2 < time.monotonic() - start < 4
    assert not entry.READY.exists()
    assert (tmp_path / "SIGTERM").exists()
    assert all(process.returncode == -signal.SIGKILL for process in processes.values())
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_worker_without_a_process_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe may report a crashed worker as ready."""
    # A zombie, this process, and an unused process id.
    with subprocess.Popen(["true"]) as ended:
        pids = (ended.pid, os.getpid(), 2**22 + 1)
        workers = [{"workers": [{"pid": pid, "status": "READY"} for pid in pids]}]
        models = {"models": [{"modelName": "densenet121"}]}
        monkeypatch.setattr(
            readiness, "_get", lambda url: models if url.endswith("/models") else workers
        )
        assert readiness.why_not_ready(8081) == "no worker is ready for densenet121"
