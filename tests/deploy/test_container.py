"""The container image without building it: its Dockerfile, its pins, what starts in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.container import entry, ready, serving
from scripts.serve.running import Running

CONTAINER = Path("deploy/container")


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, "--no-color", CONTAINER / "Dockerfile"], check=True)


@pytest.mark.parametrize("stage", ["ray", "server"])
def test_the_image_ends_as_an_ordinary_user_with_files_that_exist(stage: str) -> None:
    stages = (CONTAINER / "Dockerfile").read_text().split("\nFROM ")
    final = stages[{"ray": -2, "server": -1}[stage]]
    assert final.startswith("${BASE} AS ray\n") == (stage == "ray")
    users = re.findall(r"^USER (\S+)", final, re.MULTILINE)
    assert users == ["10001:10001"]
    assert not re.search(r"\b(gcc|build-essential|pip)\b", final)
    ignored = Path(".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", final, re.MULTILINE):
        for source in (part.rstrip("/") for part in line.split()):
            if source == "model_store":
                assert "model_store/densenet121.mar" in kept
                continue
            assert Path(source).exists(), source
            assert any(source == k or source.startswith(f"{k}/") for k in kept), source


def test_every_package_of_the_images_is_pinned_as_for_running() -> None:
    def pins(path: Path) -> set[str]:
        return set(re.findall(r"^([a-z0-9.-]+==[^ ]+)", path.read_text(), re.MULTILINE))

    # The tests' group has what the image's gRPC needs and no other part of the project does.
    known = pins(Path("requirements.lock")) | pins(Path("tests/requirements.lock"))
    known_to_ray = known | pins(Path("batch/requirements.lock"))
    for folder, others in ((CONTAINER, known), (Path("deploy/ray"), known_to_ray)):
        image = pins(folder / "requirements.lock")
        lines = (folder / "requirements.in").read_text().splitlines()
        wanted = {line.split("[")[0] for line in lines if line and not line.startswith("#")}
        assert len(wanted) > 5
        assert wanted <= {pin.split("==")[0] for pin in image}
        names = {pin.split("==")[0] for pin in others}
        # Ray's head needs what nothing else here does.
        assert {pin for pin in image if pin.split("==")[0] in names} <= others
        assert folder != CONTAINER or image <= others


def _properties(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([^#=\n]+)=(.*)$", path.read_text(), re.MULTILINE))


def test_the_containers_configuration_differs_only_where_it_must() -> None:
    here, there = (_properties(p / "config.properties") for p in (Path(), CONTAINER))
    different = {key for key in here | there if here.get(key) != there.get(key)}
    assert different == {
        "inference_address",  # nginx is before it
        "metrics_address",
        "model_store",
        "metrics_config",
        "default_workers_per_model",
    }
    assert there["management_address"].startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("PORT=http", "PORT must be a whole number from 1 to 65535, got 'http'"),
        ("AIP_STORAGE_URI=gs://bucket/model", "this image fetches nothing"),
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


def test_it_is_ready_if_a_worker_is_and_not_without(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGEMENT_PORT", str(running.ports.management))
    assert ready.why_not_ready() is None
    monkeypatch.setenv("MANAGEMENT_PORT", str(running.ports.metrics))
    assert ready.why_not_ready() is not None


def test_the_probe_command_reports_what_the_first_process_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(SystemExit, match="not ready"):
        ready.main()
    ready.folder().mkdir()
    ready.note().touch()
    ready.main()


def test_processes_are_believed_and_not_the_management_api(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a gRPC stream TorchServe reports workers that ended as ready."""
    # A zombie, this test, and an id that no process has.
    with subprocess.Popen(["true"]) as ended:  # noqa: S607
        pids = (ended.pid, os.getpid(), 2**22 + 1)
        workers = [{"workers": [{"pid": pid, "status": "READY"} for pid in pids]}]
        models = {"models": [{"modelName": "densenet121"}]}
        monkeypatch.setattr(ready, "_asked", lambda path: workers if path else models)
        assert ready.why_not_ready() == "no worker is ready for densenet121"
