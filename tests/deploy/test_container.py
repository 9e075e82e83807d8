"""The container images without building them: Dockerfiles, pinned packages, entry point."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.container import entry, ready, serving
from deploy.container.limits import Limits
from deploy.container.serving import Model, Serving
from scripts.serve.management import wait_until
from scripts.serve.running import ServerState
from tests.deploy.manifests import manifests

CONTAINER = Path("deploy/container")
GATEWAY = Path("deploy/gateway")
STAGES = {
    "ray": (CONTAINER, -2),
    "server": (CONTAINER, -1),
    "gateway": (GATEWAY, -1),
}
# Prints the help of a command; only packages among the arguments can be imported.
_HELP = """
import re, runpy, sys
from importlib.metadata import packages_distributions

installed = set(sys.argv[1:])
absent = {
    module
    for module, names in packages_distributions().items()
    if not installed & {re.sub("[-_.]+", "-", name).lower() for name in names}
} - {"classification_client"}

class Finder:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"{name} is not in the image")

sys.meta_path.insert(0, Finder())
sys.argv = ["scripts", "gateway", "--help"]
runpy.run_module("scripts", run_name="__main__")
"""


@pytest.mark.parametrize("folder", [CONTAINER, GATEWAY], ids=str)
def test_hadolint_accepts_the_dockerfile(folder: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, "--no-color", folder / "Dockerfile"], check=True)


def _copies(stage: str) -> list[tuple[str, str]]:
    """Return the source and target of each file that a stage copies from the repository."""
    lines = re.findall(r"^COPY --chmod=755 (.+) (\S+)$", stage, re.MULTILINE)
    return [(source.rstrip("/"), target) for line, target in lines for source in line.split()]


def _stage(name: str) -> str:
    folder, number = STAGES[name]
    text = (folder / "Dockerfile").read_text().replace("\\\n", " ")
    return text.split("\nFROM ")[number]


@pytest.mark.parametrize("name", STAGES)
def test_an_image_has_an_unprivileged_user_and_existing_files(name: str) -> None:
    final = _stage(name)
    assert final.startswith("${BASE} AS ray\n") == (name == "ray")
    # After a clone with umask 077 this user could not read the files.
    assert not re.search(r"^COPY (?!--from|--chmod=755)", final, re.MULTILINE)
    users = re.findall(r"^USER (\S+)", final, re.MULTILINE)
    assert users == ["10001:10001"]
    assert not re.search(r"\b(gcc|build-essential|pip)\b", final)
    ignored = Path(".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for source, _ in _copies(final):
        if source == "model_store":
            assert "model_store/densenet121.mar" in kept
            continue
        assert Path(source).exists(), source
        assert any(source == k or source.startswith(f"{k}/") for k in kept), source


def test_the_gateways_image_has_the_imports_of_its_command(tmp_path: Path) -> None:
    for source, target in _copies(_stage("gateway")):
        if Path(source).is_dir():
            shutil.copytree(source, tmp_path / target)
        else:
            (tmp_path / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / target)
    lock = Path("requirements/gateway.lock").read_text()
    packages = re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE)
    command = [sys.executable, "-c", _HELP, *packages]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--upstreams" in done.stdout


def test_the_images_have_the_pinned_packages_of_the_run_group() -> None:
    def pins(path: Path) -> set[str]:
        return set(re.findall(r"^([a-z0-9.-]+==[^ ]+)", path.read_text(), re.MULTILINE))

    # The tests' group has the packages that only the image's gRPC needs.
    folder = Path("requirements")
    known = pins(folder / "run.lock") | pins(folder / "tests.lock")
    known_to_ray = known | pins(folder / "batch.lock")
    groups = {"container": known, "gateway": known, "ray": known_to_ray}
    for group, others in groups.items():
        image = pins(folder / f"{group}.lock")
        lines = (folder / f"{group}.in").read_text().splitlines()
        wanted = {re.split(r"[\[ ]", line)[0] for line in lines if line and line[0] != "#"}
        assert len(wanted) > 5
        assert wanted <= {pin.split("==")[0] for pin in image}
        names = {pin.split("==")[0] for pin in others}
        # Only Ray's head needs packages of its own.
        assert {pin for pin in image if pin.split("==")[0] in names} <= others
        assert others is known_to_ray or image <= others


def _serving(**options: Any) -> Serving:
    return Serving((Model("pets", "1.0", Path("/models/pets.mar")),), **options)


LIMITS = Limits(
    workers=2,
    threads=1,
    max_threads=2,
    requests=90,
    large=10,
    heap_bytes=1 << 30,
    direct_bytes=1 << 29,
)


def test_the_containers_torchserve_properties_differ_only_where_needed() -> None:
    base = dict(
        re.findall(r"^([^#=\n]+)=(.*)$", Path("config.properties").read_text(), re.MULTILINE)
    )
    found = entry.torchserve_properties(_serving(), LIMITS)
    different = {key: value for key, value in found.items() if base.get(key) != value}
    assert different.pop("vmargs") == f"{base['vmargs']} -Xmx1024m -XX:MaxDirectMemorySize=512m"
    assert different == {
        "inference_address": "http://127.0.0.1:8085",  # nginx is in front
        "metrics_address": "http://0.0.0.0:8082",
        "metrics_config": str(Path("deploy/torchserve/metrics.yaml").resolve()),
        "model_store": "/models",
        "load_models": "pets=pets.mar",
        "default_workers_per_model": "2",
        "job_queue_size": "90",  # nginx rejects before it is full
    }
    assert found.keys() >= base.keys()
    assert found["management_address"] == "http://127.0.0.1:8081"


def test_nginx_listens_on_ipv6_only_if_the_machine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_ipv6, ipv6 in ((True, ["[::]:9090 ipv6only=on"]), (False, [])):
        monkeypatch.setattr(entry, "has_ipv6", lambda has_ipv6=has_ipv6: has_ipv6)
        config = entry.nginx_config(_serving(port=9090), LIMITS, [])
        assert re.findall(r"^ *listen (.*);$", config, re.MULTILINE) == ["0.0.0.0:9090", *ipv6]


def test_the_container_stops_within_each_platforms_grace_period() -> None:
    """Kubernetes' grace period is compared in test_manifests.py."""
    (compose,) = manifests(Path("deploy/compose/compose.yaml"))
    composed = int(compose["services"]["densenet"]["stop_grace_period"].removesuffix("s"))
    (documented,) = re.findall(
        r"podman stop --time (\d+)", Path("docs/deploy/containers.md").read_text()
    )
    (sagemaker,) = re.findall(
        r"kills .* after (\d+) seconds", Path("docs/deploy/sagemaker.md").read_text()
    )
    assert min(composed, int(documented), int(sagemaker)) > entry.STOP_SECONDS


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("PORT=http", "PORT must be a whole number from 1 to 65535, got 'http'"),
        ("AIP_STORAGE_URI=gs://bucket/model", "this image downloads nothing"),
        ("AIP_PREDICT_ROUTE=/ping", "AIP_PREDICT_ROUTE is /ping, which has another use"),
        ("WORKERS=1024", "does not hold 1024 worker(s)"),
    ],
)
def test_a_container_that_cannot_serve_exits_with_an_error_message(
    archive: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    message: str,
) -> None:
    monkeypatch.setattr(serving, "MODEL_STORE", archive.parent)
    monkeypatch.setattr(sys, "argv", ["entry"])
    monkeypatch.setenv(*variable.split("="))
    assert entry.main() == 1
    printed = capsys.readouterr().err
    assert printed.startswith("==> Error: ")
    assert message in printed


def _child(script: str, ready: Path) -> "subprocess.Popen[bytes]":
    """Start a stub of one of the container's processes, and wait until its traps are set."""
    command = ["sh", "-c", script.format(ready=ready)]
    child = subprocess.Popen(command, start_new_session=True)
    assert wait_until(ready.exists, 10)
    return child


def test_the_drain_has_one_time_limit_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of nginx and of the gRPC server never finish, and Java hangs."""
    monkeypatch.setattr(ready, "FILE", tmp_path / "ready")
    monkeypatch.setattr(entry, "STOP_SECONDS", 4)
    monkeypatch.setattr(entry, "_DRAIN_SECONDS", 1)
    monkeypatch.setattr(entry, "_LAST_SECONDS", 2)
    ready.FILE.touch()
    stubborn = "trap '' TERM QUIT; touch {ready}; sleep 60 & wait"
    processes = {
        name: _child(stubborn, tmp_path / str(i))
        for i, name in enumerate((entry.GRPC, entry.NGINX, entry.TORCHSERVE))
    }
    java = psutil.Process(processes[entry.TORCHSERVE].pid).children()
    start = time.monotonic()
    entry.stop(processes, start + entry.STOP_SECONDS)
    assert 2 < time.monotonic() - start < entry.STOP_SECONDS
    assert not ready.FILE.exists()
    assert java
    assert all(child.returncode == -signal.SIGKILL for child in processes.values())
    assert wait_until(lambda: not any(_runs(process) for process in java), 10)


def test_sigterm_reaches_java_through_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "FILE", tmp_path / "ready")
    java = f"trap 'touch {tmp_path}/stopped; exit' TERM; touch {tmp_path}/java; sleep 60 & wait"
    processes = {
        entry.NGINX: _child("trap exit QUIT; touch {ready}; sleep 60 & wait", tmp_path / "nginx"),
        entry.TORCHSERVE: _child(f'sh -c "{java}" & wait', tmp_path / "java"),
    }
    entry.stop(processes, time.monotonic() + entry.STOP_SECONDS)
    assert (tmp_path / "stopped").exists()
    assert processes[entry.TORCHSERVE].returncode == 0


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_it_is_not_ready_without_the_management_api(running: ServerState) -> None:
    assert ready.why_not_ready(running.ports.metrics) is not None


def test_the_readiness_program_checks_the_file_only(tmp_path: Path) -> None:
    """Kubernetes sets MANAGEMENT_PORT if there is a Service with that name."""
    links = {"TMPDIR": str(tmp_path), "MANAGEMENT_PORT": "tcp://10.0.0.1:8081"}
    command = [sys.executable, "-m", "deploy.container.ready"]
    (tmp_path / "densenet").mkdir()
    assert subprocess.run(command, env=os.environ | links, check=False).returncode == 1
    (tmp_path / "densenet/ready").touch()
    subprocess.run(command, env=os.environ | links, check=True)


def test_a_worker_without_a_process_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe may report a crashed worker as ready."""
    # A zombie, this process, and an unused process id.
    with subprocess.Popen(["true"]) as ended:
        pids = (ended.pid, os.getpid(), 2**22 + 1)
        workers = [{"workers": [{"pid": pid, "status": "READY"} for pid in pids]}]
        models = {"models": [{"modelName": "densenet121"}]}
        monkeypatch.setattr(
            ready, "_get", lambda url: models if url.endswith("/models") else workers
        )
        assert ready.why_not_ready(8081) == "no worker is ready for densenet121"
